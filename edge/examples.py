"""Values that the examples of the REST documentation show, by the JSON name of the field, or by message and field.

Tests check each example against the contract.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

Json = dict[str, Any]
Side = Literal["request", "answer"]
"""Requests have rules; answers have every field that has no presence, because the transcoder prints zeros."""
TIMESTAMP: Json = {"type": "string", "format": "date-time"}
DURATION: Json = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"}

_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f000"
_TOKEN = "eyJhbGciOiJFZERTQSIsImtpZCI6ImsxIn0.eyJzdWIiOiIwMTk4In0.c2lnbmF0dXJl"  # noqa: S105  # shows the form only

EXAMPLES: dict[str, Any] = {
    # Ids.
    "jobId": f"{_ID}1",
    "ownerId": f"{_ID}2",
    "userId": f"{_ID}2",
    "requestId": "5f0c6f0e-3c5b-4c59-8d0e-6f6b6a1b2c3d",
    "assetId": f"{_ID}3",
    "uploadId": f"{_ID}4",
    "apiKeyId": f"{_ID}5",
    "topUpId": f"{_ID}6",
    "auditEntryId": f"{_ID}7",
    "identityId": f"{_ID}8",
    "actorUserId": f"{_ID}2",
    "packageId": "credits-1000",
    "modelId": "emoji-diffusion",
    "workerId": "dispatch-1",
    "quoteId": "q1.eyJwcmljZSI6MTIwMDB9.c2ln",
    "entryId": "4711",
    "eventId": "1203",
    # Pictures.
    "prompt": "a tiger face",
    "negativePrompt": "blurry",
    "model": "emoji-diffusion",
    "width": 64,
    "height": 64,
    "steps": 20,
    "guidanceScale": 3,
    "seed": "42",
    "imageCount": 1,
    "percent": 75,
    "step": 15,
    "stepCount": 20,
    "etaSeconds": 1.5,
    "blurhash": "LEHV6nWB2yk8pyo0adR*.7kCMdnj",
    "contentType": "image/png",
    "sizeBytes": "482133",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c0b0f00a08c",
    # Accounts.
    "email": "ada@example.com",
    "password": "correct horse battery staple",
    "displayName": "Ada",
    "accessToken": _TOKEN,
    "refreshToken": "gmr_9dP2xw7mJ0c1o5oYw3b8Qn6sV4tZkLhR",
    "roles": ["operator"],
    "secret": "gmk_4fT9aB2cD8eF_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG",
    "prefix": "gmk_4fT9aB2cD8eF",
    "googleIdToken": _TOKEN,
    "clientAddress": "203.0.113.7",
    "subject": f"{_ID}2",
    "nonce": "n-0S6_WzA2Mj5f8Kq",
    # Money.
    "availableMillicredits": "1250000",
    "reservedMillicredits": "12000",
    "promotionalMillicredits": "250000",
    "amountMillicredits": "12000",
    "balanceAfterMillicredits": "1238000",
    "costMillicredits": "12000",
    "estimatedCostMillicredits": "12000",
    "dailyMillicredits": "100000",
    "dailyCeilingMillicredits": "100000",
    "monthlyMillicredits": "2000000",
    "priceMinor": "999",
    "currency": "USD",
    # By message and field.
    "Job.state": "STATE_PROCESSING",
    "StateChange.state": "STATE_PROCESSING",
    "Progress.stage": "STAGE_DENOISING",
    "ApiKey.displayName": "nightly batch",
    "CreateApiKeyRequest.displayName": "nightly batch",
    "Model.displayName": "Emoji Diffusion 64",
    "Upload.state": "UPLOAD_STATE_COMPLETE",
    "ListDeadLettersRequest.reason": "ERROR_REASON_MODEL_FAILED",
    "DeadLetter.reason": "ERROR_REASON_MODEL_FAILED",
    "DeadLetter.message": "the model failed",
    "ListAuditEntriesRequest.method": "genmesh.credits.v1.LedgerAdminService/GrantCredits",
    "AuditEntry.method": "genmesh.credits.v1.LedgerAdminService/GrantCredits",
    "AuditEntry.code": 0,
    "AuditEntry.reason": "",
    "AuditEntry.reporter": "credit_service",
    "LinkedIdentity.issuer": "https://accounts.google.com",
    "FieldViolation.field": "spec.image.width",
    "FieldViolation.description": "must be less than or equal to 4096",
    # The rest.
    "url": "https://media.example.com/a/picture.png?signature=…",
    "checkoutUrl": "https://checkout.example.com/c/1",
    "reason": "a gift for testing",
    "resumeToken": "r1.AZjDpH8OfQ",
    "nextPageToken": "",
    "message": "the request breaks a rule",
    "code": 3,
    "domain": "genmesh",
}
"""Strings stand for 64-bit integers, as answers have them."""

LEFT_OUT = frozenset(
    {
        # A job that runs has none of these.
        "error",
        "waiting",
        "finishTime",
        "receipt",
        "rejection",
        "revokeTime",
        # Requests are shorter without.
        "negativePrompt",
        "quoteId",
    }
)
"""Fields that examples do without."""

Resolve = Callable[[Json], Json]


def example(schema: Json, resolve: Resolve, side: Side) -> Any:
    """A value of the schema. Requests: what is required and what EXAMPLES knows; answers: everything but LEFT_OUT."""
    schema = resolve(schema)
    if "examples" in schema:
        return schema["examples"][0]
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return next((value for value in schema["enum"] if not str(value).endswith("_UNSPECIFIED")), schema["enum"][0])
    if "anyOf" in schema:
        return example(schema["anyOf"][0], resolve, side)
    match schema["type"]:
        case "object":
            return {name: example(value, resolve, side) for name, value in _shown(schema, side)}
        case "array":
            return [example(schema["items"], resolve, side)]
        case "boolean":
            return False
        case "integer" | "number":
            return max(schema.get("minimum", 0), 0)
        case "string" if schema.get("format") == "int64":
            return "0"
        case "string" if schema.get("format") == "date-time":
            return "2026-05-04T12:00:00Z"
        case "string" if schema.get("pattern") == DURATION["pattern"]:
            return "1.500s"
        case _:
            return "" if side == "answer" else "…"


def _shown(schema: Json, side: Side) -> Iterator[tuple[str, Json]]:
    choices = [one["required"][0] for one in schema.get("oneOf", ()) if "required" in one]
    for name, value in schema.get("properties", {}).items():
        if name in choices[1:]:
            continue
        wanted = name in (*schema.get("required", ()), *choices) or (
            name not in LEFT_OUT if side == "answer" else name in EXAMPLES and name not in LEFT_OUT
        )
        if wanted:
            yield name, value
