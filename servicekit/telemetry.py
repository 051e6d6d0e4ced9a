"""Logs, metrics and traces of a process.

Logs are JSON lines on stderr with request and trace ids; prompts, tokens and signed URLs are never logged. Metrics are
served for Prometheus; spans go to an OTLP collector where one is set.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prometheus_client
import structlog
from opentelemetry import propagate, trace

from servicekit.settings import TelemetrySettings
from servicekit.tls import TlsFiles, WatchedContext, server_ssl_context

RPC_SECONDS = prometheus_client.Histogram(
    "genmesh_rpc_duration_seconds",
    "Time from the request to the last response of an RPC",
    ["method", "code"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600),
)
RPC_IN_FLIGHT = prometheus_client.Gauge("genmesh_rpc_in_flight", "RPCs being served", ["method"])

_log = structlog.get_logger(__name__)

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def _trace_ids(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = f"{span.trace_id:032x}"
        event["span_id"] = f"{span.span_id:016x}"
    return event


def configure(settings: TelemetrySettings, *, service: str, role: str) -> None:
    """Set up logs and traces of this process; `role` tells processes of one service apart (`serve`, `dispatch` …)."""
    renderer = structlog.processors.JSONRenderer() if settings.log_format == "json" else structlog.dev.ConsoleRenderer()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _trace_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if settings.log_format == "json" else structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.log_level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, role=role)
    # Libraries log through `logging`: same form, same place.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    logging.basicConfig(level=max(LEVELS[settings.log_level], logging.WARNING), handlers=[handler], force=True)

    if settings.otlp_endpoint:
        # Imported only where traces are wanted: the SDK and its exporter cost every process start and memory.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": service, "genmesh.role": role}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
        trace.set_tracer_provider(provider)


tracer = trace.get_tracer("genmesh")


@contextmanager
def server_span(method: str, metadata: Mapping[str, str]):
    """A span for a served RPC, child of the caller's span. Costs next to nothing while no collector is set."""
    with tracer.start_as_current_span(method, context=propagate.extract(metadata), kind=trace.SpanKind.SERVER) as span:
        yield span


class Response(Protocol):
    """A WSGI `start_response`."""

    def __call__(self, status: str, headers: list[tuple[str, str]]) -> Any:
        """Begin the response."""
        ...


Page = Callable[[], tuple[str, bytes]]


class _QuietHandler(WSGIRequestHandler):
    timeout = 5  # a peer that says nothing gives its thread back

    def log_message(self, format: str, *args: object) -> None:
        """Requests for metrics are not worth a line each."""


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    tls: WatchedContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the request's own thread, so that a slow peer holds up nobody."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_QuietHandler.timeout)
        with self.tls.current().wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer without a mesh certificate, or one that hung up, is no fault of ours."""
        _log.debug("http.request_failed", exc_info=True)


class HttpServer:
    """A small HTTP server in a thread, for what is not gRPC: `/metrics` and the gateway's key set.

    `pages` maps a path to a function that returns content type and body. With `tls`, only mesh certificates are let in,
    and new connections get what is newest in the files.
    """

    def __init__(self, address: str, pages: Mapping[str, Page], tls: TlsFiles | None = None) -> None:
        host, _, port = address.rpartition(":")

        def app(environ: dict[str, Any], start_response: Response) -> list[bytes]:
            page = pages.get(environ["PATH_INFO"])
            if page is None or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                start_response("404 Not Found", [("content-type", "text/plain")])
                return [b"not found\n"]
            content_type, body = page()
            start_response("200 OK", [("content-type", content_type), ("content-length", str(len(body)))])
            return [body]

        self._server = make_server(host, int(port), app, server_class=_ThreadingServer, handler_class=_QuietHandler)  # pyright: ignore[reportArgumentType]
        if tls is not None:
            self._server.tls = WatchedContext(tls, server_ssl_context)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def __enter__(self) -> "HttpServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metrics_page() -> tuple[str, bytes]:
    """All metrics of this process in Prometheus' text format."""
    return prometheus_client.CONTENT_TYPE_LATEST, prometheus_client.generate_latest()
