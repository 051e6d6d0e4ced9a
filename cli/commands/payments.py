"""Buying credits: prices, top-ups."""

import threading
import time
from typing import Annotated

import typer

from cli.amounts import credits_text, money_text, time_text
from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, RequestIdOption, call_once, interrupts, open_edge, parse_request_id
from cli.failures import CommandError, ExitCode, printable
from cli.output import note, plan_word, top_up_word, write_json, write_table
from genmesh.credits.v1 import payments_pb2

TOP_UPS_SHOWN = 20
TOP_UP_WAIT_MIN = 30
TOP_UP_POLL_S = 2.0
TOP_UP_TIMEOUT_S = 30.0
"""As long as the edge waits for an answer: the payment provider is asked meanwhile."""

app = typer.Typer()


@app.command("prices")
def show_prices(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show what plans and packages of credits cost. Nobody has to be signed in."""
    with open_edge(edge) as client:
        prices = client.call(client.payments.ListPrices, payments_pb2.ListPricesRequest(), signed_in=False)
    if json_output:
        write_json(prices)
        return
    write_table(
        ["what", "name", "credits", "price"],
        [
            *(
                (
                    "plan",
                    plan_word(plan.plan),
                    f"{credits_text(plan.monthly_grant_millicredits)} a month",
                    f"{money_text(plan.monthly_price_minor, plan.currency)} a month",
                )
                for plan in prices.plans
            ),
            *(
                (
                    "package",
                    package.package_id,
                    credits_text(package.amount_millicredits),
                    money_text(package.price_minor, package.currency),
                )
                for package in prices.packages
            ),
        ],
    )
    if prices.can_buy:
        note("buy a package with `genmesh credits top-up NAME`")
    else:
        note("packages cannot be bought here: no payment provider is set up")


@app.command("top-up")
def top_up(
    package_id: Annotated[str, typer.Argument(metavar="PACKAGE", help="Name of a package, see `genmesh credits prices`.")],
    wait: Annotated[bool, typer.Option("--wait", help=f"Wait until it is paid, for at most {TOP_UP_WAIT_MIN} minutes.")] = False,
    request_id: RequestIdOption = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Buy a package of credits: prints the address to pay at. The credits are there once it is paid.

    With --wait the exit code tells how it went: 0 paid, 1 not paid.
    """
    request_id = parse_request_id(request_id)
    stopped = threading.Event()
    with open_edge(edge) as client:
        request = payments_pb2.CreateTopUpRequest(request_id=request_id, package_id=package_id)
        purchase = call_once(client, client.payments.CreateTopUp, request, request_id, timeout_s=TOP_UP_TIMEOUT_S).top_up
        if json_output:
            write_json(purchase)
        elif purchase.state == payments_pb2.TopUp.STATE_PENDING:
            closes = time_text(purchase.expire_time)
            note(
                f"purchase {purchase.top_up_id}: {credits_text(purchase.amount_millicredits)} for {_price_text(purchase)}; "
                f"pay{f' before {closes}' if closes else ''} at:"
            )
            print(printable(purchase.checkout_url), flush=True)
        if wait and purchase.state == payments_pb2.TopUp.STATE_PENDING:
            with interrupts(stopped.set):
                purchase = _settled(client, purchase, stopped)
            if json_output:
                write_json(purchase)
    if wait or purchase.state != payments_pb2.TopUp.STATE_PENDING:
        _tell(purchase, json_output=json_output)


def _settled(client: Edge, purchase: payments_pb2.TopUp, stopped: threading.Event) -> payments_pb2.TopUp:
    """The purchase once it is no longer pending. Raises CommandError after TOP_UP_WAIT_MIN."""
    until = time.monotonic() + TOP_UP_WAIT_MIN * 60
    while purchase.state == payments_pb2.TopUp.STATE_PENDING:
        if time.monotonic() > until:
            raise CommandError(
                f"not paid within {TOP_UP_WAIT_MIN} minutes",
                "the checkout stays open, see `genmesh credits top-ups`; the credits come once it is paid",
            )
        if stopped.wait(TOP_UP_POLL_S):
            note("left; the checkout stays open, see `genmesh credits top-ups`")
            raise KeyboardInterrupt
        purchase = client.call(client.payments.GetTopUp, payments_pb2.GetTopUpRequest(top_up_id=purchase.top_up_id)).top_up
    return purchase


def _tell(purchase: payments_pb2.TopUp, *, json_output: bool) -> None:
    """Say how a purchase ended. Raises CommandError unless it was paid."""
    if purchase.state == payments_pb2.TopUp.STATE_PAID:
        if not json_output:
            print(f"paid {_price_text(purchase)}, {credits_text(purchase.amount_millicredits)} added (purchase {purchase.top_up_id})")
        return
    how = {
        payments_pb2.TopUp.STATE_FAILED: ("the payment failed", "try another way to pay with `genmesh credits top-up`"),
        payments_pb2.TopUp.STATE_EXPIRED: ("the checkout was not used in time", "begin again with `genmesh credits top-up`"),
        payments_pb2.TopUp.STATE_REFUNDED: ("the payment was taken back, and the credits with it", ""),
    }
    message, advice = how.get(purchase.state, (f"the purchase is {top_up_word(purchase.state)}", "see `genmesh credits top-ups`"))
    raise CommandError(message, advice, code=ExitCode.FAILED)


def _price_text(purchase: payments_pb2.TopUp) -> str:
    return money_text(purchase.price_minor, purchase.currency)


@app.command("top-ups")
def list_top_ups(limit: LimitOption = TOP_UPS_SHOWN, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """List your purchases, newest first, and where to pay those that are pending."""
    with open_edge(edge) as client:

        def fetch(page_size: int, page_token: str):
            request = payments_pb2.ListTopUpsRequest(page_size=page_size, page_token=page_token)
            response = client.call(client.payments.ListTopUps, request)
            return response.top_ups, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for purchase in found:
                write_json(purchase)
            return
        purchases = list(found)
        write_table(
            ["begun", "package", "credits", "price", "state", "paid", "taken back", "not collected", "purchase"],
            (
                (
                    time_text(purchase.create_time),
                    purchase.package_id,
                    credits_text(purchase.amount_millicredits),
                    _price_text(purchase),
                    top_up_word(purchase.state),
                    time_text(purchase.pay_time),
                    credits_text(purchase.refunded_millicredits) if purchase.refunded_millicredits else "",
                    credits_text(purchase.uncollected_millicredits) if purchase.uncollected_millicredits else "",
                    purchase.top_up_id,
                )
                for purchase in purchases
            ),
        )
        for purchase in purchases:  # below the table, which would break addresses that are to be opened
            if purchase.checkout_url and purchase.state == payments_pb2.TopUp.STATE_PENDING:
                note(f"pay for {purchase.top_up_id} at {purchase.checkout_url}")
