from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from carnet.cache import CacheSettings, Failure, Fetch, Held, Issued, Join, Ready, TokenCache, TokenKey
from carnet.errors import BrokerUnavailableError, ConfigError, RequestDeniedError
from carnet.token import Token

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
KEY = TokenKey.of("thumb", "payments", (), None)
OTHER = TokenKey.of("thumb", "ledger", (), None)
THIRD = TokenKey.of("thumb", "stock", (), None)
DOWN = Failure("no broker answered")
DENIED = Failure("refused", reason="NOT_GRANTED")


class FixedRandom(random.Random):
    """A source of chance that always gives the same point of the range: 0 is its start, 1 its end."""

    def __init__(self, point: float) -> None:
        super().__init__()
        self._point = point

    def uniform(self, a: float, b: float) -> float:
        """The fixed point between `a` and `b`."""
        return a + (b - a) * self._point


def at(seconds: float) -> dict[str, object]:
    """Both clocks `seconds` after the start, in step."""
    return {"mono": seconds, "now": NOW + timedelta(seconds=seconds)}


def issued(sent: float = 0.0, *, life: float = 100.0, refresh_in: float = 50.0, value: str = "t") -> Issued:
    """The broker's answer to a request sent at `sent`."""
    token = Token(value, "payments", ("charge",), NOW + timedelta(seconds=sent + life), "thumb")
    return Issued(token, timedelta(seconds=life), timedelta(seconds=refresh_in))


def cache_of(*, point: float = 1.0, **settings: object) -> TokenCache:
    """An empty cache whose chance always falls on `point`."""
    return TokenCache(CacheSettings(**settings), FixedRandom(point))


def holding(answer: Issued, *, sent: float = 0.0, point: float = 1.0, **settings: object) -> TokenCache:
    """A cache that asked at `sent` and got `answer`."""
    cache = cache_of(point=point, **settings)
    assert cache.begin(KEY, mono=sent)
    cache.succeed(KEY, answer, sent=sent)
    return cache


def test_missing_token_is_to_be_fetched() -> None:
    """Where nothing is known, the caller fetches."""
    assert Fetch() == cache_of().ask(KEY, **at(0))


def test_second_caller_joins_the_request_in_flight() -> None:
    """While one request is in flight no second one starts: callers without a token join it."""
    cache = cache_of()
    assert cache.begin(KEY, mono=0)
    assert Join() == cache.ask(KEY, **at(1))
    assert not cache.begin(KEY, mono=1)


def test_fresh_token_is_ready_and_not_due() -> None:
    """A token in the first part of its life is given out, and nothing is to be done."""
    answer = issued()
    cache = holding(answer)
    assert Ready(answer.token, due=False) == cache.ask(KEY, **at(69.9))
    assert [] == cache.due(mono=69.9)


@pytest.mark.parametrize(
    ("refresh_in", "point", "refresh_at"),
    [
        (50, 0.0, 50),
        (50, 0.5, 60),
        (50, 1.0, 70),
        (55, 0.0, 55),
        (60, 0.0, 60),
        (90, 0.0, 60),
        (90, 1.0, 70),
        (10, 0.0, 50),
        (0, 0.0, 50),
    ],
)
def test_refresh_is_due_between_50_and_70_percent_of_life(refresh_in: float, point: float, refresh_at: float) -> None:
    """The broker's refresh_in moves the start of the window between 50 and 60 %; its end is at 70 %."""
    cache = holding(issued(refresh_in=refresh_in), point=point)
    assert refresh_at == cache.next_due(mono=0)
    assert [] == cache.due(mono=refresh_at - 0.001)
    assert [KEY] == cache.due(mono=refresh_at)


@pytest.mark.parametrize(("seconds", "is_fresh"), [(0, True), (69.9, True), (70, False), (100, False)])
def test_short_way_gives_fresh_tokens_only(seconds: float, is_fresh: bool) -> None:
    """`fresh` answers until the refresh is due; from then on `ask` says what is to be done."""
    answer = issued()
    expected = answer.token if is_fresh else None
    assert expected is holding(answer).fresh(KEY, **at(seconds))


def test_short_way_checks_the_wall_clock() -> None:
    """A token that is over by the wall clock alone is not fresh."""
    assert holding(issued()).fresh(KEY, mono=1, now=NOW + timedelta(seconds=100)) is None


def test_short_way_knows_no_token_that_is_not_there() -> None:
    """Without an entry there is nothing to give."""
    assert cache_of().fresh(KEY, **at(0)) is None


def test_short_way_counts_as_use() -> None:
    """What was taken the short way is not idle."""
    cache = holding(issued())
    assert cache.fresh(KEY, **at(60)) is not None
    assert [KEY] == cache.due(mono=140)


