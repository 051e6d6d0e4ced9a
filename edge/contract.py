"""What the edge may offer, read from the descriptor set: a method is public if and only if it has a REST binding.

Nobody keeps a second list by hand: a method added to the contract is routed, guarded and timed by its options.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2

from genmesh.options.v1 import options_pb2

# The stubs of googleapis-common-protos do not say which message the extension extends.
HTTP: Any = annotations_pb2.http
PUBLISHABLE = (options_pb2.ACCESS_PUBLIC, options_pb2.ACCESS_USER, options_pb2.ACCESS_OPERATOR, options_pb2.ACCESS_ADMIN)
READ_PREFIXES = ("Get", "List")
PACKAGE_PREFIX = "genmesh."
REST_PREFIX = "/v1/"
"""What is not under these two is no part of the contract: Envoy answers it without asking for a token (`envoy.yaml`, last route)."""
TIMEOUT_S = 30
"""How long a unary call may take that does not say."""
HTTP_METHODS = ("get", "put", "post", "delete", "patch")


@dataclass(frozen=True, slots=True)
class Binding:
    """A REST binding of a method, from `google.api.http`."""

    http_method: str
    path: str


@dataclass(frozen=True, slots=True)
class PublicMethod:
    """A method that clients outside the mesh can call."""

    service: str
    name: str
    access: options_pb2.Access.ValueType
    streaming: bool
    timeout_s: int
    bindings: tuple[Binding, ...]

    @property
    def path(self) -> str:
        """Its gRPC path."""
        return f"/{self.service}/{self.name}"

    @property
    def needs_token(self) -> bool:
        """Whether a caller has to be signed in."""
        return self.access != options_pb2.ACCESS_PUBLIC

    @property
    def repeatable(self) -> bool:
        """Whether a failed call can be sent again without asking the client: only reads."""
        return not self.streaming and self.name.startswith(READ_PREFIXES)


def public_methods(descriptors: Path) -> tuple[PublicMethod, ...]:
    """All methods with a REST binding, in the order of the contract.

    Raises ValueError for a method that is bound to REST but may not be called from outside, that takes a stream, or that
    lies where nobody is asked for a token.
    """
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    return tuple(
        _public(f"{file.package}.{service.name}", method)
        for file in files.file
        for service in file.service
        for method in service.method
        if method.options.HasExtension(HTTP)
    )


def _public(service: str, method: descriptor_pb2.MethodDescriptorProto) -> PublicMethod:
    access = method.options.Extensions[options_pb2.access]
    if access not in PUBLISHABLE:
        raise ValueError(f"{service}.{method.name} has a REST binding but its access is {options_pb2.Access.Name(access)}")
    if method.client_streaming:
        raise ValueError(f"{service}.{method.name} takes a stream: the edge takes whole requests only")
    rule: http_pb2.HttpRule = method.options.Extensions[HTTP]
    bindings = tuple(_bindings(rule))
    if not service.startswith(PACKAGE_PREFIX) or not all(binding.path.startswith(REST_PREFIX) for binding in bindings):
        raise ValueError(
            f"{service}.{method.name} would be reached outside /{PACKAGE_PREFIX} and {REST_PREFIX}, where no token is asked for"
        )
    timeout_s = method.options.Extensions[options_pb2.timeout_s] or TIMEOUT_S
    return PublicMethod(service, method.name, access, method.server_streaming, timeout_s, bindings)


def _bindings(rule: http_pb2.HttpRule) -> Iterator[Binding]:
    for one in (rule, *rule.additional_bindings):
        kind = one.WhichOneof("pattern")
        if kind not in HTTP_METHODS:
            raise ValueError(f"REST binding of kind {kind} is not supported")
        yield Binding(kind.upper(), getattr(one, kind))
