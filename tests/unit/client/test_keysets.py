from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.errors import ConfigError, InvalidKeySetError
from carnet.jwk import KeySet, PublicJWK
from carnet.keysets import (
    Freshness,
    KeySetCache,
    KeySetRules,
    KeySetSnapshot,
    Knowledge,
    Moment,
    OnStale,
    Supply,
    Verdict,
    decide,
)

ISSUER = "https://tokens.prod.example"
START = Moment(1000.0, datetime(2026, 11, 24, 12, 0, tzinfo=UTC))
KEYS = [PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(4)]
RULES = KeySetRules()


def at(seconds: float) -> Moment:
    """Return the moment so many seconds after START, by both clocks."""
    return Moment(START.monotonic + seconds, START.wall + timedelta(seconds=seconds))


def snapshot(
    *keys: PublicJWK, generation: int = 1, issuer: str = ISSUER, asked: float = 0, age: float = 0, max_age: float = 300
) -> KeySetSnapshot:
    """Return an answer of the issuer."""
    return KeySetSnapshot(
        issuer=issuer,
        generation=generation,
        keys=KeySet.of(keys or KEYS[:1]),
        max_age=timedelta(seconds=max_age),
        age=timedelta(seconds=age),
        asked_at=at(asked),
    )


def loaded(rules: KeySetRules = RULES, *, jitter: float = 0, **answer: float) -> KeySetCache:
    """Return a cache that loaded one answer at START."""
    cache = KeySetCache(rules, issuer=ISSUER)
    cache.begin(at(0))
    cache.succeed(snapshot(**answer), at(0), jitter=jitter)
    return cache


def refresh(cache: KeySetCache, answer: KeySetSnapshot, seconds: float, *, kid: str | None = None) -> None:
    """Fetch once: ask and take the answer in at the same moment."""
    cache.begin(at(seconds), kid=kid)
    cache.succeed(answer, at(seconds), jitter=0)


EXPECTED = {
    # usable, knowledge, fetching, may ask
    (True, Knowledge.PRESENT, False, False): Verdict.USE,
    (True, Knowledge.PRESENT, False, True): Verdict.USE,
    (True, Knowledge.PRESENT, True, False): Verdict.USE,
    (True, Knowledge.PRESENT, True, True): Verdict.USE,
    (True, Knowledge.ABSENT, False, False): Verdict.NO,
    (True, Knowledge.ABSENT, False, True): Verdict.NO,
    (True, Knowledge.ABSENT, True, False): Verdict.NO,
    (True, Knowledge.ABSENT, True, True): Verdict.NO,
    (True, Knowledge.UNKNOWN, False, False): Verdict.CANNOT_TELL,
    (True, Knowledge.UNKNOWN, False, True): Verdict.ASK,
    (True, Knowledge.UNKNOWN, True, False): Verdict.WAIT,
    (True, Knowledge.UNKNOWN, True, True): Verdict.WAIT,
}


@pytest.mark.parametrize(
    "row",
    list(itertools.product([True, False], Knowledge, [True, False], [True, False])),
    ids=lambda row: "-".join(map(str, row)),
)
def test_every_row_of_the_table_says_what_the_rules_say(row: tuple[bool, Knowledge, bool, bool]):
    """A set that may not be used never says use or no, whatever it holds."""
    usable, knowledge, fetching, may_ask = row
    expected = EXPECTED[True, Knowledge.UNKNOWN, fetching, may_ask] if not usable else EXPECTED[row]
    assert expected is decide(usable=usable, knowledge=knowledge, fetching=fetching, may_ask=may_ask)


