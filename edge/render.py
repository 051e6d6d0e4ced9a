"""Fills `envoy/envoy.yaml` in: `python -m edge.render [FILE]` reads `GENMESH_…` variables and writes the configuration.

The template says how Envoy behaves and why. Put in here: addresses, limits, and what follows from the contract (routes, public
paths, transcoded services). Every value goes in as JSON, which is YAML: nothing in a setting can break out of its place.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from edge.contract import PublicMethod, public_methods
from edge.refusals import mappers
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
# Streams have clusters of their own, so that they cannot use up what calls need: the name of a service's and this.
STREAMS = "_streams"
# The one service that reads cookies (gateway/cookies.py); to the others a refresh token is none of their business.
COOKIE_SERVICE = "genmesh.identity.v1.IdentityService"

READ_TRY_TIMEOUT = "10s"
READ_RETRIES = 2
# Envoy's own default, 5 minutes, is shorter than the silence a watch is promised to survive.
STREAM_IDLE_TIMEOUT = "3600s"
# Without an end, a stream would outlive every drain; the client resumes where it was.
STREAM_MAX_DURATION = "7200s"

# Browsers ask again whether a page is still the same; it changes with a release only.
PAGE_CACHE = "public, max-age=300"
PAGE_POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
PAGE_BYTES_MAX = 8 * 1024 * 1024
REQUEST_BYTES_MAX = 2 * 1024 * 1024
"""Of a body, in whatever form."""

Json = dict[str, Any]

# Of a route that is answered here and needs no token. Nor may the transcoder make another path of it, for which one was needed.
NO_TOKEN: Json = {
    "envoy.filters.http.jwt_authn": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig",
        "disabled": True,
    },
    "envoy.filters.http.grpc_json_transcoder": {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True},
}

_READING: Json = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}

# A list item that is nothing but a placeholder becomes as many items as its value has; elsewhere a placeholder becomes its value.
_PLACEHOLDER = re.compile(r"^(?P<indent> *)- \$(?P<items>[a-z_]+)$|\$(?P<value>[a-z_]+)", re.MULTILINE)


def render(settings: EnvoySettings) -> str:
    """Envoy's configuration (YAML). The files that it names in `sds_dir` are written on the way.

    Raises ValueError if the contract cannot be served as it stands.
    """
    _write_secrets(settings)
    values = _values(settings, public_methods(settings.descriptors))

    def fill(match: re.Match[str]) -> str:
        if match["items"]:
            return "\n".join(f"{match['indent']}- {json.dumps(item)}" for item in values[match["items"]])
        return json.dumps(values[match["value"]])

    return _PLACEHOLDER.sub(fill, TEMPLATE.read_text(encoding="utf-8"))


def _values(settings: EnvoySettings, methods: Sequence[PublicMethod]) -> dict[str, Any]:
    sds_dir = _sds_dir(settings)
    return {
        "listen_host": settings.listen_host,
        "edge_port": settings.edge_port,
        "edge_tls_port": settings.edge_tls_port,
        "admin_host": settings.admin_host,
        "admin_port": settings.admin_port,
        "trusted_hops": settings.trusted_hops,
        "connections_max": settings.edge_connections_max,
        "listener_connections_max": settings.edge_connections_max * 9 // 10,
        "heap_bytes_max": settings.edge_heap_mb * 1024 * 1024,
        "hsts": f"max-age={settings.hsts_max_age_s}",
        "address_limit_off": settings.edge_requests_per_s_ip == 0,
        "address_bucket": _bucket(settings.edge_requests_per_s_ip, settings.edge_burst_ip),
        "user_limit_off": settings.edge_requests_per_s_user == 0,
        "user_bucket": _bucket(settings.edge_requests_per_s_user, settings.edge_burst_user),
        "token_issuer": settings.token_issuer,
        "token_audiences": [settings.token_audience],
        "allowed_origins": [{"exact": origin} for origin in settings.allowed_origins],
        # The csrf filter compares hosts without their scheme.
        "allowed_origin_hosts": [{"exact": origin.partition("://")[2]} for origin in settings.allowed_origins],
        "unless_origin": _unless("origin"),
        "unless_api_key": _unless("x-api-key"),
        "refusals": list(mappers()),
        "descriptors": str(settings.descriptors.absolute()),
        "transcoded_services": list(dict.fromkeys(method.service for method in methods)),
        "public_rules": [rule for method in methods if not method.needs_token for rule in _public_rules(method)],
        "method_routes": [_route(method) for method in methods],
        "wrong_method_routes": list(_wrong_method_routes(methods)),
        "page_routes": list(_page_routes(settings)),
        "direct_response_bytes_max": PAGE_BYTES_MAX,
        "request_bytes_max": REQUEST_BYTES_MAX,
        **{f"{name}_secret": str(sds_dir / f"{name}.sds.json") for name in _secrets(settings)},
        **_cluster("gateway", settings.gateway_addresses),
        **_cluster("jobs", settings.jobs_addresses),
        **_cluster("credits", settings.credits_addresses),
        **_cluster("inference", settings.inference_addresses),
        **_cluster("jwks", [settings.jwks_address]),
    }


def _bucket(requests_per_s: int, burst: int) -> Json:
    return {"max_tokens": burst, "tokens_per_fill": max(requests_per_s, 1), "fill_interval": "1s"}


def _unless(header: str) -> Json:
    """A matcher that skips a filter for requests without a header (an empty one is one)."""
    return {
        "matcher_list": {
            "matchers": [
                {
                    "predicate": {
                        "not_matcher": {
                            "single_predicate": {
                                "input": {
                                    "name": header,
                                    "typed_config": {
                                        "@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
                                        "header_name": header,
                                    },
                                },
                                "value_match": {"safe_regex": {"google_re2": {}, "regex": ".*"}},
                            }
                        }
                    },
                    "on_match": {
                        "action": {
                            "name": "skip",
                            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.common.matcher.action.v3.SkipFilter"},
                        }
                    },
                }
            ]
        }
    }


# --- certificates ------------------------------------------------------------------------------------------------------------


def _sds_dir(settings: EnvoySettings) -> Path:
    return (settings.sds_dir or settings.certificates_dir).absolute()


def _secrets(settings: EnvoySettings) -> dict[str, Json]:
    """The secrets that Envoy is told of, by name. It reads them again whenever a file is renamed into the directory."""
    directory = settings.certificates_dir.absolute()
    watched: Json = {"watched_directory": {"path": str(directory)}}

    def pair(name: str) -> Json:
        files = {"certificate_chain": f"{name}.crt", "private_key": f"{name}.key"}
        return {"tls_certificate": {**{key: {"filename": str(directory / file)} for key, file in files.items()}, **watched}}

    return {
        "edge": pair("edge"),
        "client": pair("envoy"),
        "authority": {"validation_context": {"trusted_ca": {"filename": str(directory / "ca.crt")}, **watched}},
    }


def _write_secrets(settings: EnvoySettings) -> None:
    for name, secret in _secrets(settings).items():
        resource = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": name, **secret}
        _write(_sds_dir(settings) / f"{name}.sds.json", json.dumps({"resources": [resource]}))


def _write(file: Path, text: str) -> None:
    """Envoy must never read half a file."""
    partial = file.with_suffix(f"{file.suffix}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


# --- clusters and routes -----------------------------------------------------------------------------------------------------


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
    action: Json = {"cluster": cluster + STREAMS if method.streaming else cluster}
    if method.streaming:
        # timeout counts from the request's end to the response's end, 15 s by default: never for a stream.
        action |= {
            "timeout": "0s",
            "idle_timeout": STREAM_IDLE_TIMEOUT,
            "max_stream_duration": {"max_stream_duration": STREAM_MAX_DURATION, "grpc_timeout_header_max": "0s"},
        }
    else:
        timeout = f"{method.timeout_s}s"
        action |= {"timeout": timeout, "max_stream_duration": {"grpc_timeout_header_max": timeout}}
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
    route: Json = {
        "match": {"path": method.path, "headers": [is_grpc]},
        "route": action,
        # No method takes a stream: a request is whole before it goes on, and no larger than one by REST.
        "typed_per_filter_config": {
            "envoy.filters.http.buffer": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
                "buffer": {"max_request_bytes": REQUEST_BYTES_MAX},
            }
        },
    }
    return route if method.service == COOKIE_SERVICE else route | {"request_headers_to_remove": ["cookie"]}


def _wrong_method_routes(methods: Iterable[PublicMethod]) -> Iterator[Json]:
    """Routes that answer 405 for paths of the contract: one for all paths that have the same HTTP methods."""
    methods_of: dict[str, set[str]] = {}
    for method in methods:
        for binding in method.bindings:
            methods_of.setdefault(_path_regex(binding.path), set()).add(binding.http_method)
    paths_of: dict[tuple[str, ...], list[str]] = {}
    for path, known in methods_of.items():
        paths_of.setdefault(tuple(sorted(known)), []).append(path)
    for known, paths in paths_of.items():
        other: Json = {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(known)}}, "invert_match": True}
        allow = {"header": {"key": "allow", "value": ", ".join(known)}}
        yield {
            "match": {"safe_regex": {"regex": "|".join(paths)}, "headers": [other]},
            "direct_response": {"status": 405},
            "response_headers_to_add": [allow],
            "typed_per_filter_config": NO_TOKEN,
        }


def _path_regex(template: str) -> str:
    """Paths of a `google.api.http` template. No colon in a variable: after it comes the verb of another path."""
    variable = re.compile(r"\{[^}]*\}")
    if "=" in template or "*" in template:
        raise ValueError(f"REST path {template}: only variables of one segment are supported")
    return "[^/:]+".join(re.escape(part) for part in variable.split(template))


def _page_routes(settings: EnvoySettings) -> Iterator[Json]:
    """Routes of files that are served as they are: the description of the API, and the pages that show it."""
    if settings.openapi.is_file():
        yield _page_route("/openapi.json", settings.openapi)
    for file in sorted(settings.docs_dir.rglob("*")):
        path = f"/docs/{file.relative_to(settings.docs_dir).as_posix()}"
        if file.is_file():
            yield _page_route(path, file)
        if path == "/docs/index.html":
            yield _page_route("/docs/", file)
            # Without the slash, the page's own links would lead elsewhere.
            yield _redirect("/docs", HTTPStatus.PERMANENT_REDIRECT)
            yield _redirect("/", HTTPStatus.TEMPORARY_REDIRECT)


def _redirect(path: str, status: HTTPStatus) -> Json:
    """To the pages. A relative address, as a redirect of Envoy's would not be: it knows neither the scheme nor the port that a load
    balancer is reached by.
    """
    return {
        "match": {"path": path, "headers": [_READING]},
        "direct_response": {"status": status},
        "response_headers_to_add": [{"header": {"key": "location", "value": "/docs/"}, "append_action": "OVERWRITE_IF_EXISTS"}],
        "typed_per_filter_config": NO_TOKEN,
    }


def _page_route(path: str, file: Path) -> Json:
    """The route of one file, for GET and HEAD. Raises ValueError for a kind of file that is not known here."""
    content_type = PAGE_TYPES.get(file.suffix)
    if content_type is None:
        raise ValueError(f"{file}: its content type is not known")
    headers = {"content-type": content_type, "cache-control": PAGE_CACHE, "content-security-policy": PAGE_POLICY}
    return {
        "match": {"path": path, "headers": [_READING]},
        "direct_response": {"status": 200, "body": {"filename": str(file.absolute())}},
        "response_headers_to_add": [
            {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"} for key, value in headers.items()
        ],
        "typed_per_filter_config": NO_TOKEN,
    }


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
    _write(file, config)


if __name__ == "__main__":
    main()
