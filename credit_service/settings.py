"""Settings of credit_service."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from credit_service.balances import CHECKPOINT_INTERVAL_S
from credit_service.prices import load_prices
from servicekit.settings import DatabaseSettings, ServerSettings


class CreditSettings(ServerSettings, DatabaseSettings):
    """Settings of `credit_service serve`. `migrate` needs no more than DatabaseSettings."""

    # Operations that wait for the same flush of the log share it: more of them at once, more of them done.
    database_pool_size: int = Field(16, ge=1, le=100, description="Connections a process holds at most")
    checkpoint_interval_s: float = Field(CHECKPOINT_INTERVAL_S, gt=0, le=15, description="Silence on a watch before a checkpoint is sent")
    hold_expiry_interval_s: float = Field(
        2.0, gt=0, le=30, description="How often credit_service looks for holds and promotional credits whose time is over"
    )
    prices_file: Path | None = Field(None, description="Price table (TOML); unset: the one that comes with credit_service")
    plan_grant_interval_s: float = Field(
        3600.0,
        ge=0,
        le=86_400,
        description="How often credit_service gives the credits of a month to members of plans that are due; 0: never",
    )
    payment_provider: Literal["none", "stripe"] = Field("none", description="Who takes payments for credits; `none`: nobody")
    payment_return_url: str | None = Field(
        None, description="Page a browser goes to after a checkout; gets `?top_up_id=…`, and `&cancelled=true` if nobody paid"
    )
    stripe_secret_key: SecretStr | None = Field(None, description="Stripe's secret API key (sk_…)")
    stripe_webhook_secret: SecretStr | None = Field(None, description="Secret that Stripe signs its notices with (whsec_…)")
    stripe_api_url: str | None = Field(None, description="Where Stripe's API is; unset: Stripe's own address")

    @field_validator("prices_file")
    @classmethod
    def _prices_are_readable(cls, file: Path | None) -> Path | None:
        load_prices(file)
        return file

    @model_validator(mode="after")
    def _stripe_is_complete(self) -> "CreditSettings":
        needed = (self.stripe_secret_key, self.stripe_webhook_secret, self.payment_return_url)
        if self.payment_provider == "stripe" and not all(needed):
            others = "GENMESH_STRIPE_SECRET_KEY, GENMESH_STRIPE_WEBHOOK_SECRET and GENMESH_PAYMENT_RETURN_URL"
            raise ValueError(f"GENMESH_PAYMENT_PROVIDER=stripe needs {others}")
        return self