def test_an_empty_cache_asks_first_and_once():
    """With no set at hand a fetch is due at once; while it runs the others wait."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    assert cache.snapshot is None
    assert cache.usable(at(0)) is None
    assert timedelta(0) == cache.due_in(at(0))
    assert Verdict.ASK is cache.verdict(KEYS[0].kid, at(0))
    cache.begin(at(0))
    assert cache.fetching
    assert Verdict.WAIT is cache.verdict(KEYS[0].kid, at(0))
    with pytest.raises(RuntimeError):
        cache.begin(at(0))
    cache.succeed(snapshot(), at(1), jitter=0)
    assert not cache.fetching
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(1))


def test_a_known_key_is_used_while_a_fetch_is_under_way_and_after_it_failed():
    """Good verifications are never disturbed by what happens to others, and a failure never drops the set."""
    cache = loaded()
    cache.begin(at(1), kid=KEYS[1].kid)
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(1))
    cache.fail(at(2), jitter=0)
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(2))
    assert KeySet.of(KEYS[:1]) == cache.usable(at(2))


@pytest.mark.parametrize(("jitter", "expected"), [(0, 180), (0.5, 210), (1, 240)])
def test_the_next_poll_is_due_between_60_and_80_percent_of_the_max_age(jitter: float, expected: float):
    """Verifiers that loaded a set together do not come back together, and come before the set ends."""
    cache = loaded(KeySetRules(max_staleness=timedelta(hours=1)), jitter=jitter)
    assert timedelta(seconds=expected) == cache.due_in(at(0))
    assert timedelta(seconds=expected - 100) == cache.due_in(at(100))
    assert timedelta(0) == cache.due_in(at(expected))
    assert timedelta(0) == cache.due_in(at(expected + 50))


def test_the_next_poll_comes_before_the_staleness_budget_ends():
    """A max-age longer than what is left of the budget does not make the verifier refuse between two polls."""
    assert timedelta(seconds=(300 - 100) * 0.6) == loaded(max_age=3600, age=100).due_in(at(0))


def test_polls_are_never_more_often_than_the_floor():
    """A tiny max-age does not make a busy loop, nor does a budget that is nearly used up."""
    assert RULES.poll_floor == loaded(max_age=0.001).due_in(at(0))
    assert RULES.poll_floor == loaded(age=300).due_in(at(0))
    cache = loaded()
    cache.begin(at(1))
    cache.fail(at(1), jitter=0)
    assert RULES.poll_floor == cache.due_in(at(1))


def test_failures_back_off_to_the_limit_and_a_success_starts_again():
    """1, 2, 4, 8, 16 and then 30 seconds at most; jitter takes any part of it."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    for expected in [1, 2, 4, 8, 16, 30, 30]:
        cache.begin(at(0))
        cache.fail(at(0), jitter=1)
        assert timedelta(seconds=expected) == cache.due_in(at(0))
    for _ in range(2000):
        cache.begin(at(0))
        cache.fail(at(0), jitter=0.5)
    assert timedelta(seconds=15) == cache.due_in(at(0))
    refresh(cache, snapshot(), 0)
    cache.begin(at(0))
    cache.fail(at(0), jitter=1)
    assert timedelta(seconds=1) == cache.due_in(at(0))


def test_a_cache_that_cannot_decide_asks_when_its_wait_is_over():
    """With no set at hand the back-off holds for every caller, and ends."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.begin(at(0))
    cache.fail(at(0), jitter=1)
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[0].kid, at(0.999))
    assert Verdict.ASK is cache.verdict(KEYS[0].kid, at(1))


@pytest.mark.parametrize(("seconds", "expected"), [(199, Verdict.USE), (200, Verdict.USE), (201, Verdict.ASK)])
def test_staleness_is_the_stated_age_plus_the_time_since(seconds: float, expected: Verdict):
    """A set that was 100 s old when it came is over the budget of 300 s after 200 s."""
    cache = loaded(age=100)
    assert expected is cache.verdict(KEYS[0].kid, at(seconds))
    assert timedelta(seconds=100 + seconds) == cache.snapshot.staleness(at(seconds))


def test_a_stale_set_neither_accepts_nor_refuses():
    """Over the budget an absent key is not a "no" any more, and a key that is present is not used."""
    cache = loaded()
    refresh(cache, snapshot(), 0, kid=KEYS[1].kid)
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(300))
    cache.begin(at(301))
    assert Verdict.WAIT is cache.verdict(KEYS[1].kid, at(301))
    assert Verdict.WAIT is cache.verdict(KEYS[0].kid, at(301))


def test_a_stale_set_is_used_by_a_verifier_that_accepts_it():
    """`on_stale="accept"` goes on with a set that is years old."""
    cache = loaded(KeySetRules(on_stale=OnStale.ACCEPT))
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(10**8))


def test_an_answer_that_is_stale_on_arrival_counts_as_a_failure():
    """The issuer's own knowledge is too old: asking at once again does not help, so the waits grow."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    for expected in [1, 2, 4]:
        cache.begin(at(0))
        cache.succeed(snapshot(age=301), at(0), jitter=1)
        assert timedelta(seconds=expected) == cache.due_in(at(0))
    assert cache.usable(at(0)) is None
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[0].kid, at(0))


