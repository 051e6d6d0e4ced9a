"""Fills `envoy/envoy.yaml` in: `python -m edge.render [FILE]` reads `GENMESH_…` variables and writes the configuration.

The template says how Envoy behaves and why. Put in here: addresses, and what follows from the contract (routes, public
paths, transcoded services). Every value goes in as JSON, which is YAML: nothing in a setting can break out of its place.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge.contract import PublicMethod, public_methods
from edge.settings import ENVOY_DIR, EnvoySettings
from servicekit.settings import load

TEMPLATE = ENVOY_DIR / "envoy.yaml"

# Which service serves a proto package.
CLUSTER_OF_PACKAGE = {
    "genmesh.identity.v1": "gateway",
    "genmesh.jobs.v1": "jobs_service",
    "genmesh.credits.v1": "credit_service",
    "genmesh.inference.v1": "inference_service",
}

UNARY_TIMEOUT = "30s"
READ_TRY_TIMEOUT = "10s"
READ_RETRIES = 2
# Envoy's own default, 5 minutes, is shorter than the silence a watch is promised to survive.
STREAM_IDLE_TIMEOUT = "3600s"
# Without an end, a stream would outlive every drain; the client resumes where it was.
STREAM_MAX_DURATION = "7200s"

Json = dict[str, Any]

# A list item that is nothing but a placeholder becomes as many items as its value has; elsewhere a placeholder becomes its value.
_PLACEHOLDER = re.compile(r"^(?P<indent> *)- \$(?P<items>[a-z_]+)$|\$(?P<value>[a-z_]+)", re.MULTILINE)


def render(settings: EnvoySettings) -> str:
    """Envoy's configuration (YAML). Raises ValueError if the contract cannot be served as it stands."""
    values = _values(settings, public_methods(settings.descriptors))

    def fill(match: re.Match[str]) -> str:
        if match["items"]:
            return "\n".join(f"{match['indent']}- {json.dumps(item)}" for item in values[match["items"]])
        return json.dumps(values[match["value"]])

    return _PLACEHOLDER.sub(fill, TEMPLATE.read_text(encoding="utf-8"))


def _values(settings: EnvoySettings, methods: Sequence[PublicMethod]) -> dict[str, Any]:
    certificates = settings.certificates_dir.absolute()
    return {
        "listen_host": settings.listen_host,
        "edge_port": settings.edge_port,
        "edge_tls_port": settings.edge_tls_port,
        "admin_port": settings.admin_port,
        "token_issuer": settings.token_issuer,
        "token_audiences": [settings.token_audience],
        "allowed_origins": [{"exact": origin} for origin in settings.allowed_origins],
        "descriptors": str(settings.descriptors.absolute()),
        "transcoded_services": list(dict.fromkeys(method.service for method in methods)),
        "public_rules": [rule for method in methods if not method.needs_token for rule in _public_rules(method)],
        "method_routes": [_route(method) for method in methods],
        **{name: str(certificates / file) for name, file in CERTIFICATE_FILES.items()},
        **_cluster("gateway", settings.gateway_addresses),
        **_cluster("jobs", settings.jobs_addresses),
        **_cluster("credits", settings.credits_addresses),
        **_cluster("inference", settings.inference_addresses),
        **_cluster("jwks", [settings.jwks_address]),
    }


CERTIFICATE_FILES = {
    "mesh_ca": "ca.crt",
    "client_certificate": "envoy.crt",
    "client_key": "envoy.key",
    "edge_certificate": "edge.crt",
    "edge_key": "edge.key",
}


def _cluster(name: str, addresses: Iterable[str]) -> Json:
    endpoints = [(host.strip("[]"), port) for host, _, port in (address.rpartition(":") for address in addresses)]
    return {
        # Envoy takes only IPs in a STATIC cluster; names are looked up again and again, each answer a host to balance over.
        f"{name}_discovery": "STATIC" if all(_is_ip(host) for host, _ in endpoints) else "STRICT_DNS",
        f"{name}_endpoints": [
            {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}} for host, port in endpoints
        ],
    }


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _public_rules(method: PublicMethod) -> list[Json]:
    """Rules without a requirement: a method that needs no token is reached on its gRPC path and on its REST paths."""
    rules: list[Json] = [{"match": {"path": method.path}}]
    for binding in method.bindings:
        if "{" in binding.path:
            # An exact match is all that cannot open more than it means to.
            raise ValueError(f"{method.path}: a method without a token cannot have a variable in its REST path {binding.path}")
        rules.append({"match": {"path": binding.path, "headers": [_exact(":method", binding.http_method)]}})
    return rules


def _route(method: PublicMethod) -> Json:
    """The route of one method, by its exact gRPC path: methods that are not public have none."""
    cluster = CLUSTER_OF_PACKAGE.get(method.service.rpartition(".")[0])
    if cluster is None:
        raise ValueError(f"no cluster serves {method.service}")
    action: Json = {"cluster": cluster}
    if method.streaming:
        # timeout counts from the request's end to the response's end, 15 s by default: never for a stream.
        action |= {
            "timeout": "0s",
            "idle_timeout": STREAM_IDLE_TIMEOUT,
            "max_stream_duration": {"max_stream_duration": STREAM_MAX_DURATION, "grpc_timeout_header_max": "0s"},
        }
    else:
        action |= {"timeout": UNARY_TIMEOUT, "max_stream_duration": {"grpc_timeout_header_max": UNARY_TIMEOUT}}
    if method.repeatable:
        action["retry_policy"] = {
            "retry_on": "unavailable,connect-failure,refused-stream,reset-before-request",
            "num_retries": READ_RETRIES,
            "per_try_timeout": READ_TRY_TIMEOUT,
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
                }
            ],
            "host_selection_retry_max_attempts": 3,
        }
    # Transcoded and grpc-web requests have become application/grpc… by the time they are routed.
    is_grpc: Json = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
    return {"match": {"path": method.path, "headers": [is_grpc]}, "route": action}


def _exact(header: str, value: str) -> Json:
    return {"name": header, "string_match": {"exact": value}}


def main() -> None:
    """Write the configuration to a file or to stdout; exit code 78 for wrong settings."""
    parser = argparse.ArgumentParser(prog="python -m edge.render", description="Render Envoy's configuration from GENMESH_… variables.")
    parser.add_argument("file", nargs="?", type=Path, help="where to write it; default: stdout")
    file: Path | None = parser.parse_args().file
    config = render(load(EnvoySettings))
    if file is None:
        sys.stdout.write(config)
        return
    # Envoy must never start from half a file.
    partial = file.with_suffix(f"{file.suffix}.part")
    partial.write_text(config, encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main()
