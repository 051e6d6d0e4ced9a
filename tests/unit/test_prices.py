"""The price table: the one that is shipped, and what is refused in others."""

from pathlib import Path

import pytest

from credit_service.prices import PACKAGED, CreditPackage, PlanPrice, load_prices

# Without its comments, which speak of the same values.
FILE = "".join(line for line in PACKAGED.read_text(encoding="utf-8").splitlines(keepends=True) if not line.startswith("#"))


def test_the_shipped_table() -> None:
    prices = load_prices()
    assert prices.currency == "USD"
    assert prices.plans == {
        "PLAN_FREE": PlanPrice("PLAN_FREE", 0, 25_000, "after_a_month"),
        "PLAN_PRO": PlanPrice("PLAN_PRO", 4999, 5_000_000, "at_once"),
    }
    amounts = [package.amount_millicredits for package in prices.packages.values()]
    assert len(amounts) == 3
    assert amounts == sorted(amounts)
    assert prices.packages["credits-500"] == CreditPackage("credits-500", 500_000, 599)


def test_the_table_cannot_be_changed() -> None:
    prices = load_prices()
    with pytest.raises(TypeError):
        prices.packages["credits-500"] = CreditPackage("credits-500", 500_000, 1)  # pyright: ignore[reportIndexIssue]


def test_another_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(FILE.replace('"USD"', '"EUR"').replace("4999", "0").partition("[packages")[0] + "[packages]\n")
    prices = load_prices(file)
    assert (prices.currency, prices.plans["PLAN_PRO"].monthly_price_minor, dict(prices.packages)) == ("EUR", 0, {})


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("4999", "49.99", "plans.PLAN_PRO.monthly_price_minor: Input should be a valid integer"),
        ("4999", '"4999"', "plans.PLAN_PRO.monthly_price_minor: Input should be a valid integer"),
        ("4999", "true", "plans.PLAN_PRO.monthly_price_minor: Input should be a valid integer"),
        ("4999", "-1", "plans.PLAN_PRO.monthly_price_minor: Input should be greater than or equal to 0"),
        ("5_000_000", "-1", "plans.PLAN_PRO.monthly_grant_millicredits: Input should be greater than or equal to 0"),
        ("5_000_000", "1_000_000_000_001", "plans.PLAN_PRO.monthly_grant_millicredits: Input should be less than or equal to"),
        ('"at_once"', '"soon"', "plans.PLAN_PRO.first_grant: Input should be 'at_once' or 'after_a_month'"),
        ("= 599", "= 0", "packages.credits-500.price_minor: Input should be greater than or equal to 1"),
        ("500_000", "0", "packages.credits-500.amount_millicredits: Input should be greater than or equal to 1"),
        ("price_minor = 599", "", "packages.credits-500.price_minor: Field required"),
        ("price_minor = 599", "price_minor = 599\ndiscount = 1", "packages.credits-500.discount: Extra inputs are not permitted"),
        ("[packages.credits-500]", '[packages."Credits 500"]', "packages.Credits 500"),
        ('"USD"', '"usd"', "currency: String should match pattern"),
        ('"USD"', '"USD"\ncountry = "US"', "country: Extra inputs are not permitted"),
        ("[plans.PLAN_PRO]", "[plans.PLAN_MAX]", "missing plans: PLAN_PRO"),
        (
            "[plans.PLAN_PRO]",
            '[plans.PLAN_MAX]\nmonthly_price_minor=1\nmonthly_grant_millicredits=1\nfirst_grant="at_once"\n[plans.PLAN_PRO]',
            "unknown plans: PLAN_MAX",
        ),
        ("[plans.PLAN_PRO]", "[plans.PLAN_FREE]", "is not TOML"),
        ("[plans.PLAN_PRO]", "[plans", "is not TOML"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    file = tmp_path / "prices.toml"
    assert old in FILE
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        load_prices(file)
    assert str(file) in str(caught.value)
    assert told in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_prices(tmp_path / "nothing.toml")
    file = tmp_path / "prices.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        load_prices(file)
