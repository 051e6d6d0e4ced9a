"""The RPCs of IdentityService that are about API keys."""

import uuid
from typing import Any

import grpc

from gateway.api_keys import ApiKeys, NewApiKey
from gateway.messages import moment, timestamp
from gateway.store import ApiKey
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.identity import current_principal, current_user_id

Context = grpc.aio.ServicerContext[Any, Any]

_SCOPE = "API_KEY_SCOPE_"


def api_key_message(key: ApiKey) -> identity_pb2.ApiKey:
    """A key as its owner sees it."""
    return identity_pb2.ApiKey(
        api_key_id=str(key.api_key_id),
        display_name=key.display_name,
        prefix=key.prefix,
        scopes=[identity_pb2.ApiKeyScope.Value(_SCOPE + scope.upper()) for scope in key.scopes],
        create_time=timestamp(key.create_time),
        expire_time=timestamp(key.expire_time) if key.expire_time else None,
        last_use_time=timestamp(key.last_use_time) if key.last_use_time else None,
        revoke_time=timestamp(key.revoke_time) if key.revoke_time else None,
    )


class ApiKeysServicer(identity_pb2_grpc.IdentityServiceServicer):
    """Part of IdentityService; see the proto. Whoever inherits it sets `api_keys`."""

    api_keys: ApiKeys

    async def CreateApiKey(self, request: identity_pb2.CreateApiKeyRequest, context: Context) -> identity_pb2.CreateApiKeyResponse:
        """See the proto."""
        wanted = NewApiKey(
            display_name=request.display_name,
            scopes=[identity_pb2.ApiKeyScope.Name(scope).removeprefix(_SCOPE).lower() for scope in request.scopes],
            expire_time=moment(request.expire_time, "expire_time") if request.HasField("expire_time") else None,
            daily_ceiling_millicredits=request.daily_ceiling_millicredits if request.HasField("daily_ceiling_millicredits") else None,
            monthly_ceiling_millicredits=request.monthly_ceiling_millicredits if request.HasField("monthly_ceiling_millicredits") else None,
        )
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        key, secret = await self.api_keys.create(
            uuid.UUID(current_user_id()),
            wanted,
            authorization=metadata["authorization"],
            client_address=current_principal().client_address,
        )
        return identity_pb2.CreateApiKeyResponse(api_key=api_key_message(key), secret=secret)

    async def ListApiKeys(self, request: identity_pb2.ListApiKeysRequest, context: Context) -> identity_pb2.ListApiKeysResponse:
        """See the proto."""
        user_id = uuid.UUID(current_user_id())
        keys, next_page_token = await self.api_keys.list_page(user_id, page_size=request.page_size, page_token=request.page_token)
        return identity_pb2.ListApiKeysResponse(api_keys=map(api_key_message, keys), next_page_token=next_page_token)

    async def RevokeApiKey(self, request: identity_pb2.RevokeApiKeyRequest, context: Context) -> identity_pb2.RevokeApiKeyResponse:
        """See the proto."""
        key = await self.api_keys.revoke(uuid.UUID(current_user_id()), uuid.UUID(request.api_key_id))
        return identity_pb2.RevokeApiKeyResponse(api_key=api_key_message(key))
