"""What the rendered configuration says: who may call what, how long it may take, what is tried again."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2
from pydantic import ValidationError

from edge import render as render_module
from edge.contract import public_methods
from edge.render import TEMPLATE, render
from edge.settings import EnvoySettings
from genmesh.options.v1 import options_pb2
from servicekit.settings import EXIT_CONFIGURATION
from servicekit.tls import server_name

HTTP: Any = annotations_pb2.http
FILTERS = "envoy.filters.http."


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
    assert names == ["cors", "grpc_web", "jwt_authn", "buffer", "grpc_json_transcoder", "router"]


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
        ("any", "/healthz"),
        ("any", "/genmesh.identity.v1.IdentityService/RegisterUser"),
        ("any", "/genmesh.identity.v1.IdentityService/SignIn"),
        ("any", "/genmesh.identity.v1.IdentityService/RefreshSession"),
        ("POST", "/v1/users"),
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


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


def test_streams_are_not_cut_and_calls_are(parsed: dict[str, Any]) -> None:
    streaming = {method.path for method in public_methods(settings().descriptors) if method.streaming}
    assert streaming
    for path, route in grpc_routes(parsed).items():
        if path in streaming:
            assert route["timeout"] == "0s"
            # Ten minutes of silence have to be survived.
            assert seconds(route["idle_timeout"]) > 600
            assert seconds(route["max_stream_duration"]["max_stream_duration"]) > seconds(route["idle_timeout"])
        else:
            assert route["timeout"] == route["max_stream_duration"]["grpc_timeout_header_max"] == "30s"


def test_only_reads_are_tried_again(parsed: dict[str, Any]) -> None:
    retried = {path.rpartition("/")[2] for path, route in grpc_routes(parsed).items() if "retry_policy" in route}
    assert {"GetJob", "ListJobs", "GetBalance", "ListEntries", "ListModels", "GetMe"} <= retried
    assert all(name.startswith(("Get", "List")) for name in retried)


def test_the_two_forms_of_rest_differ_in_streams_alone(parsed: dict[str, Any]) -> None:
    standard = http_filter(parsed, "grpc_json_transcoder")
    [sse] = [
        one["typed_per_filter_config"][f"{FILTERS}grpc_json_transcoder"]
        for one in routes(parsed)
        if f"{FILTERS}grpc_json_transcoder" in one.get("typed_per_filter_config", {})
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
    "credit_service": "credit_service",
    "inference_service": "inference_service",
    "jwks": "gateway",
}


@pytest.mark.parametrize(("cluster", "service"), CLUSTERS.items())
def test_every_service_has_to_prove_its_name(parsed: dict[str, Any], cluster: str, service: str) -> None:
    [found] = [one for one in parsed["static_resources"]["clusters"] if one["name"] == cluster]
    tls = found["transport_socket"]["typed_config"]
    context = tls["common_tls_context"]
    assert tls["sni"] == server_name(service)
    assert context["validation_context"]["match_typed_subject_alt_names"] == [
        {"san_type": "DNS", "matcher": {"exact": server_name(service)}}
    ]
    assert context["validation_context"]["trusted_ca"] == {"filename": "/certificates/ca.crt"}
    assert context["tls_certificates"][0]["private_key"] == {"filename": "/certificates/envoy.key"}


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


def test_a_public_path_with_a_variable_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variable"):
        render(settings(descriptors=contract(tmp_path, access=options_pb2.ACCESS_PUBLIC, path="/v1/{name=**}")))


def test_a_package_that_nobody_serves_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cluster"):
        render(settings(descriptors=contract(tmp_path, access=options_pb2.ACCESS_USER, package="genmesh.other.v1")))


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
