"""Rules of the gateway: addresses, claims, refresh decisions, page tokens, settings."""

import base64
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from gateway import identity
from gateway.identity import Account, RefreshDecision, RefreshState, decide_refresh
from gateway.settings import GatewaySettings
from servicekit.errors import MeshError, Reason

USER_ID = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
SESSION_ID = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8058")


def account(*, disabled: bool = False, roles: tuple[str, ...] = ()) -> Account:
    return Account(
        user_id=USER_ID,
        email="ann@example.org",
        display_name="Ann",
        roles=roles,
        plan=identity.PLAN_FREE,
        plan_start_time=datetime(2026, 1, 1, tzinfo=UTC),
        disabled=disabled,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_addresses_are_compared_without_case() -> None:
    assert identity.canonical_email("Ann@Example.ORG") == "ann@example.org"


def test_an_address_with_nul_is_refused_and_the_field_named() -> None:
    with pytest.raises(MeshError) as caught:
        identity.canonical_email("a\0@example.org", "password.email")
    assert caught.value.violations == (("password.email", "must not contain NUL"),)


@pytest.mark.parametrize(("given_name", "shown"), [("Ann", "Ann"), ("", "ann"), ("  ", "ann"), (" Ann ", "Ann")])
def test_display_name_defaults_to_the_local_part(given_name: str, shown: str) -> None:
    assert identity.display_name_or_default(given_name, "ann@example.org") == shown


def test_a_disabled_account_is_refused() -> None:
    identity.require_enabled(account())
    with pytest.raises(MeshError) as caught:
        identity.require_enabled(account(disabled=True))
    assert caught.value.reason == Reason.ERROR_REASON_ACCOUNT_DISABLED


def test_claims() -> None:
    issued_at = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def claims() -> dict[str, object]:
        return identity.access_claims(
            account(roles=("admin",)),
            session_id=SESSION_ID,
            issuer="https://i",
            audience="a",
            issued_at=issued_at,
            ttl=timedelta(minutes=15),
        )

    first = claims()
    assert first.pop("jti") != claims().pop("jti")
    assert first == {
        "iss": "https://i",
        "aud": "a",
        "sub": str(USER_ID),
        "sid": str(SESSION_ID),
        "iat": int(issued_at.timestamp()),
        "exp": int(issued_at.timestamp()) + 900,
        "roles": ["admin"],
        "plan": "PLAN_FREE",
    }


def test_refresh_tokens_are_random_and_stored_as_their_sha256() -> None:
    first, second = identity.new_refresh_token(), identity.new_refresh_token()
    assert first != second
    assert len(base64.urlsafe_b64decode(first + "=")) == identity.REFRESH_TOKEN_BYTES
    assert identity.refresh_token_hash("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("used", "expired", "over", "disabled", "decision"),
    [
        (False, False, False, False, RefreshDecision.ROTATE),
        (True, False, False, False, RefreshDecision.END_REUSED),
        (True, True, False, False, RefreshDecision.END_REUSED),
        (True, False, True, False, RefreshDecision.REFUSE),
        (False, True, False, False, RefreshDecision.REFUSE),
        (False, False, True, False, RefreshDecision.REFUSE),
        (False, False, False, True, RefreshDecision.END_ACCOUNT_DISABLED),
        (True, False, False, True, RefreshDecision.END_REUSED),
    ],
)
def test_refresh_decisions(used: bool, expired: bool, over: bool, disabled: bool, decision: RefreshDecision) -> None:
    state = RefreshState(uuid.uuid4(), token_used=used, token_expired=expired, session_over=over, account_disabled=disabled)
    assert decide_refresh(state) is decision


def test_an_unknown_refresh_token_is_refused() -> None:
    assert decide_refresh(None) is RefreshDecision.REFUSE


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_only_a_fresh_token_of_a_living_session_of_an_enabled_account_rotates(
    used: bool, expired: bool, over: bool, disabled: bool
) -> None:
    state = RefreshState(USER_ID, token_used=used, token_expired=expired, session_over=over, account_disabled=disabled)
    assert (decide_refresh(state) is RefreshDecision.ROTATE) is not (used or expired or over or disabled)


def settings(**values: object) -> GatewaySettings:
    required: dict[str, object] = {
        "certificates_dir": Path("/c"),
        "database_url": SecretStr("postgresql+asyncpg://u:p@h/d"),
        "signing_keys_dir": Path("/k"),
        "redis_url": SecretStr("redis://h:1/0"),
    }
    return GatewaySettings.model_validate(required | values)


def test_the_first_administrator_is_named_whole_or_not_at_all() -> None:
    assert settings().admin_email is None
    assert settings(admin_email="a@b", admin_password="0123456789").admin_email == "a@b"
    for half in ({"admin_email": "a@b"}, {"admin_password": "0123456789"}):
        with pytest.raises(ValidationError, match="set together"):
            settings(**half)


@pytest.mark.parametrize(("email", "password"), [("nobody", "0123456789"), ("@b", "0123456789"), ("a@b", "too short")])
def test_a_wrong_first_administrator_is_refused_and_not_shown(email: str, password: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(admin_email=email, admin_password=password)
    assert "too short" not in str(caught.value)


def test_lists_are_comma_separated_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMESH_GOOGLE_CLIENT_IDS", "browser.example, app.example")
    monkeypatch.setenv("GENMESH_GOOGLE_CLIENT_SECRET", "s")
    monkeypatch.setenv("GENMESH_GOOGLE_REDIRECT_URIS", "https://a.example/x,https://b.example/x")
    read = GatewaySettings(**settings().model_dump(include={"certificates_dir", "database_url", "signing_keys_dir", "redis_url"}))
    assert read.google_client_ids == ("browser.example", "app.example")
    assert read.google_redirect_uris == ("https://a.example/x", "https://b.example/x")


@pytest.mark.parametrize(
    "values",
    [
        {"google_client_ids": ("c",), "google_client_secret": "s"},
        {"google_client_ids": ("c",), "google_redirect_uris": ("https://a.example/x",)},
        {"google_client_secret": "s", "google_redirect_uris": ("https://a.example/x",)},
        {"google_client_ids": ("c",), "google_client_secret": "s", "google_redirect_uris": ("http://a.example/x",)},
        {"google_issuer": "http://accounts.example.com"},
        {"firebase_issuer": "http://10.0.0.1/p"},
        {"breached_passwords_url": "http://api.example.com/range"},
    ],
)
def test_identity_providers_are_named_whole_and_by_https(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**values)
    assert "'s'" not in str(caught.value)