def test_stale_token_is_ready_and_due() -> None:
    """In the refresh window the token is given out without waiting, and the caller is told that a refresh is due."""
    answer = issued()
    assert Ready(answer.token, due=True) == holding(answer).ask(KEY, **at(70))


def test_stale_token_is_not_due_twice() -> None:
    """While its refresh is in flight a token is given out as before, and nobody is told to start another."""
    answer = issued()
    cache = holding(answer)
    assert cache.begin(KEY, mono=70)
    assert Ready(answer.token, due=False) == cache.ask(KEY, **at(71))
    assert [] == cache.due(mono=71)
    assert cache.next_due(mono=71) is None


def test_refreshed_token_replaces_the_old_one() -> None:
    """After a refresh the new token is given out."""
    cache = holding(issued())
    assert cache.begin(KEY, mono=70)
    new = issued(70, value="new")
    cache.succeed(KEY, new, sent=70)
    assert Ready(new.token, due=False) == cache.ask(KEY, **at(100))


@pytest.mark.parametrize(("seconds", "answer"), [(99.999, Ready), (100.0, Fetch), (100.001, Fetch)])
def test_token_is_over_at_its_end_by_the_monotonic_clock(seconds: float, answer: type) -> None:
    """The life counts from the sending of the request; at its very end the token is over, whatever the wall says."""
    assert answer is type(holding(issued()).ask(KEY, mono=seconds, now=NOW))


@pytest.mark.parametrize(("seconds", "answer"), [(99.999, Ready), (100.0, Fetch), (100.001, Fetch)])
def test_token_is_over_at_its_end_by_the_wall_clock(seconds: float, answer: type) -> None:
    """After a sleep the monotonic clock lags: the wall clock alone ends a token too."""
    assert answer is type(holding(issued()).ask(KEY, mono=1, now=NOW + timedelta(seconds=seconds)))


def test_wall_clock_set_back_does_not_prolong_a_token() -> None:
    """A wall clock an hour behind leaves the monotonic end in force."""
    assert Fetch() == holding(issued()).ask(KEY, mono=100, now=NOW - timedelta(hours=1))


def test_refresh_is_never_sooner_than_the_interval_after_the_last_request() -> None:
    """A token of 12 s would be due at 6 s; with the default interval it is at 10 s."""
    assert 10 == holding(issued(life=12, refresh_in=6), point=0.0).next_due(mono=0)


def test_token_that_ended_before_the_interval_is_fetched_at_once() -> None:
    """The interval is between refreshes; a caller with nothing valid does not wait for it."""
    assert Fetch() == holding(issued(life=5)).ask(KEY, **at(5))


def test_failed_refresh_keeps_the_valid_token() -> None:
    """A failure never takes a valid token away, and the next try is not before the interval."""
    answer = issued()
    cache = holding(answer)
    assert cache.begin(KEY, mono=70)
    cache.fail(KEY, DOWN, **at(73))
    assert Ready(answer.token, due=False) == cache.ask(KEY, **at(79.9))
    assert 80 == cache.next_due(mono=73)
    assert Ready(answer.token, due=True) == cache.ask(KEY, **at(80))
    assert [KEY] == cache.due(mono=80)


def test_failures_are_followed_by_growing_pauses_up_to_the_limit() -> None:
    """The longest pause doubles with each failure in a row, up to max_backoff; in the pause callers hear why."""
    cache = cache_of(point=1.0, first_backoff=timedelta(seconds=1), max_backoff=timedelta(seconds=5))
    mono, pauses = 0.0, []
    for _ in range(5):
        assert Fetch() == cache.ask(KEY, **at(mono))
        assert cache.begin(KEY, mono=mono)
        cache.fail(KEY, DOWN, **at(mono))
        held = cache.ask(KEY, **at(mono))
        assert isinstance(held, Held)
        assert DOWN == held.failure
        pauses.append(held.until - mono)
        mono = held.until
    assert [1, 2, 4, 5, 5] == pauses


def test_pause_is_drawn_from_zero_on() -> None:
    """Full jitter: the shortest pause after a failure is none, so that clients do not come back together."""
    cache = cache_of(point=0.0)
    cache.begin(KEY, mono=0)
    cache.fail(KEY, DOWN, **at(0))
    assert Fetch() == cache.ask(KEY, **at(0))


def test_success_ends_the_growth_of_pauses() -> None:
    """After a success the next failure is a first one again."""
    cache = cache_of(point=1.0, first_backoff=timedelta(seconds=1))
    for _ in range(3):
        cache.begin(KEY, mono=0)
        cache.fail(KEY, DOWN, **at(0))
    cache.begin(KEY, mono=10)
    cache.succeed(KEY, issued(10), sent=10)
    cache.begin(KEY, mono=110)
    cache.fail(KEY, DOWN, **at(110))
    assert Held(DOWN, 111) == cache.ask(KEY, **at(110))


