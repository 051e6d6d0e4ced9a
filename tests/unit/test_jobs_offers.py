"""How long a job takes: the forecast that estimates and events of places are made of."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs_service.lifecycle import Priority
from jobs_service.offers import FIRST_GUESS, OTHER_LEVEL_SHARE, Forecast, Offers, forecast
from jobs_service.store import Pace

STEP = Pace(0.5, 1.0)
JOB = Pace(10.0, 20.0)
seconds = st.floats(0.001, 1000)


@pytest.mark.parametrize(
    ("ahead", "slots", "expected"),
    [
        (0, 1, Forecast(5, 10)),  # its own ten steps, and nothing else
        (3, 1, Forecast(35, 70)),
        (3, 2, Forecast(20, 40)),  # two slots take turns
        (0.5, 1, Forecast(10, 20)),  # what runs is half done
        (3, 0, Forecast(35, 70)),  # nobody works: as if one worker came back now
    ],
)
def test_a_job_takes_its_own_steps_after_the_rounds_before_it(ahead: float, slots: int, expected: Forecast):
    assert forecast(steps=10, step=STEP, ahead=ahead, job=JOB, slots=slots) == expected


@given(steps=st.integers(1, 8_000), ahead=st.integers(0, 10_000), slots=st.integers(0, 64), paces=st.lists(seconds, min_size=4, max_size=4))
def test_more_before_it_is_never_sooner_and_more_slots_are_never_later(steps: int, ahead: int, slots: int, paces: list[float]):
    step, job = (Pace(*sorted(pair)) for pair in (paces[:2], paces[2:]))

    def guess(ahead: int, slots: int) -> Forecast:
        return forecast(steps=steps, step=step, ahead=ahead, job=job, slots=slots)

    now = guess(ahead, slots)
    assert 0 < now.p50_s <= now.p90_s
    for later, sooner in ((guess(ahead + 1, slots), now), (now, guess(ahead, slots + 1))):
        assert later.p50_s >= sooner.p50_s
        assert later.p90_s >= sooner.p90_s


@pytest.fixture
def unread() -> Offers:
    """Nothing was read from the store."""
    return Offers(cast(Any, None))


def test_with_nothing_to_learn_from_there_is_a_guess(unread: Offers):
    def guess(place: int) -> Forecast:
        return unread.forecast(model_id="small", pool="pictures", priority=Priority.FREE, steps=10, place=place)

    own = Forecast(10 * FIRST_GUESS.p50_s, 10 * FIRST_GUESS.p90_s)
    assert guess(1) == own
    assert guess(3) == Forecast(3 * own.p50_s, 3 * own.p90_s)  # the two before it are taken for jobs like it


def test_a_model_nobody_offered_is_away(unread: Offers):
    assert unread.away("small")


def test_levels_share_as_the_queue_shares_them():
    assert set(OTHER_LEVEL_SHARE) == set(Priority)
    assert OTHER_LEVEL_SHARE[Priority.PRO] * OTHER_LEVEL_SHARE[Priority.FREE] == pytest.approx(1)
