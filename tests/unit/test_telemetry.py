"""Spans reach a collector where one is set. The process is a real one: a tracer provider is set once in its life."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN_ID = "b7ad6b7169203331"
PROGRAM = f"""
import sys
from servicekit import telemetry
from servicekit.settings import TelemetrySettings

settings = TelemetrySettings.model_validate({{"otlp_endpoint": sys.argv[1]}} if sys.argv[1] else {{}})
telemetry.configure(settings, service="jobs_service", role="serve")
with telemetry.server_span("/genmesh.jobs.v1.JobsService/GetJob", {{"traceparent": "00-{TRACE_ID}-{CALLER_SPAN_ID}-01"}}):
    print("opentelemetry.sdk.trace" in sys.modules)
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """The remote end: keeps what it is sent."""

    def __init__(self) -> None:
        self.received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def run(endpoint: str) -> str:
    return subprocess.run([sys.executable, "-c", PROGRAM, endpoint], check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_a_span_of_a_served_call_continues_the_callers_trace():
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run(f"http://127.0.0.1:{port}")  # the end of the process sends what is left
    finally:
        server.stop(None).wait()
    [resource] = [resource for request in collector.received for resource in request.resource_spans]
    attributes = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (attributes["service.name"], attributes["genmesh.role"]) == ("jobs_service", "serve")
    [span] = [span for scope in resource.scope_spans for span in scope.spans]
    assert span.name == "/genmesh.jobs.v1.JobsService/GetJob"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, CALLER_SPAN_ID)


def test_without_a_collector_the_sdk_is_not_even_loaded():
    assert run("") == "False"