@pytest.mark.parametrize(("retry_after", "pause"), [(4, 4), (3600, 300), (0.1, 0.5)])
def test_broker_may_ask_for_a_longer_pause(retry_after: float, pause: float) -> None:
    """RetryInfo makes the pause longer, never shorter, and at most five minutes (before jitter)."""
    cache = TokenCache(CacheSettings(), SplitRandom())
    cache.begin(KEY, mono=0)
    failure = replace(DOWN, retry_after=timedelta(seconds=retry_after))
    cache.fail(KEY, failure, **at(0))
    assert Held(failure, pause) == cache.ask(KEY, **at(0))


class SplitRandom(random.Random):
    """Chance that gives the longest backoff, and the shortest jitter on top of what the broker asked for."""

    def uniform(self, a: float, b: float) -> float:
        """`a` for the jitter, which starts at 1, else `b`."""
        return a if a == 1.0 else b


def test_refusal_without_a_token_is_remembered_for_the_interval() -> None:
    """A service that asks at each of its calls does not pass every one of them on to a broker that said no."""
    cache = cache_of()
    cache.begin(KEY, mono=0)
    cache.fail(KEY, DENIED, **at(0))
    assert Held(DENIED, 10) == cache.ask(KEY, **at(9.9))
    assert Fetch() == cache.ask(KEY, **at(10))
    assert [] == cache.due(mono=10)


def test_refused_refresh_keeps_the_valid_token_and_asks_seldom() -> None:
    """The token stays good to its end (its verifiers still take it); the broker is asked again after max_backoff."""
    answer = issued()
    cache = holding(answer, max_backoff=timedelta(seconds=20))
    cache.begin(KEY, mono=70)
    cache.fail(KEY, DENIED, **at(70))
    assert Ready(answer.token, due=False) == cache.ask(KEY, **at(89.9))
    assert 90 == cache.next_due(mono=70)
    assert [KEY] == cache.due(mono=90)


def test_refused_token_that_ended_is_asked_for_by_callers_only() -> None:
    """Once a refused token is over, nothing is asked in the background; a caller's question goes through."""
    cache = holding(issued())
    cache.begin(KEY, mono=75)
    cache.fail(KEY, DENIED, **at(75))
    assert Held(DENIED, 105) == cache.ask(KEY, **at(100))
    assert [] == cache.due(mono=105)
    assert 200 == cache.next_due(mono=105)
    assert Fetch() == cache.ask(KEY, **at(105))


def test_token_that_ended_in_an_outage_is_refreshed_in_the_background() -> None:
    """A key that is in use goes on being tried after its token ended, so that recovery waits for no caller."""
    cache = holding(issued())
    cache.begin(KEY, mono=99)
    cache.ask(KEY, **at(99))
    cache.fail(KEY, DOWN, **at(101))
    assert 101.5 == cache.next_due(mono=101)
    assert [KEY] == cache.due(mono=101.5)


def test_token_unused_for_a_whole_life_is_not_refreshed() -> None:
    """Idle keys stop costing the broker: no refresh once a whole life passed without a caller."""
    cache = holding(issued())
    cache.begin(KEY, mono=70)
    cache.succeed(KEY, issued(70, value="second"), sent=70)
    assert [] == cache.due(mono=140)
    assert 170 == cache.next_due(mono=140)


def test_idle_token_is_given_out_to_its_end_and_wakes_up() -> None:
    """A caller that comes back finds the idle token as long as it is valid, and its refresh is due again."""
    cache = holding(issued())
    cache.begin(KEY, mono=70)
    second = issued(70, value="second")
    cache.succeed(KEY, second, sent=70)
    assert Ready(second.token, due=True) == cache.ask(KEY, **at(165))
    assert [KEY] == cache.due(mono=165)


def test_idle_token_goes_at_its_end() -> None:
    """When an idle token is over, its entry goes, and nothing is left to wait for."""
    cache = holding(issued())
    assert [] == cache.due(mono=100)
    assert 0 == len(cache)
    assert cache.next_due(mono=100) is None


def test_request_in_flight_keeps_its_entry() -> None:
    """An entry is not dropped while its request is in flight, however long that takes."""
    cache = holding(issued())
    cache.begin(KEY, mono=100)
    assert [] == cache.due(mono=1000)
    cache.succeed(KEY, issued(1000), sent=1000)
    assert 1 == len(cache)