def test_an_answer_that_lay_in_a_buffer_is_counted_from_the_question():
    """A process that was stopped between question and answer does not take the answer for fresh."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.begin(at(0))
    cache.succeed(snapshot(asked=0), at(301), jitter=0)
    assert cache.usable(at(301)) is None


@pytest.mark.parametrize("clock", ["monotonic", "wall"])
def test_the_clock_that_went_further_counts(clock: str):
    """Suspend stops the monotonic clock, and the wall clock may be set back: neither makes a set look fresh."""
    cache = loaded()
    stopped = START.wall - timedelta(days=1), START.monotonic
    now = Moment(stopped[1], at(301).wall) if clock == "wall" else Moment(at(301).monotonic, stopped[0])
    assert cache.usable(now) is None
    assert timedelta(0) == cache.due_in(now)


def test_a_clock_that_goes_back_makes_no_negative_age():
    """A reading before the question counts as none."""
    assert timedelta(seconds=7) == snapshot(age=7).staleness(at(-50))


def test_a_set_of_another_issuer_is_refused():
    """Staging's set never replaces production's; the fetch has failed, and the set at hand stays."""
    cache = loaded()
    cache.begin(at(1))
    with pytest.raises(InvalidKeySetError, match=r"staging\.example"):
        cache.succeed(snapshot(KEYS[1], generation=2, issuer="https://staging.example"), at(1), jitter=1)
    assert not cache.fetching
    assert timedelta(seconds=1) == cache.due_in(at(1))
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(1))


def test_an_older_generation_is_refused():
    """K10: within a run the generation never goes back, and a replica that lags makes nothing look fresh."""
    cache = loaded(generation=5)
    cache.begin(at(1))
    with pytest.raises(InvalidKeySetError, match="generation 4"):
        cache.succeed(snapshot(KEYS[1], generation=4, asked=200), at(200), jitter=0)
    assert 5 == cache.generation
    assert cache.usable(at(301)) is None


def test_the_same_generation_makes_the_set_fresh_again():
    """A poll that finds nothing new confirms what is at hand."""
    cache = loaded()
    refresh(cache, snapshot(asked=200), 200)
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(500))


def test_a_newer_generation_replaces_the_whole_set():
    """A key that is not published any more is not trusted any more."""
    cache = loaded()
    assert 1 == cache.generation
    refresh(cache, snapshot(KEYS[1], generation=2, asked=10), 10)
    assert 2 == cache.generation
    assert Verdict.USE is cache.verdict(KEYS[1].kid, at(10))
    assert Verdict.NO is cache.verdict(KEYS[0].kid, at(10))


@pytest.mark.parametrize("push", [False, True], ids=["fetched", "pushed"])
def test_a_key_that_was_withdrawn_is_denied_with_no_question_ever_after(push):
    """Of a revoked key nobody has to be asked, and "cannot tell" would be wrong: the caller should get a new token."""
    cache = loaded()
    for generation, key in ((2, KEYS[1]), (3, KEYS[2])):
        later = snapshot(key, generation=generation, asked=10)
        if push:
            cache.load(later)
        else:
            refresh(cache, later, 10)
        assert Verdict.NO is cache.verdict(KEYS[0].kid, at(10))
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(10))
    assert Verdict.ASK is cache.verdict(KEYS[3].kid, at(10))


def test_a_key_that_was_withdrawn_may_be_back_in_a_new_epoch_only():
    """The issuer was restored: what was withdrawn since may be published again, so it is asked for again."""
    cache = loaded(generation=5)
    cache.load(snapshot(KEYS[1], generation=6))
    cache.load(snapshot(KEYS[2], generation=4), new_epoch=True)
    assert [Verdict.ASK] * 2 == [cache.verdict(key.kid, at(1)) for key in KEYS[:2]]
    cache.load(snapshot(KEYS[0], generation=5))
    assert Verdict.USE is cache.verdict(KEYS[0].kid, at(1))
    assert Verdict.NO is cache.verdict(KEYS[2].kid, at(1))


def test_what_is_remembered_as_withdrawn_is_bounded():
    """The oldest is forgotten first; of that one the issuer is asked as of any that is unknown."""
    cache = loaded(KeySetRules(max_absent=2))
    for generation, key in enumerate(KEYS[1:], 2):
        cache.load(snapshot(key, generation=generation))
    assert Verdict.ASK is cache.verdict(KEYS[0].kid, at(1))
    assert [Verdict.NO] * 2 == [cache.verdict(key.kid, at(1)) for key in KEYS[1:3]]


def test_an_unknown_key_is_asked_for_and_remembered_as_absent():
    """The issuer was asked and does not have it: that is a "no", with no other question until the set changes."""
    cache = loaded()
    assert Verdict.ASK is cache.verdict(KEYS[1].kid, at(1))
    refresh(cache, snapshot(), 1, kid=KEYS[1].kid)
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(1))
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(299))


def test_an_unknown_key_that_the_answer_holds_is_used():
    """A key that was published since the last poll is found by asking for it."""
    cache = loaded()
    refresh(cache, snapshot(*KEYS[:2], generation=2), 1, kid=KEYS[1].kid)
    assert Verdict.USE is cache.verdict(KEYS[1].kid, at(1))


def test_other_unknown_keys_wait_for_the_cooldown_and_are_not_denied_meanwhile():
    """K11: one question per cooldown over all unknown keys. Nobody asked for the second one, so it is not a "no"."""
    cache = loaded()
    refresh(cache, snapshot(), 1, kid=KEYS[1].kid)
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[2].kid, at(1))
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[2].kid, at(30.999))
    assert Verdict.ASK is cache.verdict(KEYS[2].kid, at(31))


def test_the_cooldown_holds_after_a_failure_too():
    """A broker that is down is not asked more often for it; the retry that is due asks for the whole set."""
    cache = loaded()
    cache.begin(at(1), kid=KEYS[1].kid)
    cache.fail(at(2), jitter=1)
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[1].kid, at(30.9))
    assert timedelta(seconds=1) == cache.due_in(at(2))
    assert Verdict.ASK is cache.verdict(KEYS[1].kid, at(31))


def test_a_newer_generation_clears_what_is_remembered_as_absent():
    """A key may be published later; the same generation says the same."""
    cache = loaded()
    refresh(cache, snapshot(), 1, kid=KEYS[1].kid)
    refresh(cache, snapshot(asked=40), 40)
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(40))
    refresh(cache, snapshot(generation=2, asked=50), 50)
    assert Verdict.ASK is cache.verdict(KEYS[1].kid, at(50))


def test_what_is_remembered_as_absent_is_bounded():
    """The oldest is forgotten first, so a flood costs no memory."""
    cache = loaded(KeySetRules(max_absent=2))
    for key in KEYS[1:]:
        refresh(cache, snapshot(), 1, kid=key.kid)
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[1].kid, at(1))
    assert [Verdict.NO] * 2 == [cache.verdict(key.kid, at(1)) for key in KEYS[2:]]


def test_the_reason_why_nothing_can_be_told_is_said():
    """Each of the three states has its own text for the error."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    assert f"no key set of {ISSUER} could be had yet: no answer came so far" in cache.explain(at(0))
    assert "CARNET_TRUST" in cache.explain(at(0))
    refresh(cache, snapshot(), 0)
    assert "generation 1" in cache.explain(at(0))
    assert "301 s old, over the limit of 300 s" in cache.explain(at(301))


