"""Settings of credit_service."""

from pydantic import Field

from servicekit.settings import DatabaseSettings, ServerSettings


class CreditSettings(ServerSettings, DatabaseSettings):
    """Settings of `credit_service serve`. `migrate` needs no more than DatabaseSettings."""

    hold_expiry_interval_s: float = Field(2.0, gt=0, le=30, description="How often credit_service looks for holds whose time is over")
