"""Settings of the gateway, beside those every service shares."""

from pathlib import Path

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from gateway.identity import PASSWORD_LENGTH_MIN
from servicekit.settings import DatabaseSettings, HostPort, ServerSettings


class GatewaySettings(ServerSettings, DatabaseSettings):
    """What `gateway serve` reads."""

    jwks_listen_address: HostPort = Field("127.0.0.1:9443", description="Where the public keys are served (HTTPS, mesh certificates only)")
    signing_keys_dir: Path = Field(
        description="Directory with Ed25519 private keys (`*.pem`): the newest signs, all are published; made where there is none"
    )
    access_token_ttl_s: int = Field(900, ge=30, le=3600, description="Life of an access token; also how long a disabled account may go on")
    refresh_token_ttl_s: int = Field(30 * 24 * 3600, ge=60, description="How long a session may rest before its refresh token expires")
    session_ttl_s: int = Field(90 * 24 * 3600, ge=60, description="Life of a session, however often it is refreshed")
    admin_email: str | None = Field(None, max_length=254, description="First administrator: made at start where no such account exists")
    admin_password: SecretStr | None = Field(
        None, validate_default=True, description=f"Password of the first administrator, at least {PASSWORD_LENGTH_MIN} characters"
    )
    password_hash_threads: int = Field(2, ge=1, le=32, description="Passwords hashed at the same time; each takes a core")
    password_hash_waiting_max: int = Field(64, ge=0, description="Passwords waiting for a thread; more are refused with RESOURCE_EXHAUSTED")
    # OWASP's recommendation for argon2id. A change takes effect for an account when it next signs in.
    password_hash_memory_kib: int = Field(19 * 1024, ge=1024, description="argon2id memory in KiB")
    password_hash_iterations: int = Field(2, ge=1, le=100, description="argon2id passes over the memory")

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
