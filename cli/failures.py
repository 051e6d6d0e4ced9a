"""What can go wrong for a user of the command line: exit codes, and every error as what happened and what to do next."""

import sys
from enum import IntEnum
from unicodedata import category

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from rich.console import Console
from rich.text import Text

from cli.amounts import credits_text, seconds_text

DOMAIN = "genmesh"
_UNSAFE = frozenset({"Cc", "Cs"})  # control characters, lone surrogates; emoji need the format characters (Cf)


class ExitCode(IntEnum):
    """What the process says to a script."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    DENIED = 4
    NOT_FOUND = 5
    CREDITS = 6
    CANCELLED = 7
    DISCREPANCY = 8
    LIMITED = 9
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done · 1 the job or the command failed · 2 wrong usage or bad input · 3 not running or unavailable · "
    "4 not signed in or not allowed · 5 not found · 6 not enough credits or a ceiling reached · 7 the job was cancelled · "
    "8 the ledger does not add up · 9 a limit reached, try again later · 78 wrong setting · 130 interrupted."
)

# What tells more than the code of the status.
_EXIT_OF_REASON = {
    "ERROR_REASON_INSUFFICIENT_CREDITS": ExitCode.CREDITS,
    "ERROR_REASON_CEILING_REACHED": ExitCode.CREDITS,
    "ERROR_REASON_REQUEST_TOO_LARGE": ExitCode.USAGE,  # waiting does not help
}

_EXIT_OF_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.OUT_OF_RANGE: ExitCode.USAGE,
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.LIMITED,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.DENIED,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.DENIED,
    grpc.StatusCode.NOT_FOUND: ExitCode.NOT_FOUND,
}

# What no server said, as google.rpc.Status has it.
_STATUS_OF_EXIT = {
    ExitCode.FAILED: code_pb2.UNKNOWN,
    ExitCode.USAGE: code_pb2.INVALID_ARGUMENT,
    ExitCode.UNAVAILABLE: code_pb2.UNAVAILABLE,
    ExitCode.DENIED: code_pb2.UNAUTHENTICATED,
    ExitCode.NOT_FOUND: code_pb2.NOT_FOUND,
    ExitCode.CREDITS: code_pb2.FAILED_PRECONDITION,
    ExitCode.CANCELLED: code_pb2.CANCELLED,
    ExitCode.DISCREPANCY: code_pb2.DATA_LOSS,
    ExitCode.LIMITED: code_pb2.RESOURCE_EXHAUSTED,
    ExitCode.INTERRUPTED: code_pb2.CANCELLED,
}

_ADVICE_OF_CODE = {
    grpc.StatusCode.UNAVAILABLE: "try again in a moment; `genmesh status` shows what runs",
    grpc.StatusCode.DEADLINE_EXCEEDED: "try again in a moment; `genmesh status` shows what runs",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "a limit was reached: try again in a moment",
    grpc.StatusCode.UNAUTHENTICATED: "sign in with `genmesh login`",
    grpc.StatusCode.PERMISSION_DENIED: "sign in with an account that may do this: `genmesh login`",
    grpc.StatusCode.NOT_FOUND: "`genmesh jobs list` shows your jobs; what belongs to others cannot be seen",
    grpc.StatusCode.INVALID_ARGUMENT: "mend the input and run it again; `--help` and `genmesh models` list what is accepted",
    grpc.StatusCode.UNIMPLEMENTED: "the edge does not offer this: check that `--edge` points to a genmesh of this version",
}

_ADVICE_OF_FIELD = {
    "package_id": "see `genmesh credits prices`",
}

_ADVICE_OF_REASON = {
    "ERROR_REASON_INSUFFICIENT_CREDITS": "see `genmesh credits`; ask an administrator, or `genmesh credits top-up` where credits are sold",
    "ERROR_REASON_CEILING_REACHED": "`genmesh credits ceilings` shows what is spent; wait until it starts anew, or have it raised",
    "ERROR_REASON_AMOUNT_OUT_OF_RANGE": "choose another amount; `genmesh credits` shows what there is",
    "ERROR_REASON_REQUEST_ID_REUSED": "the id was used for something else: run it without --request-id, or with a new one",
    "ERROR_REASON_NOT_OFFERED": "this genmesh is not set up for it; whoever runs it can change that",
    "ERROR_REASON_SIGNATURE_INVALID": "check that the signing secret of this genmesh is that of the payment provider",
    "ERROR_REASON_BAD_CREDENTIALS": "check e-mail and password, or make an account with `genmesh register`",
    "ERROR_REASON_ACCOUNT_DISABLED": "ask an administrator to enable the account",
    "ERROR_REASON_EMAIL_TAKEN": "sign in with `genmesh login`, or register another address",
    "ERROR_REASON_MODEL_UNKNOWN": "`genmesh models` lists what there is",
    "ERROR_REASON_JOB_TERMINAL": "nothing is left to do: `genmesh jobs show JOB` tells how it ended",
    "ERROR_REASON_JOB_NOT_FAILED": "`genmesh jobs show JOB` tells how it stands",
    "ERROR_REASON_JOB_NOT_TERMINAL": "stop it first with `genmesh jobs cancel JOB`, or wait for its end with `genmesh watch JOB`",
    "ERROR_REASON_LIMIT_REACHED": "a limit was reached: wait for your other jobs, or try again in a moment",
    "ERROR_REASON_TOKEN_REVOKED": "the session was ended or the account changed: sign in again with `genmesh login`",
    "ERROR_REASON_API_KEY_INVALID": "make a key with `genmesh keys create`, or unset GENMESH_API_KEY to use your login",
    "ERROR_REASON_ID_TOKEN_INVALID": "begin again with `genmesh login --google`; if it stays, check clock and settings of this genmesh",
    "ERROR_REASON_UPLOAD_INVALID": "mend the file and upload it again with `genmesh uploads put FILE`",
    "ERROR_REASON_PASSWORD_BREACHED": "choose another password: this one is known from a breach of another site",
    "ERROR_REASON_IDENTITY_TAKEN": "sign in with that identity instead, or link another one",
    "ERROR_REASON_LAST_IDENTITY": "link another identity first with `genmesh link`: without this one nobody could sign in to the account",
    "ERROR_REASON_REQUEST_TOO_LARGE": "send less at once: fewer or shorter values",
    "ERROR_REASON_LAST_ADMIN": "give somebody else the role first: `genmesh admin users update EMAIL --role admin`",
    "ERROR_REASON_INTERNAL": "try again; if it stays, give the error id to whoever runs this genmesh",
}


class CommandError(Exception):
    """An end that the user is told about: one line what happened, one line what to do next, an exit code.

    `status` is what a server said about it, where one did.
    """

    def __init__(
        self,
        message: str,
        advice: str = "",
        *,
        code: ExitCode = ExitCode.FAILED,
        notes: tuple[str, ...] = (),
        status: status_pb2.Status | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.code = code
        self.notes = notes
        self.status = status

    def told(
        self, message: str | None = None, advice: str | None = None, *, code: ExitCode | None = None, notes: tuple[str, ...] | None = None
    ) -> "CommandError":
        """The same failure in other words; what is left out stays."""
        return CommandError(
            self.message if message is None else message,
            self.advice if advice is None else advice,
            code=self.code if code is None else code,
            notes=self.notes if notes is None else notes,
            status=self.status,
        )

    def show(self, *, as_json: bool = False) -> None:
        """Write it to stderr: in words, or as a google.rpc.Status in JSON, which is one line."""
        if as_json:
            print(_status_json(self), file=sys.stderr, flush=True)
            return
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(Text.assemble(("error: ", "bold red"), printable(self.message)))
        for note in self.notes:
            console.print(Text(f"  - {printable(note)}"))
        if self.advice:
            console.print(Text.assemble(("next:  ", "bold"), printable(self.advice)))


def _status_json(failure: CommandError) -> str:
    """Code and details as the server gave them; the message and, as a LocalizedMessage, notes and advice as everybody gets them."""
    status = status_pb2.Status(code=_STATUS_OF_EXIT[failure.code])
    if failure.status is not None:
        status.CopyFrom(failure.status)
    status.message = failure.message
    if more := "\n".join(filter(None, (*failure.notes, failure.advice))):
        status.details.add().Pack(error_details_pb2.LocalizedMessage(locale="en", message=more))
    try:
        return json_format.MessageToJson(status, indent=None)
    except (TypeError, ValueError):  # details of a newer release: their types are not known here
        del status.details[:]
        return json_format.MessageToJson(status, indent=None)


def printable(text: str) -> str:
    """Text from elsewhere on one line and without control characters, which could rewrite the reader's terminal."""
    return "".join(" " if character.isspace() else "\ufffd" if category(character) in _UNSAFE else character for character in text)


