"""Starts a child that gets a signal when its parent dies, however the parent dies.

`launch.py SIGNAL PARENT_PID UID GID PROGRAM ARGUMENT…` (UID and GID `-`: keep). A file of its own, run as `python -I -S`,
because the same calls between fork and exec of a process with threads can hang.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Drop privileges, ask the kernel for the signal, then become the program."""
    number, parent_pid, user_id, group_id, *argv = arguments
    if user_id != "-":
        os.setgroups([])
        os.setgid(int(group_id))
        os.setuid(int(user_id))
    # After the change of user, which would clear it.
    libc = ctypes.CDLL(None, use_errno=True)
    # Elsewhere than on Linux there is no such thing; the supervisor's own clean-up has to do.
    if sys.platform == "linux" and libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent_pid):
        sys.exit("the parent is gone")  # it died before the call above
    os.execv(argv[0], argv)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
