"""Credits on the command line against a real gRPC server in this process: entries, CSV, watches, ceilings, purchases, the audit."""

import csv
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from cli.amounts import time_text
from cli.client import Edge
from cli.commands.credits import CSV_COLUMNS, EntryKind, cell_text, change_line, purpose_text, write_csv
from cli.connection import Backoff
from cli.failures import ExitCode
from cli.output import entry_word
from cli.session import SessionMemory
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from servicekit.errors import MeshError, invalid, permission_denied, precondition, unauthenticated, unavailable
from tests.unit.fake_edge import EMAIL, JOB_ID, PASSWORD, USER_ID, WAIT_S, FakeEdge, Reason, spawned

KEY_ID = "01890a5d-ac96-774b-bcce-b302099a8059"
REQUEST_ID = "01890a5d-ac96-774b-bcce-b302099a8060"
WHEN = 1_790_000_000  # 2026-09-21T14:13:20Z
HOURS_S = 5 * 3600.0

Genmesh = Callable[..., Result]
Entry = credits_pb2.Entry
TopUp = payments_pb2.TopUp


def stamp(seconds: int = WHEN, nanos: int = 0) -> Timestamp:
    return Timestamp(seconds=seconds, nanos=nanos)


def capture(entry_id: int = 7, **fields: Any) -> credits_pb2.Entry:
    lines = [credits_pb2.ReceiptLine(description="Image 64x64", quantity=20, unit="step", amount_millicredits=20)]
    return Entry(
        entry_id=entry_id, kind=Entry.KIND_CAPTURE, account=Entry.ACCOUNT_RESERVED, amount_millicredits=-20, job_id=JOB_ID,
        model="sd-tiny", lines=lines, create_time=stamp(), **fields,
    )  # fmt: skip


def grant(entry_id: int = 3, reason: str = "trial", **fields: Any) -> credits_pb2.Entry:
    return Entry(
        entry_id=entry_id, kind=Entry.KIND_PLAN_GRANT, account=Entry.ACCOUNT_AVAILABLE, amount_millicredits=10_000,
        balance_after_millicredits=10_980, reason=reason, create_time=stamp(), **fields,
    )  # fmt: skip


