"""Authorization (ext_authz): whether a request with an API key goes on, and with which access token in the key's place."""

from http import HTTPStatus
from typing import Any

import grpc
import prometheus_client
from google.rpc import status_pb2

from ext_authz import external_auth_pb2, external_auth_pb2_grpc
from gateway.authorization import KeyTokens
from servicekit.database import translate
from servicekit.errors import MeshError, Reason, invalid
from servicekit.interceptors import CLIENT_ADDRESS

API_KEY = "x-api-key"
AUTHORIZATION = "authorization"
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""As Envoy reads refusals; its configuration says each of them in the form of ours."""

CHECKS = prometheus_client.Counter("genmesh_api_key_checks_total", "Requests with an API key", ["result"])

Context = grpc.aio.ServicerContext[Any, Any]


class AuthorizationServicer(external_auth_pb2_grpc.AuthorizationServicer):
    """See Authorization in the proto: a request goes on with an access token in the place of its API key, or not at all."""

    def __init__(self, key_tokens: KeyTokens) -> None:
        self._key_tokens = key_tokens

    async def Check(self, request: external_auth_pb2.CheckRequest, context: Context) -> external_auth_pb2.CheckResponse:
        """See the proto."""
        headers = request.attributes.request.http.headers
        try:
            if AUTHORIZATION in headers:
                raise invalid(API_KEY, "send an API key or an access token, not both")
            client_address = headers.get(CLIENT_ADDRESS) or request.attributes.source.address.socket_address.address
            token = await self._key_tokens.get(headers.get(API_KEY, ""), client_address=client_address)
        except Exception as error:
            refusal = error if isinstance(error, MeshError) else translate(error)
            if refusal is None or refusal.code not in HTTP_STATUS:
                raise
            CHECKS.labels(Reason.Name(refusal.reason).removeprefix("ERROR_REASON_")).inc()
            return _denied(refusal)
        CHECKS.labels("OK").inc()
        return _allowed(token)


def _allowed(token: str) -> external_auth_pb2.CheckResponse:
    header = external_auth_pb2.HeaderValue(key=AUTHORIZATION, value=f"Bearer {token}")
    option = external_auth_pb2.HeaderValueOption(
        header=header, append_action=external_auth_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    )
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(), ok_response=external_auth_pb2.OkHttpResponse(headers=[option], headers_to_remove=[API_KEY])
    )


def _denied(refusal: MeshError) -> external_auth_pb2.CheckResponse:
    status = external_auth_pb2.HttpStatus(code=HTTP_STATUS[refusal.code])
    return external_auth_pb2.CheckResponse(
        status=refusal.to_status(), denied_response=external_auth_pb2.DeniedHttpResponse(status=status, body=refusal.message)
    )
