"""Any order of what brokers may say, true, old, doubled, torn or wrong: nothing goes back, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.jwk import KeySet, PublicJWK
from carnet.keysets import KeySetRules, Moment
from carnet.revocations import GENESIS_DIGEST, Position, Revocation, RevocationKind, RevocationSet, next_digest
from carnet.trust_messages import Change, PartCollector, PushedKeys, RefusedResponseError, Response
from carnet.trust_state import TrustState
from support.counts import count

ISSUER = "https://tokens.prod.example"
WALL = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
KEYS = KeySet.of([PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key())])
SUBJECTS = [f"spiffe://prod.example/ns/shop/sa/{name}" for name in ("orders", "cron")]


def at(seconds: float) -> Moment:
    """Return a moment."""
    return Moment(seconds, WALL + timedelta(seconds=seconds))


@dataclass
class Issuer:
    """The truth: epochs, each with its log, and the generations of the keyring."""

    epoch: int = 1
    log: list[Revocation] = field(default_factory=list)
    generation: int = 1
    said: list[Response] = field(default_factory=list)

    @property
    def version(self) -> int:
        """The last version."""
        return self.log[-1].version if self.log else 0

    def digest(self, upto: int) -> bytes:
        """The digest at a version."""
        digest = GENESIS_DIGEST
        for entry in self.log:
            if entry.version <= upto:
                digest = next_digest(digest, entry)
        return digest

    def revoke(self, kind: RevocationKind, number: int, seconds: float) -> None:
        """Write an entry."""
        version = self.version + 1
        by_version = kind in {RevocationKind.SUBJECT, RevocationKind.BLOCK, RevocationKind.LIFT}
        value = SUBJECTS[number % 2] if by_version else f"token-{number:016d}"
        ends = None if kind is RevocationKind.BLOCK else WALL + timedelta(seconds=int(seconds))
        self.log.append(Revocation(version, kind, value, version if by_version else 0, ends))

    def restore(self, kept: int) -> None:
        """Lose all but the first entries, and begin an epoch well above what was seen."""
        self.epoch += 1
        self.log = self.log[:kept]
        if self.log:
            last = replace(self.log[-1], version=self.log[-1].version + 1_000)
            if last.before_version:
                last = replace(last, before_version=last.version)
            self.log.append(last)

    def response(self, since: int | None, upto: int, *, keys: bool) -> Response:
        """Say what leads from one version to another, or all up to one."""
        entries = tuple(one for one in self.log if (since or 0) < one.version <= upto)
        digest = self.digest(upto)
        change = Change(since or 0, upto, digest, snapshot=since is None, more=False, entries=entries)
        pushed = PushedKeys(ISSUER, self.generation, KEYS, timedelta(minutes=5)) if keys else None
        position = Position(self.epoch, self.generation, upto, digest)
        return Response(position, timedelta(), keys=pushed, change=None if since == upto else change)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("revoke"), st.sampled_from(RevocationKind), st.integers(0, 9), st.integers(5, 400)),
        st.tuples(st.just("rotate")),
        st.tuples(st.just("restore"), st.integers(0, 4)),
        st.tuples(st.just("snapshot"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("delta"), st.integers(-2, 2), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("follow")),
        st.tuples(st.just("again"), st.integers(0, 30)),
        st.tuples(st.just("parts"), st.integers(0, 3)),
        st.tuples(st.just("tamper"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(1, 90)),
    ),
    min_size=5,
    max_size=60,
)


@dataclass(frozen=True)
class Refused:
    """What a verifier refuses at one moment."""

    tokens: frozenset[str]
    reach: dict[str, int]
    """Below which `rv` the tokens of a subject are refused."""
    blocks: dict[str, int]
    """The version of the block of a subject."""


def refused(entries: Iterable[Revocation], now: Moment) -> Refused:
    """Return what these entries refuse at `now`."""
    force = [entry for entry in entries if entry.expires_at is None or entry.expires_at > now.wall]
    by_token = {RevocationKind.TOKEN, RevocationKind.ROOT}
    return Refused(
        frozenset(entry.value for entry in force if entry.kind in by_token),
        {
            subject: max(
                (e.before_version for e in force if e.value == subject and e.kind is not RevocationKind.BLOCK),
                default=0,
            )
            for subject in SUBJECTS
        },
        {entry.value: entry.version for entry in force if entry.kind is RevocationKind.BLOCK},
    )


@settings(max_examples=count("trust_state"), deadline=None)
@given(STEPS)
def test_nothing_goes_back_and_no_revocation_in_force_is_lost(steps: list[tuple[object, ...]]):
    """Position by position within an epoch; token by token at all times; and whatever fails changes nothing."""
    issuer, second = Issuer(), 0.0
    state = TrustState(KeySetRules(), issuer=ISSUER, now=at(0), follows_revocations=True)
    for step in steps:
        if step[0] == "time":
            second += step[1]
        _happens(issuer, step, second)
        said = _said(issuer, state, step)
        if said is None:
            continue
        issuer.said.append(said)
        _check_step(state, said, at(second))
    # Whatever was said before: who is told everything knows everything.
    now = at(second)
    state.apply(issuer.response(None, issuer.version, keys=True), asked_at=now, now=now)
    digest = issuer.digest(issuer.version)
    assert Position(issuer.epoch, issuer.generation, issuer.version, digest) == state.position
    truth, known = refused(RevocationSet(issuer.log).entries(), now), refused(state.revocations.entries(), now)
    assert truth.tokens <= known.tokens
    assert all(truth.reach[subject] <= known.reach[subject] for subject in SUBJECTS)
    assert truth.blocks.keys() <= known.blocks.keys()


def _happens(issuer: Issuer, step: tuple[object, ...], second: float) -> None:
    """Let the issuer do what the step says, if it is something that an issuer does."""
    match step:
        case ("revoke", kind, number, seconds) if kind is not RevocationKind.CERTIFICATE:
            issuer.revoke(kind, number, second + seconds)
        case ("rotate",):
            issuer.generation += 1
        case ("restore", kept):
            issuer.restore(kept)


def _said(  # noqa: PLR0911 - one for each thing that a broker may say
    issuer: Issuer, state: TrustState, step: tuple[object, ...]
) -> Response | None:
    """Return what a broker says in this step, None where it says nothing."""
    versions = [0, *(entry.version for entry in issuer.log)]
    match step:
        case ("snapshot", back, keys):
            return issuer.response(None, versions[max(0, len(versions) - 1 - back)], keys=keys)
        case ("delta", off, back, keys):
            mine = state.position.revocation_version if state.position else 0
            return issuer.response(max(0, mine + off), versions[max(0, len(versions) - 1 - back)], keys=keys)
        case ("follow",):
            return _follow(issuer, state)
        case ("again", index) if issuer.said:
            return issuer.said[index % len(issuer.said)]
        case ("parts", size):
            return _in_parts(issuer.response(None, issuer.version, keys=True), size + 1)
        case ("tamper", index):
            return _tampered(issuer.response(None, issuer.version, keys=True), index)
    return None


def _check_step(state: TrustState, said: Response, now: Moment) -> None:
    before, revision, staleness = state.position, state.revision, state.keys.staleness(now)
    had = refused(state.revocations.entries(), now)
    try:
        state.apply(said, asked_at=now, now=now)
    except RefusedResponseError:
        assert (before, revision, staleness) == (state.position, state.revision, state.keys.staleness(now))
    after = state.position
    has = refused(state.revocations.entries(), now)
    assert had.tokens <= has.tokens
    assert all(had.reach[subject] <= has.reach[subject] for subject in SUBJECTS)
    if before is None:
        return
    assert after is not None
    assert after.epoch >= before.epoch
    if after.epoch == before.epoch:
        assert after.generation >= before.generation
        assert after.revocation_version >= before.revocation_version
    entries = said.change.entries if said.change is not None else ()
    for subject in had.blocks.keys() - has.blocks.keys():
        lifted = any(
            entry.kind is RevocationKind.LIFT and entry.value == subject and entry.version > had.blocks[subject]
            for entry in entries
        )
        gone = said.change is not None and said.change.snapshot and after.epoch == before.epoch
        assert lifted or gone


def _follow(issuer: Issuer, state: TrustState) -> Response:
    """Say what a good broker says to a verifier that is where this one is."""
    mine = state.position
    follows = mine is not None and mine.epoch == issuer.epoch and not state.wants_all
    known = follows and mine.revocation_digest == issuer.digest(mine.revocation_version)
    since = mine.revocation_version if known else None
    return issuer.response(since, issuer.version, keys=mine is None or mine.generation != issuer.generation)


def _in_parts(whole: Response, size: int) -> Response:
    """Return what a collector makes of a response in parts: the response."""
    entries = whole.change.entries
    parts = [entries[start : start + size] for start in range(0, len(entries), size)] or [()]
    collector, out = PartCollector(), None
    for number, part in enumerate(parts, 1):
        assert out is None
        change = replace(whole.change, entries=part, more=number < len(parts))
        out = collector.add(replace(whole, change=change), at(0), at(0))
    assert out is not None
    assert whole == out[0]
    return out[0]


def _tampered(whole: Response, index: int) -> Response:
    """Return a response with something in it that cannot be."""
    change = whole.change
    match index:
        case 0:
            return replace(whole, change=replace(change, to_version=change.to_version + 1))
        case 1:
            return replace(whole, position=replace(whole.position, epoch=0))
        case 2:
            wrong = Revocation(1, RevocationKind.TOKEN, "short", 0, WALL)
            return replace(whole, change=replace(change, entries=(*change.entries, wrong)))
    return replace(whole, keys=PushedKeys("https://other.example", whole.position.generation, KEYS, timedelta(1)))