def test_failed_key_is_forgotten_after_the_longest_backoff() -> None:
    """Keys that never had a token leave nothing behind for ever."""
    cache = cache_of()
    cache.begin(KEY, mono=0)
    cache.fail(KEY, DOWN, **at(0))
    assert cache.next_due(mono=0) is None
    assert [] == cache.due(mono=29.9)
    assert 1 == len(cache)
    assert [] == cache.due(mono=30)
    assert 0 == len(cache)


def test_next_due_is_the_earliest_and_not_in_the_past() -> None:
    """Of several keys the first to be due counts; what is overdue is due now."""
    cache = holding(issued())
    cache.begin(OTHER, mono=0)
    cache.succeed(OTHER, issued(life=60, refresh_in=30), sent=0)
    assert 42 == cache.next_due(mono=0)
    assert 50 == cache.next_due(mono=50)


def test_key_that_was_unused_longest_goes_when_the_cache_is_full() -> None:
    """The number of entries is bounded: a new one takes the place of the least recently used."""
    cache = cache_of(max_entries=2)
    for key in (KEY, OTHER):
        cache.begin(key, mono=0)
        cache.succeed(key, issued(), sent=0)
    cache.ask(KEY, **at(1))
    assert Fetch() == cache.ask(THIRD, **at(2))
    assert cache.begin(THIRD, mono=2)
    assert 2 == len(cache)
    assert isinstance(cache.ask(KEY, **at(3)), Ready)
    assert Fetch() == cache.ask(OTHER, **at(3))


def test_request_in_flight_is_never_evicted() -> None:
    """With a request in flight for every entry a new key has to wait: the number of requests is bounded as well."""
    cache = cache_of(max_entries=1)
    cache.begin(KEY, mono=0)
    held = cache.ask(OTHER, **at(0))
    assert isinstance(held, Held)
    assert (None, 0.5) == (held.failure.reason, held.until)
    assert not cache.begin(OTHER, mono=0)
    cache.fail(KEY, DOWN, **at(1))
    assert cache.begin(OTHER, mono=1)


def test_identities_with_entries_are_known() -> None:
    """The keys say which identities are still needed."""
    cache = holding(issued())
    cache.begin(TokenKey.of("renewed", "payments", (), None), mono=0)
    assert {"thumb", "renewed"} == cache.thumbprints()


def test_copy_for_a_child_has_the_tokens_and_nothing_in_flight() -> None:
    """After a fork the tokens are as good as before; the parent's requests are not the child's to wait for."""
    answer = issued()
    cache = holding(answer)
    cache.begin(KEY, mono=70)
    copy = cache.copy_idle(FixedRandom(0.0))
    assert Ready(answer.token, due=True) == copy.ask(KEY, **at(70))
    assert copy.begin(KEY, mono=70)
    copy.succeed(KEY, issued(70, value="child"), sent=70)
    assert Ready(answer.token, due=False) == cache.ask(KEY, **at(70))


def test_order_and_repetition_of_scopes_make_no_other_key() -> None:
    """The same scopes are the same request."""
    one = TokenKey.of("t", "a", ["refund", "charge", "refund"], None)
    assert one == TokenKey.of("t", "a", ("charge", "refund"), None)
    assert ("charge", "refund") == one.scopes


@pytest.mark.parametrize(
    "other",
    [
        TokenKey.of("u", "a", ("s",), None),
        TokenKey.of("t", "b", ("s",), None),
        TokenKey.of("t", "a", (), None),
        TokenKey.of("t", "a", ("s",), timedelta(seconds=60)),
    ],
)
def test_each_part_of_a_key_makes_another_key(other: TokenKey) -> None:
    """Another certificate, audience, scope or life is another token."""
    assert TokenKey.of("t", "a", ("s",), None) != other


def test_failure_makes_a_new_error_for_each_caller() -> None:
    """Callers never share an exception, whose traceback would grow and mix threads."""
    denied, down = DENIED.error(), DOWN.error()
    assert isinstance(denied, RequestDeniedError)
    assert ("refused", "NOT_GRANTED") == (str(denied), denied.reason)
    assert isinstance(down, BrokerUnavailableError)
    assert denied is not DENIED.error()


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_interval": timedelta(seconds=-1)},
        {"first_backoff": timedelta(0)},
        {"first_backoff": timedelta(seconds=31)},
        {"max_entries": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    """Negative or zero times, backoffs in the wrong order and an empty cache are configuration errors."""
    with pytest.raises(ConfigError):
        CacheSettings(**wrong)


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_token_is_never_shown(show: object) -> None:
    """No way of printing a token prints what could be replayed."""
    assert "secret" not in show(Token("secret", "payments", (), NOW, "thumb"))