def documents(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def rows(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


# Balance and entries


def test_the_balance_says_what_of_it_expires(signed_in: Genmesh, fake: FakeEdge) -> None:
    assert signed_in("credits").stdout.splitlines() == ["available      0.98 credits", "held for jobs  0.02 credits"]
    fake.balance = credits_pb2.GetBalanceResponse(available_millicredits=12_500, promotional_millicredits=10_000, next_expire_time=stamp())
    assert signed_in("credits").stdout.splitlines() == [
        "available            12.5 credits",
        f"of that promotional  10 credits, the first expire {time_text(stamp())}",
    ]
    assert documents(signed_in("credits", "--json")) == [
        {
            "availableMillicredits": "12500",
            "reservedMillicredits": "0",
            "promotionalMillicredits": "10000",
            "nextExpireTime": "2026-09-21T14:13:20Z",
        }
    ]


def test_the_entries_of_old_are_the_entries_of_new(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.entries = [capture(), grant()]
    for more in ([], ["--json"], ["--limit", "1"], ["--json", "--limit", "1"]):
        old, new = signed_in("credits", "--entries", *more), signed_in("credits", "entries", *more)
        assert (old.exit_code, new.exit_code) == (0, 0), old.output
        assert old.stdout == new.stdout
        assert len(old.stdout.splitlines()) == (1 if "--limit" in more else 2)
    assert not any(request.HasField("start_time") or request.kinds or request.job_id for request in fake.entries_asked)


def test_options_before_a_subcommand_are_refused(signed_in: Genmesh, fake: FakeEdge) -> None:
    for option in (["--entries"], ["--json"], ["--limit", "3"], ["--edge", "http://127.0.0.1:1"]):
        result = signed_in("credits", *option, "entries")
        assert result.exit_code == ExitCode.USAGE
        assert "genmesh credits entries --help" in result.stderr
    assert not fake.entries_asked


def test_entries_are_selected_by_job_kind_and_time(signed_in: Genmesh, fake: FakeEdge) -> None:
    result = signed_in(
        *("credits", "entries", "--job", JOB_ID.upper(), "--kind", "Plan_Grant", "--kind", "top-up", "--kind", "KIND_PLAN_GRANT"),
        *("--since", "2026-07-01", "--until", "2026-07-02T01:30:00.5+02:00"),
    )
    assert result.exit_code == 0, result.output
    (asked,) = fake.entries_asked
    assert (asked.job_id, list(asked.kinds)) == (JOB_ID, [Entry.KIND_PLAN_GRANT, Entry.KIND_TOP_UP])
    assert asked.start_time.ToJsonString() == "2026-07-01T00:00:00Z"
    assert asked.end_time.ToJsonString() == "2026-07-01T23:30:00.500Z"


@pytest.mark.parametrize(
    "arguments",
    [
        ["entries", "--since", "yesterday"],
        ["entries", "--since", "2026-02-30"],
        ["entries", "--since", "2026-02-03T04:05:06"],  # where?
        ["entries", "--since", "20260203"],
        ["entries", "--until", ""],
        ["entries", "--since", "2026-07-02", "--until", "2026-07-02"],
        ["entries", "--job", "x"],
        ["entries", "--kind", "bonus"],
        ["export", "--limit", "0"],
        ["export", "--out", "no/such/directory/x.csv"],
        ["export", "--out", "."],
        ["top-up", "credits-1000", "--request-id", ""],
        ["top-up", "credits-1000", "--request-id", "x"],
        ["ceiling", KEY_ID],
        ["ceiling", "my key", "--none"],
        ["ceiling", KEY_ID, "--daily", "5", "--none"],
        ["ceiling", KEY_ID, "--daily", "-1"],
        ["ceiling", KEY_ID, "--monthly", "1e99999999"],
        ["nonsense"],
    ],
)
def test_bad_input_is_usage_and_reaches_nobody(signed_in: Genmesh, fake: FakeEdge, arguments: list[str]) -> None:
    result = signed_in("credits", *arguments)
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, ""), result.output
    assert not fake.entries_asked
    assert not fake.key_ceilings
    assert not fake.top_ups_asked


def test_a_time_without_a_place_is_told_what_it_lacks(signed_in: Genmesh) -> None:
    result = signed_in("credits", "entries", "--since", "2026-11-21T00:00:00")
    assert "add Z or an offset, for example 2026-11-21T00:00:00Z" in result.stderr


def test_kinds_are_typed_as_they_are_shown() -> None:
    names = {kind: Entry.Kind.Name(kind) for kind in Entry.Kind.values() if kind}
    assert {entry_word(kind): f"KIND_{EntryKind(entry_word(kind)).name}" for kind in names} == {
        entry_word(kind): name for kind, name in names.items()
    }


def test_what_an_entry_is_for() -> None:
    assert purpose_text(capture()) == f"{JOB_ID}, sd-tiny, 20 steps"
    one = credits_pb2.ReceiptLine(description="x", quantity=1, unit="step", amount_millicredits=1)
    fee = credits_pb2.ReceiptLine(description="Fee", amount_millicredits=1)
    assert purpose_text(Entry(job_id="j", lines=[one, fee])) == "j, 1 step, Fee"
    assert purpose_text(grant(expire_time=stamp())) == f"trial, from credits that expire {time_text(stamp())}"
    assert purpose_text(Entry()) == ""


@pytest.mark.parametrize(("columns", "room"), [("100", False), ("200", True)])
def test_a_terminal_shows_the_receipt_where_there_is_room(signed_in: Genmesh, fake: FakeEdge, columns: str, room: bool) -> None:
    fake.entries = [capture()]
    shown = signed_in("credits", "entries", FORCE_COLOR="1", COLUMNS=columns).stdout
    assert ("sd-tiny, 20 steps" in shown) == room
    assert ("balance" in shown, JOB_ID[:8] in shown) == (True, True)
    assert rows(signed_in("credits", "entries"))[0][1:] == [
        *("capture", "reserved", "-0.02 credits", "0 credits", f"{JOB_ID}, sd-tiny, 20 steps")
    ]


# CSV


def test_the_export_has_every_entry_of_every_page(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.entries = [capture(entry_id) for entry_id in range(450, 0, -1)]
    fake.refusals.append(unavailable("restarting", 0.01))
    result = signed_in("credits", "export", "--kind", "capture")
    assert (result.exit_code, result.stderr) == (0, "")
    found = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [int(row["entry_id"]) for row in found] == list(range(450, 0, -1))
    assert {tuple(asked.kinds) for asked in fake.entries_asked} == {(Entry.KIND_CAPTURE,)}
    assert len(signed_in("credits", "export", "--limit", "201").stdout.splitlines()) == 202


def test_columns_of_the_export(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.entries = [capture(event_id=5), grant(reason='=HYPERLINK("http://x")', expire_time=stamp(WHEN, 5000), top_up_id=USER_ID)]
    head, first, second = csv.reader(io.StringIO(signed_in("credits", "export").stdout))
    assert ",".join(head) == (
        "entry_id,event_id,time,kind,account,amount_millicredits,balance_after_millicredits,job_id,model,lines,reason,expire_time,top_up_id"
    )
    assert [document["eventId"] for document in documents(signed_in("credits", "entries", "--json"))] == ["5", "0"]
    assert first == [
        *("7", "5", "2026-09-21T14:13:20.000000Z", "capture", "reserved", "-20", "0", JOB_ID, "sd-tiny"),
        *("Image 64x64: 20 steps, 20 millicredits", "", "", ""),
    ]
    assert second == [
        *("3", "0", "2026-09-21T14:13:20.000000Z", "plan-grant", "available", "10000", "10980", "", ""),
        *("", '\'=HYPERLINK("http://x")', "2026-09-21T14:13:20.000005Z", USER_ID),
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\n=1", "  =1", "\uff1d1", "\u00a0=1"])
def test_formulas_become_text(text: str) -> None:
    assert cell_text(text).startswith("'")
    assert re.match(r"[=+\-@\t\r]", cell_text(text)) is None


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_is_one_cell_of_one_line(reasons: list[str]) -> None:
    file = io.StringIO(newline="")
    assert write_csv(file, [grant(reason=reason, model=reason) for reason in reasons]) == len(reasons)
    lines = file.getvalue().split("\n")
    assert len(lines) == len(reasons) + 2
    found = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert [row["reason"] for row in found] == [cell_text(reason) for reason in reasons]
    assert all(list(row) == list(CSV_COLUMNS) and not re.match(r"[=+\-@\t\r\n]", row["model"]) for row in found)


def test_a_file_is_written_whole_or_not_at_all(signed_in: Genmesh, fake: FakeEdge, tmp_path: Path) -> None:
    fake.entries = [capture(entry_id) for entry_id in range(450, 0, -1)]
    out = tmp_path / "entries.csv"
    out.write_text("what was there")
    fake.refusals.append(permission_denied("not any more"))
    result = signed_in("credits", "export", "--out", str(out))
    assert result.exit_code == ExitCode.DENIED
    assert out.read_text() == "what was there"
    assert not list(tmp_path.glob(".*"))
    result = signed_in("credits", "export", "--out", str(out))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"saved {out}, 450 entries\n")
    assert out.read_text() == signed_in("credits", "export", "--out", "-").stdout
    assert len(out.read_text().splitlines()) == 451


def test_what_is_no_file_is_written_to_and_stays(signed_in: Genmesh, fake: FakeEdge, tmp_path: Path) -> None:
    fake.entries = [capture(entry_id) for entry_id in range(450, 0, -1)]
    written = signed_in("credits", "export").stdout
    fifo, link, target = tmp_path / "fifo", tmp_path / "link", tmp_path / "far" / "target"
    os.mkfifo(fifo)
    target.parent.mkdir()
    link.symlink_to(target)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()), daemon=True)
    reader.start()
    assert signed_in("credits", "export", "--out", str(fifo)).exit_code == 0
    reader.join(WAIT_S)
    assert read == [written]
    assert fifo.is_fifo()
    for _ in range(2):  # first it leads nowhere
        assert signed_in("credits", "export", "--out", str(link)).exit_code == 0
        assert (link.is_symlink(), target.read_text()) == (True, written)
    assert signed_in("credits", "export", "--out", os.devnull).exit_code == 0
    assert Path(os.devnull).is_char_device()
    assert sorted(path.name for path in target.parent.iterdir()) == ["target"]
    refused = signed_in("generate", "image", "x", "--out", str(fifo))
    assert (refused.exit_code, fake.created) == (ExitCode.USAGE, [])


def test_standard_output_is_never_replaced(signed_in: Genmesh, fake: FakeEdge, environment: dict[str, str | None], tmp_path: Path) -> None:
    fake.entries = [capture()]
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a") as output, spawned(environment, "credits", "export", "--out", "/dev/stdout", stdout=output) as process:
        assert process.wait(WAIT_S) == 0
    assert log.read_text() == f"before\n{signed_in('credits', 'export').stdout}"


@pytest.mark.parametrize("count", [5000, 1])
def test_a_closed_pipe_is_no_drama(signed_in: Genmesh, fake: FakeEdge, environment: dict[str, str | None], count: int) -> None:
    fake.entries = [capture(entry_id) for entry_id in range(count)]
    with spawned(environment, "credits", "export") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if count > 1:
            assert process.stdout.readline().startswith("entry_id,")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(WAIT_S) == ExitCode.FAILED


# The balance, live


def balance(version: int, available: int, reserved: int = 0, **fields: Any) -> credits_pb2.WatchBalanceResponse:
    return credits_pb2.WatchBalanceResponse(version=version, available_millicredits=available, reserved_millicredits=reserved, **fields)


def test_a_balance_is_a_line_a_change_through_every_interruption(signed_in: Genmesh, fake: FakeEdge) -> None:
    expired = unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired")

    def script() -> None:
        fake.balances.extend(
            [
                [balance(1, 1000), balance(1, 1000), balance(2, 980, 20), unavailable("draining", 0.01)],
                [unavailable("draining", 0.01)],
                [balance(2, 980, 20)],  # ends well: the server drains
                [expired],
                [balance(3, 980), permission_denied("no more of this")],
            ]
        )

    script()
    result = signed_in("credits", "watch")
    assert result.exit_code == ExitCode.DENIED
    assert [line.split("  ", 1)[1] for line in result.stdout.splitlines()] == [
        "1 credit",
        "0.98 credits, 0.02 credits held (-0.02 credits, +0.02 credits held)",
        "0.98 credits (-0.02 credits held)",
    ]
    assert result.stderr.splitlines()[:-2] == ["connection lost, reconnecting", "connected again"] * 2
    assert fake.balances_asked == 5
    script()
    assert [document["version"] for document in documents(signed_in("credits", "watch", "--json"))] == ["1", "2", "3"]


def test_a_change_of_nothing_but_promotions_is_a_line_too() -> None:
    before = balance(1, 1000)
    after = balance(2, 1000, promotional_millicredits=500, next_expire_time=stamp())
    assert change_line(after, before) == f"1 credit, 0.5 credits promotional, the first expire {time_text(stamp())}"
    assert change_line(balance(3, 0), after) == "0 credits (-1 credit)"


def test_ctrl_c_ends_the_watch_of_a_balance(signed_in: Genmesh, fake: FakeEdge, environment: dict[str, str | None]) -> None:
    with spawned(environment, "credits", "watch") as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    # On a busy machine the first attempts to connect may fail, which is told.
    assert (process.returncode, errors.splitlines()[-1]) == (ExitCode.INTERRUPTED, "interrupted")


def test_a_watch_that_is_stopped_while_it_is_opened_ends(signed_in: Genmesh, fake: FakeEdge) -> None:
    opened: list[Any] = []
    with Edge(fake.url, store=SessionMemory(), credentials=(EMAIL, PASSWORD)) as edge:

        def opening(request: credits_pb2.WatchBalanceRequest, **options: Any) -> Any:
            opened.append(edge.credits.WatchBalance(request, **options))
            edge.stop()
            return opened[-1]

        method: Any = opening
        for stream in (
            edge.stream(method, credits_pb2.WatchBalanceRequest),
            edge.read(method, credits_pb2.WatchBalanceRequest(), timeout_s=WAIT_S),
        ):
            edge._stopped = False  # pyright: ignore[reportPrivateUsage]  # as before the first Ctrl-C
            with pytest.raises(KeyboardInterrupt):
                list(stream)
    assert [call.code() for call in opened] == [grpc.StatusCode.CANCELLED] * 2


# Ceilings


def test_ceilings_are_shown_with_what_is_spent(signed_in: Genmesh, fake: FakeEdge) -> None:
    none = signed_in("credits", "ceilings")
    assert (none.exit_code, none.stdout, "no ceiling is set" in none.stderr) == (0, "", True)
    fake.ceilings = [
        credits_pb2.Ceiling(monthly_millicredits=50_000, spent_today_millicredits=1200, spent_this_month_millicredits=7000),
        credits_pb2.Ceiling(api_key_id=KEY_ID, daily_millicredits=0),
    ]
    assert rows(signed_in("credits", "ceilings")) == [
        ["account", "no bound", "1.2 credits", "50 credits", "7 credits"],
        [KEY_ID, "0 credits", "0 credits", "no bound", "0 credits"],
    ]
    assert [ceiling.get("apiKeyId") for ceiling in documents(signed_in("credits", "ceilings", "--json"))] == ["", KEY_ID]


@pytest.mark.parametrize(
    ("options", "daily", "monthly"),
    [
        (["--daily", "5", "--monthly", "0"], 5000, 0),
        (["--daily", "5"], 5000, 70_000),  # what is not named stays
        (["--monthly", "none"], 3000, None),
        (["--none"], None, None),
        (["--monthly", "none", "--daily", "none"], None, None),
    ],
)
@pytest.mark.parametrize("of", ["key", "user"])
def test_a_bound_that_is_not_named_stays(
    signed_in: Genmesh, fake: FakeEdge, of: str, options: list[str], daily: int | None, monthly: int | None
) -> None:
    mine = credits_pb2.Ceiling(daily_millicredits=3000, monthly_millicredits=70_000)
    other = credits_pb2.Ceiling(daily_millicredits=1)
    (mine if of == "key" else other).api_key_id = KEY_ID
    fake.ceilings = [other, mine]
    fake.account.ceilings.extend([other, mine])
    command = ["credits", "ceiling", KEY_ID.upper()] if of == "key" else ["admin", "ceiling", EMAIL]
    result = signed_in(*command, *options)
    assert result.exit_code == 0, result.output
    (asked,) = fake.key_ceilings + fake.user_ceilings
    assert asked.lift == (daily is None and monthly is None)
    assert asked.daily_millicredits == (daily or 0)
    assert asked.monthly_millicredits == (monthly or 0)
    assert (asked.HasField("daily_millicredits"), asked.HasField("monthly_millicredits")) == (daily is not None, monthly is not None)
    who = f"API key {KEY_ID}" if of == "key" else EMAIL
    assert result.stdout.startswith(f"{who}: {'no bound' if daily is None else f'at most {daily // 1000} credits'} a day (1.2 credits")


@pytest.mark.parametrize("of", ["key", "user"])
def test_the_last_bound_is_lifted(signed_in: Genmesh, fake: FakeEdge, of: str) -> None:
    mine = credits_pb2.Ceiling(daily_millicredits=3000, api_key_id=KEY_ID if of == "key" else "")
    fake.ceilings = [mine]
    fake.account.ceilings.append(mine)
    command = ["credits", "ceiling", KEY_ID] if of == "key" else ["admin", "ceiling", EMAIL]
    assert signed_in(*command, "--daily", "none").exit_code == 0
    (asked,) = fake.key_ceilings + fake.user_ceilings
    assert asked.lift


def ceiling_reached(retry_after_s: float | None = HOURS_S, *, ceiling: int = 10_000) -> MeshError:
    metadata = {
        "period": "day",
        "ceiling_millicredits": str(ceiling),
        "spent_millicredits": "9990",
        "required_millicredits": "20",
        "api_key_id": KEY_ID,
    }
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_CEILING_REACHED, "the ceiling is reached",
        metadata=metadata, retry_after_s=retry_after_s,
    )  # fmt: skip


def test_a_ceiling_that_is_reached_is_told_at_once(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.refusals.append(ceiling_reached())
    result = signed_in("generate", "image", "x", "--no-wait")
    assert (result.exit_code, len(fake.created)) == (ExitCode.CREDITS, 1)
    assert result.stderr.splitlines()[:2] == [
        f"error: the API key {KEY_ID} may spend 10 credits a day: 9.99 credits spent or held, 0.02 credits needed",
        "  - it starts anew in 5 h 0 min",
    ]
    assert "genmesh credits ceilings" in result.stderr


def test_nobody_is_told_to_wait_for_what_never_fits(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.refusals.append(ceiling_reached(ceiling=0))
    result = signed_in("generate", "image", "x", "--no-wait")
    assert (result.exit_code, len(fake.created)) == (ExitCode.CREDITS, 1)
    assert "may spend 0 credits a day" in result.stderr
    assert "anew" not in result.stderr
    assert "have it raised" in result.stderr


def test_a_shortage_is_told_in_credits(signed_in: Genmesh, fake: FakeEdge) -> None:
    metadata = {"required_millicredits": "2500", "available_millicredits": "980"}
    fake.refusals.append(
        precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "2500 millicredits are needed, 980 are available", metadata)
    )
    result = signed_in("generate", "image", "x", "--no-wait")
    assert result.exit_code == ExitCode.CREDITS
    assert result.stderr.splitlines() == [
        "error: 2.5 credits needed, 0.98 credits available",
        "next:  see `genmesh credits`; ask an administrator, or `genmesh credits top-up` where credits are sold",
    ]


@pytest.mark.parametrize("retry_after_s", [HOURS_S, None])
def test_nothing_waits_for_hours(fake: FakeEdge, retry_after_s: float | None) -> None:
    slept: list[float] = []
    assert not Backoff(120.0, sleep=slept.append).wait(HOURS_S)
    refusal = ceiling_reached(retry_after_s)
    fake.balances.append([balance(1, 1000), refusal])
    fake.refusals.append(refusal)
    with Edge(fake.url, store=SessionMemory(), credentials=(EMAIL, PASSWORD), sleep=slept.append) as edge:
        with pytest.raises(grpc.RpcError):
            list(edge.stream(edge.credits.WatchBalance, credits_pb2.WatchBalanceRequest))
        with pytest.raises(grpc.RpcError):
            edge.call(edge.ledger_admin.GrantCredits, credits_pb2.GrantCreditsRequest())
    assert not slept
    assert (fake.balances_asked, len(fake.granted)) == (1, 1)


# Prices and purchases


def purchase(state: "TopUp.State.ValueType", **fields: Any) -> payments_pb2.TopUp:
    return TopUp(
        top_up_id=USER_ID, state=state, package_id="credits-1000", amount_millicredits=1_000_000, price_minor=999, currency="USD",
        checkout_url="https://pay.example/c/1" if state == TopUp.STATE_PENDING else "", **fields,
    )  # fmt: skip


def test_prices_are_for_everybody(genmesh: Genmesh, fake: FakeEdge) -> None:
    fake.prices = payments_pb2.ListPricesResponse(
        plans=[
            payments_pb2.PlanPrice(
                plan=identity_pb2.PLAN_PRO, monthly_price_minor=4999, currency="USD", monthly_grant_millicredits=5_000_000
            )
        ],
        packages=[payments_pb2.CreditPackage(package_id="credits-1000", amount_millicredits=1_000_000, price_minor=1000, currency="JPY")],
    )
    result = genmesh("credits", "prices")
    assert result.exit_code == 0, result.output
    assert rows(result) == [
        ["plan", "pro", "5000 credits a month", "49.99 USD a month"],
        ["package", "credits-1000", "1000 credits", "1000 JPY"],
    ]
    assert "no payment provider" in result.stderr
    fake.prices.can_buy = True
    assert "genmesh credits top-up" in genmesh("credits", "prices").stderr
    assert documents(genmesh("credits", "prices", "--json"))[0]["canBuy"] is True


def test_the_address_to_pay_at_is_all_of_the_output(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.top_ups.append(purchase(TopUp.STATE_PENDING, expire_time=stamp()))
    result = signed_in("credits", "top-up", "credits-1000", "--request-id", REQUEST_ID)
    assert (result.exit_code, result.stdout) == (0, "https://pay.example/c/1\n")
    assert result.stderr == f"purchase {USER_ID}: 1000 credits for 9.99 USD; pay before {time_text(stamp())} at:\n"
    (asked,) = fake.top_ups_asked
    assert (asked.request_id, asked.package_id) == (REQUEST_ID, "credits-1000")
    fake.top_ups.append(purchase(TopUp.STATE_PAID))  # of a request that is run again
    again = signed_in("credits", "top-up", "credits-1000", "--request-id", REQUEST_ID)
    assert (again.exit_code, again.stdout) == (0, f"paid 9.99 USD, 1000 credits added (purchase {USER_ID})\n")
    fake.refusals.append(invalid("package_id", "there is no such package"))
    unknown = signed_in("credits", "top-up", "x")
    assert (unknown.exit_code, "see `genmesh credits prices`" in unknown.stderr) == (ExitCode.USAGE, True)


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        (TopUp.STATE_PAID, ExitCode.OK, "1000 credits added"),
        (TopUp.STATE_FAILED, ExitCode.FAILED, "the payment failed"),
        (TopUp.STATE_EXPIRED, ExitCode.FAILED, "not used in time"),
        (TopUp.STATE_REFUNDED, ExitCode.FAILED, "taken back"),
    ],
)
def test_waiting_ends_with_the_purchase(
    signed_in: Genmesh, fake: FakeEdge, monkeypatch: pytest.MonkeyPatch, state: "TopUp.State.ValueType", code: ExitCode, says: str
) -> None:
    monkeypatch.setattr("cli.commands.payments.TOP_UP_POLL_S", 0.01)
    pending = purchase(TopUp.STATE_PENDING)
    fake.top_ups.extend([pending, pending, purchase(state)])
    result = signed_in("credits", "top-up", "credits-1000", "--wait")
    assert result.exit_code == code, result.output
    assert says in (result.stdout if code == ExitCode.OK else result.stderr)
    fake.top_ups.extendleft([pending])
    result = signed_in("credits", "top-up", "credits-1000", "--wait", "--json")
    assert (result.exit_code, [document["state"] for document in documents(result)]) == (
        code,
        ["STATE_PENDING", TopUp.State.Name(state)],
    )


def test_waiting_is_bounded(signed_in: Genmesh, fake: FakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.commands.payments.TOP_UP_WAIT_MIN", 0)
    fake.top_ups.append(purchase(TopUp.STATE_PENDING))
    result = signed_in("credits", "top-up", "credits-1000", "--wait")
    assert result.exit_code == ExitCode.FAILED
    assert "genmesh credits top-ups" in result.stderr


def test_ctrl_c_leaves_the_checkout_open(signed_in: Genmesh, fake: FakeEdge, environment: dict[str, str | None]) -> None:
    fake.top_ups.extend([purchase(TopUp.STATE_PENDING)] * 2)
    with spawned(environment, "credits", "top-up", "credits-1000", "--wait") as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "the checkout stays open" in errors


def test_purchases_are_listed(signed_in: Genmesh, fake: FakeEdge) -> None:
    refunded = purchase(TopUp.STATE_REFUNDED, pay_time=stamp(), refunded_millicredits=400_000, uncollected_millicredits=600_000)
    fake.top_ups.extend([purchase(TopUp.STATE_PENDING), refunded])
    listed = signed_in("credits", "top-ups")
    assert [row[1:] for row in rows(listed)] == [
        ["credits-1000", "1000 credits", "9.99 USD", "pending", "", "", "", USER_ID],
        ["credits-1000", "1000 credits", "9.99 USD", "refunded", time_text(stamp()), "400 credits", "600 credits", USER_ID],
    ]
    assert listed.stderr == f"pay for {USER_ID} at https://pay.example/c/1\n"
    assert documents(signed_in("credits", "top-ups", "--json"))[0]["checkoutUrl"] == "https://pay.example/c/1"


@pytest.mark.parametrize(
    "arguments",
    [
        ["credits", "top-up", "credits-1000"],
        ["admin", "grant", USER_ID, "1", "--reason", "x"],
        ["admin", "clawback", USER_ID, "1", "--reason", "x"],
    ],
)
def test_when_nobody_knows_whether_it_was_done_the_id_is_told(signed_in: Genmesh, fake: FakeEdge, arguments: list[str]) -> None:
    fake.refusals.append(unavailable("away", HOURS_S))
    result = signed_in(*arguments)
    assert result.exit_code == ExitCode.UNAVAILABLE
    (asked,) = fake.top_ups_asked + fake.granted + fake.clawed_back
    assert f"run it again with `--request-id {asked.request_id}`" in result.stderr
    fake.refusals.append(MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED, "used before"))
    refused = signed_in(*arguments, "--request-id", asked.request_id)
    assert refused.exit_code == ExitCode.FAILED
    assert "without --request-id" in refused.stderr


# What administrators do with credits


def test_promotional_credits_are_granted(signed_in: Genmesh, fake: FakeEdge) -> None:
    result = signed_in("admin", "grant", EMAIL, "2.5", "--reason", "trial", "--expires", "2999-01-01")
    assert result.exit_code == 0, result.output
    (asked,) = fake.granted
    assert asked.expire_time.ToJsonString() == "2999-01-01T00:00:00Z"
    assert f"granted 2.5 credits until {time_text(asked.expire_time)}; {EMAIL} now has" in result.stdout
    for bad in (["--expires", "soon"], ["--reason", " \t "], ["--request-id", ""], ["--request-id", "1"]):
        assert signed_in("admin", "grant", EMAIL, "1", "--reason", "x", *bad).exit_code == ExitCode.USAGE
        if bad[0] != "--expires":
            assert signed_in("admin", "clawback", EMAIL, "1", "--reason", "x", *bad).exit_code == ExitCode.USAGE
    assert not fake.clawed_back
    assert signed_in("admin", "grant", EMAIL, "1", "--reason", "x").exit_code == 0
    assert not fake.granted[1].HasField("expire_time")
    assert len(fake.granted) == 2
    # The server knows whether it is a repeat of what was in time.
    assert signed_in("admin", "grant", EMAIL, "1", "--reason", "x", "--expires", "2020-01-01").exit_code == 0
    assert fake.granted[2].expire_time.ToJsonString() == "2020-01-01T00:00:00Z"


def test_entries_of_others_say_who_made_them(signed_in: Genmesh, fake: FakeEdge) -> None:
    fake.entries = [capture(450 - number, actor_id="" if number else KEY_ID, event_id=9) for number in range(450)]
    result = signed_in(
        *("admin", "entries", EMAIL, "--job", JOB_ID, "--kind", "capture", "--since", "2026-07-01", "--until", "2026-07-02"),
        *("--limit", "201"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    shown = rows(result)
    assert len(shown) == 201
    assert shown[0][1:] == ["capture", "reserved", "-0.02 credits", "0 credits", KEY_ID, f"{JOB_ID}, sd-tiny, 20 steps"]
    assert shown[1][5] == ""
    assert [asked.page_token for asked in fake.account_entries_asked] == ["", "200"]
    for asked in fake.account_entries_asked:
        assert (asked.user_id, asked.job_id, list(asked.kinds)) == (USER_ID, JOB_ID, [Entry.KIND_CAPTURE])
        assert (asked.start_time.ToJsonString(), asked.end_time.ToJsonString()) == ("2026-07-01T00:00:00Z", "2026-07-02T00:00:00Z")
    (document,) = documents(signed_in("admin", "entries", USER_ID, "--json", "--limit", "1"))
    assert (document["actorId"], document["eventId"]) == (KEY_ID, "9")
    assert not fake.entries_asked
    assert signed_in("admin", "entries", "nobody@example.com").exit_code == ExitCode.NOT_FOUND


def test_credits_are_clawed_back(signed_in: Genmesh, fake: FakeEdge) -> None:
    result = signed_in("admin", "clawback", EMAIL, "2.5", "--reason", "a mistake")
    assert (result.exit_code, result.stdout) == (0, f"took back 2.5 credits; {EMAIL} now has 1 credit\n")
    assert [(one.user_id, one.amount_millicredits, one.reason) for one in fake.clawed_back] == [(USER_ID, 2500, "a mistake")]
    fake.refusals.append(precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "2500 asked for, 0 there"))
    refused = signed_in("admin", "clawback", USER_ID, "2.5", "--reason", "x")
    assert refused.exit_code == ExitCode.CREDITS
    assert f"genmesh admin account {USER_ID}" in refused.stderr


def test_an_account_is_shown_with_promotions_and_ceilings(signed_in: Genmesh, fake: FakeEdge) -> None:
    assert signed_in("admin", "account", EMAIL).stdout.splitlines() == [f"user id    {USER_ID}", "available  0 credits"]
    fake.account = credits_pb2.GetAccountResponse(
        available_millicredits=12_000,
        reserved_millicredits=500,
        promotional_millicredits=2000,
        promotions=[credits_pb2.PromotionalCredits(available_millicredits=2000, reserved_millicredits=500, expire_time=stamp())],
        ceilings=[credits_pb2.Ceiling(daily_millicredits=1000)],
    )
    shown = signed_in("admin", "account", EMAIL).stdout
    for text in ("12 credits", "of that promotional  2 credits", f"{time_text(stamp())}\t2 credits\t0.5 credits", "account\t1 credit"):
        assert text in shown
    assert documents(signed_in("admin", "account", EMAIL, "--json"))[0]["availableMillicredits"] == "12000"


def test_plans_are_set(signed_in: Genmesh, fake: FakeEdge) -> None:
    result = signed_in("admin", "plan", EMAIL, "PRO")
    assert (result.exit_code, result.stdout) == (0, f"{EMAIL} is on the plan pro\n")
    assert [(asked.user_id, asked.plan) for asked in fake.updated] == [(USER_ID, identity_pb2.PLAN_PRO)]
    assert signed_in("admin", "plan", EMAIL, "gold").exit_code == ExitCode.USAGE
    unknown = signed_in("admin", "plan", KEY_ID, "free")
    assert unknown.exit_code == ExitCode.NOT_FOUND
    assert "genmesh admin users" in unknown.stderr


# The audit

BEGUN = credits_pb2.AuditLedgerResponse()
FINDING = credits_pb2.AuditLedgerResponse(
    discrepancy=credits_pb2.Discrepancy(problem="balance\x1b differs", subject=USER_ID, expected="20", actual="25")
)


def summary(*totals: str, discrepancies: int = 0) -> credits_pb2.AuditLedgerResponse:
    accounts = ("available", "reserved", "grants")
    return credits_pb2.AuditLedgerResponse(
        summary=credits_pb2.AuditSummary(
            discrepancy_count=discrepancies,
            account_count=2,
            event_count=3,
            entry_count=6,
            reservation_count=1,
            totals=[
                credits_pb2.AccountTotal(account=account, amount_millicredits=total)
                for account, total in zip(accounts, totals, strict=False)
            ],
        )
    )


def test_a_ledger_that_adds_up(signed_in: Genmesh, fake: FakeEdge) -> None:
    huge = 10**25
    fake.audits.append([BEGUN, summary("980", str(huge), str(-huge - 980))])
    result = signed_in("admin", "ledger", "audit")
    assert result.exit_code == 0, result.output
    assert result.stderr == "the ledger adds up\n"
    assert result.stdout.splitlines() == [
        *("accounts       2", "events         3", "entries        6", "reservations   1", "discrepancies  0", ""),
        "available\t0.98 credits",
        "reserved\t10000000000000000000000 credits",
        "grants\t-10000000000000000000000.98 credits",
        "all\t0 credits",
    ]


@pytest.mark.parametrize(
    ("script", "code", "says", "printed"),
    [
        ([BEGUN, FINDING, FINDING, summary("5", "-5", discrepancies=2)], ExitCode.DISCREPANCY, "2 discrepancies", 2),
        ([BEGUN, summary("5", "-5", discrepancies=1)], ExitCode.DISCREPANCY, "1 discrepancy", 0),
        ([BEGUN, FINDING, summary("5", "-5")], ExitCode.DISCREPANCY, "1 discrepancy", 1),
        ([BEGUN, summary("5", "-6")], ExitCode.DISCREPANCY, "-0.001 credits and not to zero", 0),
        ([BEGUN], ExitCode.UNAVAILABLE, "the rest is not known", 0),
        ([BEGUN, unavailable("draining", 0.01)], ExitCode.UNAVAILABLE, "draining", 0),
        ([BEGUN, FINDING], ExitCode.DISCREPANCY, "cut off after 1 discrepancy", 1),
        ([BEGUN, FINDING, unavailable("draining", 0.01)], ExitCode.DISCREPANCY, "(draining)", 1),
        ([permission_denied("only administrators")], ExitCode.DENIED, "only administrators", 0),
        ([], ExitCode.UNAVAILABLE, "the rest is not known", 0),
    ],
)
def test_a_ledger_that_does_not_add_up(
    signed_in: Genmesh,
    fake: FakeEdge,
    script: list[credits_pb2.AuditLedgerResponse | MeshError],
    code: ExitCode,
    says: str,
    printed: int,
) -> None:
    fake.audits.extend([script, script])
    result = signed_in("admin", "ledger", "audit")
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "adds up" not in result.stderr
    found = [row for row in rows(result) if len(row) == 4]
    assert found == [["balance\ufffd differs", USER_ID, "20 millicredits", "25 millicredits"]] * printed
    assert ("docs/operations.md" in result.stderr) == (code == ExitCode.DISCREPANCY and "cut off" not in says and "draining" not in says)
    assert fake.audits_asked == 1, "what has begun is not begun again"
    as_json = signed_in("admin", "ledger", "audit", "--json")
    assert as_json.exit_code == code
    assert [next(iter(document)) for document in documents(as_json)].count("discrepancy") == printed


def test_an_audit_that_could_not_begin_is_tried_again(signed_in: Genmesh, fake: FakeEdge) -> None:
    expired = unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired")
    fake.audits.extend([[unavailable("restarting", 0.01)], [expired], [BEGUN, summary()]])
    assert signed_in("admin", "ledger", "audit").exit_code == 0
    assert (fake.audits_asked, fake.refreshes) == (3, 1)


def test_ctrl_c_ends_the_audit(signed_in: Genmesh, fake: FakeEdge, environment: dict[str, str | None]) -> None:
    with spawned(environment, "admin", "ledger", "audit") as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, output, errors) == (ExitCode.INTERRUPTED, "", "interrupted\n")
