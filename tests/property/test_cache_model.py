"""The token cache against a model that knows only what must hold, under any order of events and any clock."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from carnet.cache import CacheSettings, Failure, Fetch, Held, Issued, Join, Ready, TokenCache, TokenKey
from carnet.token import Token

START = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
KEYS = [TokenKey.of("thumb", audience, (), None) for audience in ("payments", "ledger", "stock")]
SETTINGS = CacheSettings()
MIN_INTERVAL = SETTINGS.min_interval.total_seconds()

keys = st.sampled_from(KEYS)


class CacheModel(RuleBasedStateMachine):
    """Drives the cache as its callers may; keeps for each key the token that is there and the request in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = TokenCache(SETTINGS, random.Random(0))  # noqa: S311 - jitter
        self.mono = 0.0
        self.wall = START
        self.tokens: dict[TokenKey, tuple[Token, float]] = {}
        self.in_flight: dict[TokenKey, tuple[float, datetime]] = {}
        self.begun: dict[TokenKey, float] = {}
        self.serial = 0

    def is_valid(self, key: TokenKey) -> bool:
        """Whether the model holds a token for `key` that is good by both clocks."""
        if key not in self.tokens:
            return False
        token, ends = self.tokens[key]
        return self.mono < ends and self.wall < token.expires_at

    def begin(self, key: TokenKey) -> None:
        """Start a request, as the driver does on Fetch and for what is due."""
        assert self.cache.begin(key, mono=self.mono)
        assert key not in self.in_flight
        self.in_flight[key] = (self.mono, self.wall)
        self.begun[key] = self.mono

    @rule(seconds=st.floats(0, 400, allow_nan=False))
    def time_passes(self, seconds: float) -> None:
        """Both clocks go on in step."""
        self.mono += seconds
        self.wall += timedelta(seconds=seconds)

    @rule(seconds=st.floats(-7200, 7200, allow_nan=False))
    def wall_clock_jumps(self, seconds: float) -> None:
        """The host slept, or somebody set the clock."""
        self.wall += timedelta(seconds=seconds)

    @rule(key=keys)
    def caller_asks(self, key: TokenKey) -> None:
        """A valid token is always returned; without one, the answer fits what is in flight."""
        fresh = self.cache.fresh(key, mono=self.mono, now=self.wall)
        answer = self.cache.ask(key, mono=self.mono, now=self.wall)
        assert fresh is None or (isinstance(answer, Ready) and answer.token is fresh)
        assert self.is_valid(key) == isinstance(answer, Ready)
        match answer:
            case Ready(token, due):
                assert self.tokens[key][0] is token
                assert not (due and key in self.in_flight)
            case Join():
                assert key in self.in_flight
            case Fetch():
                self.begin(key)
            case Held(_, until):
                assert key not in self.in_flight
                assert self.mono < until <= self.mono + 1.5 * 300

    @rule()
    def background_refreshes(self) -> None:
        """What is due is never in flight, and comes no sooner than the interval while its token is valid."""
        for key in self.cache.due(mono=self.mono):
            if self.mono < self.tokens[key][1] and self.wall < self.tokens[key][0].expires_at:
                assert self.mono - self.begun[key] >= MIN_INTERVAL
            self.begin(key)
        following = self.cache.next_due(mono=self.mono)
        assert following is None or following > self.mono, "the background would spin"

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), life=st.floats(0.001, 600), share=st.floats(0, 2))
    def broker_answers(self, data: st.DataObject, life: float, share: float) -> None:
        """A request ends with a token."""
        key = data.draw(st.sampled_from(sorted(self.in_flight, key=str)))
        sent, sent_at = self.in_flight.pop(key)
        self.serial += 1
        expires_in = timedelta(seconds=life)
        token = Token(str(self.serial), key.audience, (), sent_at + expires_in, key.thumbprint)
        self.tokens[key] = (token, sent + expires_in.total_seconds())
        self.cache.succeed(key, Issued(token, expires_in, timedelta(seconds=life * share)), sent=sent)

    @precondition(lambda self: self.in_flight)
    @rule(
        data=st.data(),
        reason=st.none() | st.just("NOT_GRANTED"),
        retry_after=st.none() | st.floats(0, 1e6).map(lambda seconds: timedelta(seconds=seconds)),
    )
    def broker_fails(self, data: st.DataObject, reason: str | None, retry_after: timedelta | None) -> None:
        """A request ends without a token."""
        key = data.draw(st.sampled_from(sorted(self.in_flight, key=str)))
        del self.in_flight[key]
        failure = Failure("no", reason=reason, retry_after=retry_after)
        self.cache.fail(key, failure, mono=self.mono, now=self.wall)

    @rule()
    def process_forks(self) -> None:
        """The child goes on with the same tokens, and with nothing in flight: what was, it asks for itself."""
        for key in self.in_flight:
            self.begun[key] = -math.inf
        self.cache = self.cache.copy_idle(random.Random(1))  # noqa: S311 - jitter
        self.in_flight.clear()

    @invariant()
    def one_request_in_flight_for_each_key(self) -> None:
        """No second request can be started."""
        for key in self.in_flight:
            assert not self.cache.begin(key, mono=self.mono)

    @invariant()
    def next_look_is_not_in_the_past(self) -> None:
        """The background is never told to look at a time that is over."""
        following = self.cache.next_due(mono=self.mono)
        assert following is None or following >= self.mono


TestCacheModel = CacheModel.TestCase
TestCacheModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_clients_that_started_together_drift_apart() -> None:
    """A thousand clients with the same token in the same second refresh spread evenly over 50-70 % of its life."""
    rng = random.Random(3)  # noqa: S311 - jitter
    times = []
    for _ in range(1000):
        cache = TokenCache(SETTINGS, rng)
        cache.begin(KEYS[0], mono=0)
        token = Token("t", "payments", (), START + timedelta(seconds=300), "thumb")
        cache.succeed(KEYS[0], Issued(token, timedelta(seconds=300), timedelta(seconds=150)), sent=0)
        times.append(cache.next_due(mono=0))
    tenths = [sum(150 + 6 * n <= time < 156 + 6 * n for time in times) for n in range(10)]
    assert 1000 == sum(tenths)
    assert max(tenths) < 150
    assert min(tenths) > 50