def test_what_the_last_fetch_failed_of_is_said():
    """Without a set, or with one that is too old, the cause is in the text; a good answer ends it."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.begin(at(0))
    cache.fail(at(0), jitter=0, why="connection refused")
    assert f"no key set of {ISSUER} could be had yet: connection refused" == cache.explain(at(0))
    refresh(cache, snapshot(), 0)
    assert "connection refused" not in cache.explain(at(301))
    cache.begin(at(302))
    cache.fail(at(302), jitter=0, why="no route to host")
    assert cache.explain(at(303)).endswith("and no newer one could be had: no route to host")


def test_a_key_set_of_another_issuer_is_named_as_the_cause():
    """Whoever configured the wrong issuer reads both, and which variable to look at."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    with pytest.raises(InvalidKeySetError):
        refresh(cache, snapshot(issuer="https://other.example"), 0)
    expected = f"the key set is of issuer 'https://other.example', and this verifier trusts '{ISSUER}'"
    assert f"could be had yet: {expected}: check CARNET_ISSUER" in cache.explain(at(0))


@pytest.mark.parametrize("wrong", [{"age": -1}, {"max_age": 0}, {"max_age": -5}])
def test_an_answer_with_impossible_times_is_refused(wrong: dict[str, float]):
    """A negative age would make a set look fresher than it is."""
    with pytest.raises(InvalidKeySetError, match="max-age"):
        snapshot(**wrong)


@pytest.mark.parametrize("name", ["max_staleness", "cooldown", "poll_floor", "retry_first", "retry_most"])
def test_a_duration_that_is_not_positive_is_refused(name: str):
    """No cooldown and no back-off are not to be had: each would let a flood reach the broker."""
    with pytest.raises(ConfigError, match=name):
        KeySetRules(**{name: timedelta(0)})


def test_a_memory_of_nothing_is_refused():
    """The bound on absent keys is at least one."""
    with pytest.raises(ConfigError, match="max_absent"):
        KeySetRules(max_absent=0)


# -- pushed, and revocations beside the keys ---------------------------------------------------------------------------


