"""The price table: what plans cost and give, and which packages of credits there are. Read from a file at start, never changed."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from genmesh.identity.v1 import identity_pb2

PACKAGED = Path(__file__).with_name("prices.toml")
PLANS = frozenset(identity_pb2.Plan.keys()) - {"PLAN_UNSPECIFIED"}
"""Plans go by their names in the proto."""
AMOUNT_MAX_MILLICREDITS = 1_000_000_000_000
"""The most that one grant of an administrator gives too."""
PRICE_MAX_MINOR = 99_999_999
"""The most that payment providers take at once."""

FirstGrant = Literal["at_once", "after_a_month"]


@dataclass(frozen=True, slots=True)
class PlanPrice:
    """What a plan costs a month, what it gives every month (0: nothing), and when for the first time."""

    plan: str
    monthly_price_minor: int
    monthly_grant_millicredits: int
    first_grant: FirstGrant


@dataclass(frozen=True, slots=True)
class CreditPackage:
    """Credits at a price."""

    package_id: str
    amount_millicredits: int
    price_minor: int


@dataclass(frozen=True, slots=True)
class PriceTable:
    """All prices, in one currency: the plans by name, the packages by id and from the smallest to the largest."""

    currency: str
    plans: Mapping[str, PlanPrice]
    packages: Mapping[str, CreditPackage]


# What the file may say. Strict: neither 49.99 nor "4999" nor true is an amount.
class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Plan(_Part):
    monthly_price_minor: int = Field(ge=0, le=PRICE_MAX_MINOR)
    monthly_grant_millicredits: int = Field(ge=0, le=AMOUNT_MAX_MILLICREDITS)
    first_grant: FirstGrant


class _Package(_Part):
    amount_millicredits: int = Field(ge=1, le=AMOUNT_MAX_MILLICREDITS)
    price_minor: int = Field(ge=1, le=PRICE_MAX_MINOR)


class _File(_Part):
    currency: str = Field(pattern="^[A-Z]{3}$")
    plans: dict[str, _Plan]
    packages: dict[Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,100}$")], _Package]


def load_prices(path: Path | None = None) -> PriceTable:
    """The price table of a TOML file; None: the one that comes with the service. Raises ValueError that says what is wrong and where."""
    path = path or PACKAGED
    try:
        file = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"the price table {path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors(include_url=False)]
        raise ValueError(f"the price table {path} is wrong: {'; '.join(problems)}") from error
    except ValueError as error:  # neither TOML nor UTF-8
        raise ValueError(f"the price table {path} is not TOML: {error}") from error
    for problem, plans in (("missing", PLANS - file.plans.keys()), ("unknown", file.plans.keys() - PLANS)):
        if plans:
            raise ValueError(f"the price table {path} is wrong: {problem} plans: {', '.join(sorted(plans))}")
    return PriceTable(
        file.currency,
        MappingProxyType({name: PlanPrice(name, **plan.model_dump()) for name, plan in sorted(file.plans.items())}),
        MappingProxyType(
            {
                package_id: CreditPackage(package_id, **package.model_dump())
                for package_id, package in sorted(file.packages.items(), key=lambda item: (item[1].amount_millicredits, item[0]))
            }
        ),
    )
