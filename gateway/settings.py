"""Settings of the gateway, beside those every service shares."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from gateway.identity import PASSWORD_LENGTH_MIN
from gateway.oidc import check_outside_url
from servicekit.settings import DatabaseSettings, HostPort, RedisSettings, ServerSettings, TelemetrySettings


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


# NoDecode: comma separated in the environment, not JSON.
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
OutsideUrl = Annotated[str, AfterValidator(check_outside_url)]
OutsideUrls = Annotated[tuple[OutsideUrl, ...], NoDecode, BeforeValidator(_split)]


class SigningKeySettings(TelemetrySettings):
    """Where the keys that sign access tokens are; what `gateway rotate-keys` reads."""

    signing_keys_dir: Path = Field(
        description="Directory with Ed25519 private keys (`*.pem`), which replicas share: the newest signs, all are published; made where"
        " there is none"
    )


class GatewaySettings(ServerSettings, DatabaseSettings, RedisSettings, SigningKeySettings):
    """What `gateway serve` reads."""

    jwks_listen_address: HostPort = Field("127.0.0.1:9443", description="Where the public keys are served (HTTPS, mesh certificates only)")
    signing_key_rotation_days: float = Field(
        30, ge=0, description="A signing key older than that gets a successor; 0: only `gateway rotate-keys` makes one"
    )
    credits_address: HostPort = Field("127.0.0.1:50051", description="Where credit_service takes the ceilings of new API keys")
    access_token_ttl_s: int = Field(900, ge=30, le=3600, description="Life of an access token")
    refresh_token_ttl_s: int = Field(30 * 24 * 3600, ge=60, description="How long a session may rest before its refresh token expires")
    session_ttl_s: int = Field(90 * 24 * 3600, ge=60, description="Life of a session, however often it is refreshed")
    admin_email: str | None = Field(None, max_length=254, description="First administrator: made at start where no such account exists")
    admin_password: SecretStr | None = Field(
        None, validate_default=True, description=f"Password of the first administrator, at least {PASSWORD_LENGTH_MIN} characters"
    )
    password_hash_threads: int = Field(2, ge=1, le=32, description="Passwords hashed at the same time; each takes a core")
    password_hash_waiting_max: int = Field(64, ge=0, description="Passwords waiting for a thread; more are refused with RESOURCE_EXHAUSTED")
    password_hash_client_max: int = Field(
        32, ge=1, description="Passwords of one client address that are hashed or wait at the same time; more are refused likewise"
    )
    # OWASP's recommendation for argon2id. A change takes effect for an account when it next signs in.
    password_hash_memory_kib: int = Field(19 * 1024, ge=1024, description="argon2id memory in KiB")
    password_hash_iterations: int = Field(2, ge=1, le=100, description="argon2id passes over the memory")
    breached_passwords_url: OutsideUrl | None = Field(
        None,
        description="Range API of breached passwords, for example https://api.pwnedpasswords.com/range; unset: none is asked",
    )
    google_issuer: OutsideUrl = Field("https://accounts.google.com", description="Issuer of Google's ID tokens")
    google_client_ids: Words = Field(
        (), description="OAuth client ids that Google's ID tokens may be made for and issued to, comma separated; unset: no Google sign-in"
    )
    google_client_secret: SecretStr | None = Field(
        None, description="Secret of the first client id, which browsers sign in with; unset: only apps sign in with Google"
    )
    google_redirect_uris: OutsideUrls = Field(
        (), validate_default=True, description="Pages that Google may send browsers back to, comma separated"
    )
    firebase_project_id: str | None = Field(None, description="Firebase project whose ID tokens are accepted; unset: none are")
    firebase_issuer: OutsideUrl | None = Field(
        None, description="Issuer of Firebase's ID tokens; unset: https://securetoken.google.com/PROJECT"
    )
    sign_in_failures_max: int = Field(
        5, ge=1, description="Wrong passwords for one account from one client address in 15 minutes; then that client has to wait"
    )
    sign_in_account_failures_max: int = Field(
        50,
        ge=1,
        description="Wrong passwords for one account an hour; then only clients that it has been signed in to from may try",
    )
    sign_in_client_failures_max: int = Field(
        300,
        ge=1,
        description="Failed sign-ins, failed refreshes and wrong API keys, each, from one client address an hour; an IPv6 client is a /64"
        " network. What is right passes, passwords of accounts that were never signed in to from there excepted",
    )
    sign_ins_max: int = Field(
        1200, ge=1, description="Sign-ins and refreshes of one account from one client address an hour, those that succeed"
    )
    recent_sign_in_s: int = Field(
        900, ge=1, description="How soon after its sign-in a session may link identities to its account and unlink them"
    )
    registrations_max: int = Field(600, ge=1, description="Attempts to register from one client address an hour")

    @field_validator("google_redirect_uris")
    @classmethod
    def _check_redirect_uris(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if bool(value) != (info.data.get("google_client_secret") is not None):
            raise ValueError("GENMESH_GOOGLE_CLIENT_SECRET and GENMESH_GOOGLE_REDIRECT_URIS are set together or not at all")
        if value and not info.data.get("google_client_ids"):
            raise ValueError("GENMESH_GOOGLE_REDIRECT_URIS needs GENMESH_GOOGLE_CLIENT_IDS")
        return value

    @field_validator("admin_email")
    @classmethod
    def _check_admin_email(cls, value: str | None) -> str | None:
        if value is not None and not all(value.partition("@")):
            raise ValueError("expected an e-mail address")
        return value

    @field_validator("admin_password")
    @classmethod
    def _check_admin_password(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if "admin_email" in info.data and (value is None) != (info.data["admin_email"] is None):
            raise ValueError("GENMESH_ADMIN_EMAIL and GENMESH_ADMIN_PASSWORD are set together or not at all")
        if value is not None and len(value.get_secret_value()) < PASSWORD_LENGTH_MIN:
            raise ValueError(f"expected at least {PASSWORD_LENGTH_MIN} characters")
        return value