def test_while_a_stream_is_opened_for_the_first_time_whoever_asks_waits_for_it():
    """Nothing is fetched then; once the stream failed, fetches are due; while it is open, none is."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    for supply, verdict in (
        (Supply.AWAIT, Verdict.WAIT),
        (Supply.PUSH, Verdict.CANNOT_TELL),
        (Supply.POLL, Verdict.ASK),
    ):
        cache.supply = supply
        assert verdict is cache.verdict(KEYS[0].kid, at(0))


def test_a_missing_key_is_asked_for_while_a_stream_is_open_too():
    """With the cooldown and the memory of what is absent that hold for polls; a push clears the memory."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.supply = Supply.PUSH
    cache.load(snapshot(KEYS[0]))
    assert Verdict.ASK is cache.verdict(KEYS[1].kid, at(1))
    refresh(cache, snapshot(KEYS[0]), 1, kid=KEYS[1].kid)
    assert Verdict.NO is cache.verdict(KEYS[1].kid, at(2))
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[2].kid, at(2))
    cache.load(snapshot(KEYS[0]))
    assert Verdict.CANNOT_TELL is cache.verdict(KEYS[1].kid, at(3)), "unknown again, and cooling"
    assert Verdict.ASK is cache.verdict(KEYS[1].kid, at(31))


def test_a_pushed_set_obeys_the_rules_of_a_fetched_one():
    """No lower generation, but in a new epoch; no other issuer, ever."""
    cache = loaded(generation=5)
    for wrong in (snapshot(generation=4), snapshot(generation=6, issuer="https://tokens.staging.example")):
        with pytest.raises(InvalidKeySetError):
            cache.load(wrong)
    assert 5 == cache.generation
    cache.load(snapshot(generation=4), new_epoch=True)
    assert 4 == cache.generation


def test_a_confirmation_makes_a_set_fresher_and_never_older():
    """Without a set there is nothing to confirm."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.confirm(Freshness(timedelta(), at(0)), at(0))
    assert None is cache.staleness(at(0))
    cache.load(snapshot(asked=0))
    cache.confirm(Freshness(timedelta(seconds=1), at(50)), at(50))
    assert timedelta(seconds=1) == cache.staleness(at(50))
    cache.confirm(Freshness(timedelta(seconds=9), at(50)), at(50))
    assert timedelta(seconds=1) == cache.staleness(at(50))


def test_whoever_follows_revocations_decides_nothing_without_them():
    """Not even by choice: they were never told. Afterwards the staler half counts, unless stale is accepted."""
    cache = KeySetCache(RULES, issuer=ISSUER, follows_revocations=True)
    cache.load(snapshot(KEYS[0], asked=100))
    assert (None, None) == (cache.usable(at(100)), cache.usable(at(100), on_stale=OnStale.ACCEPT))
    assert f"the revocations of {ISSUER} could not be had yet: no answer" in cache.explain(at(100))
    cache.told_revocations(Freshness(timedelta(), at(0)), at(100))
    assert cache.usable(at(300)) is not None
    assert None is cache.usable(at(301))
    assert cache.usable(at(301), on_stale=OnStale.ACCEPT) is not None
    assert timedelta(seconds=301) == cache.staleness(at(301))
    cache.lost("the broker is gone")
    assert "the knowledge of revocations of" in cache.explain(at(301))
    assert "is 301 s old, over the limit of 300 s, and no newer one could be had: the broker is gone" in cache.explain(
        at(301)
    )
    cache.told_revocations(Freshness(timedelta(), at(300)), at(301))
    cache.told_revocations(Freshness(timedelta(), at(200)), at(301))
    assert timedelta(seconds=201) == cache.staleness(at(301)), "that of the keys"


def test_who_accepts_what_is_stale_can_still_refuse_it_for_one_call():
    """The choice of a call goes before that of the verifier."""
    cache = loaded(KeySetRules(on_stale=OnStale.ACCEPT))
    assert cache.usable(at(1000)) is not None
    assert None is cache.usable(at(1000), on_stale=OnStale.REFUSE)


def test_a_set_without_the_rest_of_the_answer_is_loaded_and_asked_for_again_soon():
    """The keys are there, the revocations were not: the next question follows as after a failure."""
    cache = KeySetCache(RULES, issuer=ISSUER)
    cache.begin(at(0))
    cache.succeed(snapshot(KEYS[0]), at(0), jitter=1, incomplete="no revocations")
    assert (KEYS[0], timedelta(seconds=1)) == (cache.usable(at(0)).get(KEYS[0].kid), cache.due_in(at(0)))
    cache.begin(at(1))
    cache.succeed(snapshot(KEYS[0], asked=1), at(1), jitter=1, incomplete="no revocations")
    assert timedelta(seconds=2) == cache.due_in(at(1))