def status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    """The google.rpc.Status that a refusal carries, or None."""
    try:
        return rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    except (ValueError, DecodeError):  # it contradicts the plain status, or is none
        return None


def reason_in(status: status_pb2.Status | None) -> tuple[str, dict[str, str]]:
    """Reason (a name of ErrorReason, or empty) and metadata of a google.rpc.Status."""
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info.reason, dict(info.metadata)
    return "", {}


def reason_of(error: grpc.RpcError) -> str:
    """Name of the ErrorReason of a refusal; empty when it carries none (what Envoy or the network says)."""
    return reason_in(status_of(error))[0]


def message_in(status: status_pb2.Status) -> str:
    """What a google.rpc.Status says, amounts in credits as everywhere else; empty when it says nothing."""
    reason, metadata = reason_in(status)
    text = {"ERROR_REASON_INSUFFICIENT_CREDITS": _shortage_text, "ERROR_REASON_CEILING_REACHED": _ceiling_text}.get(reason)
    return (text(metadata) if text else "") or status.message


def retry_after_s(error: grpc.RpcError) -> float | None:
    """How long the server asked to wait, or None."""
    status = status_of(error)
    for detail in status.details if status else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToMilliseconds() / 1000
    return None


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Status code of a failed call."""
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN


def failure_of(error: grpc.RpcError) -> CommandError:
    """A failed call, told to the user."""
    code = code_of(error)
    status = status_of(error)
    reason, metadata = reason_in(status)
    message = (message_in(status) if status else "") or (error.details() if isinstance(error, grpc.Call) else "") or code.name
    notes: list[str] = []
    advice = _ADVICE_OF_REASON.get(reason) or _ADVICE_OF_CODE.get(code, "")
    for detail in status.details if status else ():
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            for violation in bad_request.field_violations:
                notes.append(f"{violation.field}: {violation.description}")
                advice = _ADVICE_OF_FIELD.get(violation.field, advice)
    if reason == "ERROR_REASON_CEILING_REACHED":
        if _beyond_ceiling(metadata):
            advice = "`genmesh credits ceilings` shows it; waiting does not help, have it raised"
        elif (anew_after_s := retry_after_s(error)) is not None:
            notes.append(f"it starts anew in {seconds_text(anew_after_s)}")
    elif reason == "ERROR_REASON_LIMIT_REACHED" and (wait_s := retry_after_s(error)):
        advice = f"try again in {seconds_text(max(1, wait_s))}"
    elif reason == "ERROR_REASON_SCOPE_MISSING":
        scope = metadata.get("scope")
        advice = (
            f"use a key with the scope {scope}: `genmesh keys create NAME --scope {scope}`"
            if scope
            else "no API key may do this: unset GENMESH_API_KEY and sign in with `genmesh login`"
        )
    if error_id := metadata.get("error_id"):
        notes.append(f"error id {error_id}")
    if notes and len(notes) == 1 and notes[0] == message:
        notes = []
    exit_code = _EXIT_OF_REASON.get(reason) or _EXIT_OF_CODE.get(code, ExitCode.FAILED)
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        message = f"the edge cannot serve this right now ({message})"
    return CommandError(message, advice, code=exit_code, notes=tuple(notes), status=status or status_pb2.Status(code=code.value[0]))


def _amounts(metadata: dict[str, str], *names: str) -> list[int]:
    """Amounts of a refusal, in millicredits; none when it does not say all of them."""
    try:
        return [int(metadata[f"{name}_millicredits"]) for name in names]
    except (KeyError, ValueError):
        return []


def _shortage_text(metadata: dict[str, str]) -> str:
    amounts = [credits_text(amount) for amount in _amounts(metadata, "required", "available")]
    return f"{amounts[0]} needed, {amounts[1]} available" if amounts else ""


def _beyond_ceiling(metadata: dict[str, str]) -> bool:
    """Whether more is needed than the ceiling ever leaves, as with one of 0."""
    amounts = _amounts(metadata, "required", "ceiling")
    return bool(amounts) and amounts[0] > amounts[1]


def _ceiling_text(metadata: dict[str, str]) -> str:
    """Which ceiling leaves no room, in credits; empty when the refusal does not say."""
    amounts = _amounts(metadata, "ceiling", "spent", "required")
    if not amounts:
        return ""
    ceiling, spent, required = amounts
    whose = f"the API key {metadata['api_key_id']}" if metadata.get("api_key_id") else "the account"
    bound = f"{whose} may spend {credits_text(ceiling)} a {metadata.get('period', 'period')}"
    return f"{bound}: {credits_text(spent)} spent or held, {credits_text(required)} needed"


def usage(message: str, advice: str = "see `--help`") -> CommandError:
    """Bad input that never reached the server."""
    return CommandError(message, advice, code=ExitCode.USAGE)
