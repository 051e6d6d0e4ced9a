"""The embedded stack: real PostgreSQL, Redis, S3 and Envoy beside every service, as supervised children of one process.

What `genmesh up`, `genmesh demo` and the end-to-end tests run on. It imports no service: it only starts them.

    settings = StackSettings(state_dir=Path("/tmp/state"), edge_port=0, edge_tls_port=0)  # port 0: one that is free
    async with Stack(settings).running() as stack:       # everything is ready here, everything is gone afterwards
        stack.edge_url, stack.edge_tls_url               # "http://127.0.0.1:8080", "https://127.0.0.1:8443"
        stack.edge_address, stack.edge_tls_address       # the same as HOST:PORT, for gRPC channels
        stack.admin_email, stack.admin_password          # first administrator
        stack.certificates_dir                           # ca.crt, <service>.crt, <service>.key (also `cli`), edge.crt
        stack.addresses                                  # {"gateway": "127.0.0.1:20010", "jobs": …}: gRPC (mTLS) or part
        stack.database_url("jobs_service")               # also `credit_service`, `gateway`, `postgres` (superuser)
        stack.redis_url, stack.s3_environment            # GENMESH_S3_… variables
        stack.processes                                  # [ProcessStatus(name, service, role, pid, health, restarts, …)]
        stack.process("inference-0").pid                 # to kill one in a test
        await stack.until(lambda: stack.process("inference-0").restarts == 1)
        await stack.failed()                             # waits; raises StackError when a child cannot be kept running

Names of processes: postgres, redis, s3, migrate-{gateway,credits,jobs}, gateway, credits, jobs, relay, inference-N,
dispatch-N (worker id `dispatch-N`), envoy. Variables of the caller's environment that start with GENMESH_ reach the
services; `Stack(settings, environment={"GENMESH_LEASE_SECONDS": "2"})` sets more of them.
"""

from cli.stack.process import Health, ProcessStatus, StackError
from cli.stack.settings import StackSettings
from cli.stack.stack import Stack

__all__ = ["Health", "ProcessStatus", "Stack", "StackError", "StackSettings"]
