"""Rules of accounts and sessions: addresses, claims of access tokens, what a refresh token may still do.

No I/O and no clock here: callers bring the facts.
"""

import enum
import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from servicekit.errors import MeshError, Reason, invalid, not_found, permission_denied, unauthenticated

PASSWORD_LENGTH_MIN = 10
PLAN_FREE = "PLAN_FREE"
"""Plans go by their names in the proto: the same word in the table, in the token and on the wire."""

REFRESH_TOKEN_BYTES = 32
DISPLAY_NAME_MAX = 100


@dataclass(frozen=True, slots=True)
class Account:
    """A user as every part of the gateway knows it; secrets are elsewhere."""

    user_id: uuid.UUID
    email: str
    display_name: str
    roles: tuple[str, ...]
    plan: str
    plan_start_time: datetime
    disabled: bool
    create_time: datetime


@dataclass(frozen=True, slots=True)
class ExternalIdentity:
    """Somebody as another identity provider proved them; `issuer` and `subject` never change, the rest may."""

    issuer: str
    subject: str
    email: str
    display_name: str


@dataclass(frozen=True, slots=True)
class LinkedIdentity:
    """An identity of another provider that an account can be signed in to with."""

    identity_id: uuid.UUID
    issuer: str
    subject: str
    create_time: datetime


def canonical_email(email: str, field: str = "email") -> str:
    """The one form in which an address is stored and looked up. Raises INVALID_ARGUMENT for what PostgreSQL cannot hold."""
    if "\0" in email:
        raise invalid(field, "must not contain NUL")
    return email.lower()


def display_name_or_default(display_name: str, email: str) -> str:
    """The name to show: the given one, or the part of the address before the @."""
    return display_name.strip() or email.partition("@")[0]


def external_display_name(proven: ExternalIdentity) -> str:
    """The name to show of somebody from another provider, whose names keep rules of their own."""
    name = proven.display_name.replace("\0", "").encode(errors="ignore").decode()[:DISPLAY_NAME_MAX]
    return display_name_or_default(name, proven.email)


def require_enabled(account: Account | None) -> Account:
    """The account as it is. Raises NOT_FOUND if there is none, PERMISSION_DENIED (ACCOUNT_DISABLED)."""
    if account is None:
        raise not_found("account")
    if account.disabled:
        raise permission_denied("this account is disabled", Reason.ERROR_REASON_ACCOUNT_DISABLED)
    return account


def access_claims(
    account: Account, *, session_id: uuid.UUID, issuer: str, audience: str, issued_at: datetime, ttl: timedelta
) -> dict[str, Any]:
    """Claims of a session's access token, as `servicekit.identity.TokenVerifier` and Envoy's jwt_authn read them."""
    return {
        "iss": issuer,
        "aud": audience,
        "sub": str(account.user_id),
        "iat": int(issued_at.timestamp()),
        "exp": int((issued_at + ttl).timestamp()),
        "jti": str(uuid.uuid4()),
        "sid": str(session_id),
        "roles": list(account.roles),
        "plan": account.plan,
    }


def new_refresh_token() -> str:
    """An opaque token of 256 random bits."""
    return secrets.token_urlsafe(REFRESH_TOKEN_BYTES)


def refresh_token_hash(token: str) -> bytes:
    """What is stored of a refresh token. It has full entropy: a fast hash is enough, and it can be looked up."""
    return hashlib.sha256(token.encode()).digest()


@dataclass(frozen=True, slots=True)
class RefreshState:
    """What is known of a presented refresh token and its session at the database's now."""

    session_id: uuid.UUID
    token_used: bool
    token_expired: bool
    session_over: bool
    account_disabled: bool


class RefreshDecision(enum.Enum):
    """What happens to a presented refresh token. The values of the last two are stored as the reason a session ended."""

    ROTATE = "rotate"
    REFUSE = "refuse"
    END_REUSED = "token_reused"
    END_ACCOUNT_DISABLED = "account_disabled"


END_SIGNED_OUT = "signed_out"


def decide_refresh(state: RefreshState | None) -> RefreshDecision:
    """Refresh-token rotation with reuse detection (RFC 9700, section 4.14.2).

    A used token that comes back was copied, by whom nobody can tell: the session ends for everybody. That goes before
    expiry: an old copy is as telling as a fresh one.
    """
    if state is None or state.session_over:
        return RefreshDecision.REFUSE
    if state.token_used:
        return RefreshDecision.END_REUSED
    if state.token_expired:
        return RefreshDecision.REFUSE
    if state.account_disabled:
        return RefreshDecision.END_ACCOUNT_DISABLED
    return RefreshDecision.ROTATE


def refresh_token_invalid() -> MeshError:
    """UNAUTHENTICATED (REFRESH_TOKEN_INVALID), the same whatever is wrong with the token."""
    return unauthenticated(Reason.ERROR_REASON_REFRESH_TOKEN_INVALID, "the refresh token is not valid any more; sign in again")
