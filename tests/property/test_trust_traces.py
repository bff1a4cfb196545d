"""Stories of rotations, restored stores and cut-off verifiers, each told from its beginning to its end.

They run in the world of `support.trust_world`, and are held to the rules of `test_trust_model`. The last ones take a
guard out of the real code: then a rule must break, or the rules would show nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from carnet.keysets import Moment
from carnet.revocations import RevocationKind
from carnet.trust_messages import Response
from carnet.trust_state import Outcome, TrustState
from carnet.watch_protocol import WatchProtocol
from carnet_broker.core.rollout import RECOUNT_FOR
from carnet_broker.ports import RequestKind
from support.keyrings import SECOND
from support.store_fakes import FakeRollout
from support.trust_broker import Broker
from support.trust_judge import Judge
from support.trust_parts import LEASE, MAX_STALENESS, SUBJECTS, TIMING
from support.trust_poller import FRESH, Poller
from support.trust_verifier import Verifier
from support.trust_world import TrustWorld

WARM = 40
"""Seconds after which CI may ask for a rotation."""
WINDOW = int(TIMING.poller_window.total_seconds())


class Story:
    """A world that has run for a while, with two brokers and as many verifiers."""

    def __init__(self) -> None:
        random.seed(0)
        self.world = TrustWorld(brokers=2, verifiers=2)
        self.judge = Judge(self.world)
        self.run(WARM)
        self.one, self.other = self.world.verifiers

    def run(self, seconds: int) -> None:
        """Let all go on, and look at each step."""
        self.world.run(seconds, check=self.look)

    def look(self) -> None:
        """Have each broker issue a token, and show all to all."""
        for number in range(len(self.world.brokers)):
            self.world.issue(number)
        self.judge.look()

    def ask(self) -> None:
        """CI asks for a rotation."""
        self.world.requests.submit(RequestKind.ROTATE, created_at=self.world.data.now())

    def cut_off(self, verifier: Verifier, *, mend: bool = False) -> None:
        """Cut a verifier off from all brokers, or bring it back."""
        links = {(verifier.number, broker.replica_id) for broker in self.world.brokers}
        self.world.cut = self.world.cut - links if mend else self.world.cut | links

    @property
    def signer(self) -> str:
        """The key that signs."""
        active = self.world.keyring().active
        assert active is not None
        return active.kid

    def verdicts(self) -> list[str]:
        """What each verifier says of a new token."""
        token = self.world.issue(0)
        assert token is not None
        return [verifier.judge(token) for verifier in self.world.verifiers]


@pytest.fixture(name="story")
def _story() -> Iterator[Story]:
    story = Story()
    yield story
    story.world.close()


def test_rotation_goes_through_and_nobody_misses_it(story: Story):
    """All verifiers are live before and after, and take what either key has signed."""
    before = story.signer
    story.ask()
    story.run(WINDOW + 10)
    assert before != story.signer
    assert ["accepted", "accepted"] == story.verdicts()
    assert all(verifier.admitted for verifier in story.world.verifiers)


def test_verifier_that_joins_before_the_activation_has_the_key(story: Story):
    """K03: while a rotation waits for one that is cut off, another is admitted, with the key that comes next."""
    story.ask()
    story.cut_off(story.one)
    story.run(8)
    before = story.signer
    story.ask()
    story.run(WINDOW)
    assert before == story.signer
    late = Verifier(story.world, 2, 0 * SECOND)
    story.world.verifiers.append(late)
    story.run(10)
    assert late.admitted
    story.cut_off(story.one, mend=True)
    story.run(20)
    assert before != story.signer
    assert ["accepted"] * 3 == story.verdicts()


def test_broker_that_lags_signs_with_what_all_know(story: Story):
    """K03: one that cannot reach Vault goes on with the old key for a while, and then with none."""
    story.world.brokers[1].vault_up = False
    story.ask()
    story.run(2 * WINDOW)
    assert ["accepted", "accepted"] == story.verdicts()


def test_verifier_that_is_cut_off_refuses_and_comes_back(story: Story):
    """It takes what it can until it is stale, then refuses, holds up nothing, and is live again when it is back."""
    story.ask()
    story.cut_off(story.one)
    story.run(20)
    assert "accepted" == story.verdicts()[0]
    story.run(60)
    assert "stale" == story.verdicts()[0]
    story.cut_off(story.one, mend=True)
    story.run(20)
    assert story.one.admitted
    assert ["accepted", "accepted"] == story.verdicts()


def restored(story: Story) -> None:
    """The store is restored to a backup that knows of no verifier, while one of them is cut off from its broker."""
    with story.world.data.transaction() as tables:
        kept, tables.sessions = dict(tables.sessions), {}
        backup = story.world.data.copy()
        tables.sessions = kept
    story.run(20)
    story.world.data.restore(backup)


def test_restored_store_gives_no_permit_before_all_are_counted_again(story: Story):
    """Sessions vanish with what was written since the backup, also where no revocation does: a new epoch begins, the
    verifiers join it, and whoever cannot is stale before a key signs that it has not loaded.
    """
    epoch, before = story.world.data._tables.position.epoch, story.signer
    restored(story)
    assert [] == list(story.world.data._tables.sessions)
    story.ask()
    story.run(WINDOW + 20)
    assert epoch < story.world.data._tables.position.epoch
    assert 2 == len(story.world.data._tables.sessions)
    assert before == story.signer
    story.run(int((RECOUNT_FOR + LEASE).total_seconds()))
    assert before != story.signer
    assert ["accepted", "accepted"] == story.verdicts()


def test_broker_that_remembers_brings_back_what_a_restored_store_has_lost(story: Story):
    """A revocation that was lost with the store is in force nowhere the less, and a new epoch begins at once."""
    world = story.world
    backup, epoch = world.data.copy(), world.data._tables.position.epoch
    token = world.issue(0)
    assert token is not None
    story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, token.claims.token_id))
    story.run(6)
    world.data.restore(backup)
    story.run(4)
    assert epoch < world.data._tables.position.epoch
    assert [token.claims.token_id] == [entry.value for entry in world.stored()]
    assert ["revoked", "revoked"] == [verifier.judge(token) for verifier in world.verifiers]


def test_verifier_keeps_what_no_broker_remembers(story: Story):
    """All brokers began anew on an older store: what the verifier claims begins a new epoch, and it forgets nothing."""
    world = story.world
    backup, epoch = world.data.copy(), world.data._tables.position.epoch
    token = world.issue(0)
    assert token is not None
    story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, token.claims.token_id))
    story.run(6)
    world.data.restore(backup)
    for number in range(2):
        world.restart(number)
    story.run(20)
    assert epoch < world.data._tables.position.epoch
    assert ["revoked", "revoked"] == [verifier.judge(token) for verifier in world.verifiers]


def test_subject_that_is_revoked_before_a_restoration_is_found_out_loses_all_its_tokens(story: Story):
    """The version that the revocation gets was given before, and is below the `rv` of the token that it is meant for.

    Whoever revokes had seen no more than the backup holds, so that it cannot know; whoever has seen more puts it right.
    """
    world = story.world
    world.brokers[1].store_up = False
    backup = world.data.copy()
    for number in range(3):
        story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, f"another-token-{number:012d}"))
    token = world.issue(0)
    assert token is not None
    story.run(4)
    world.data.restore(backup)
    world.brokers[1].store_up = True
    entries = world.brokers[1].revoke(RevocationKind.SUBJECT, SUBJECTS[0])
    assert entries[0].before_version < token.claims.revocation_version
    story.judge.revoked(entries)
    story.run(8)
    assert ["revoked", "revoked"] == [verifier.judge(token) for verifier in world.verifiers]
    assert ["accepted", "accepted"] == story.verdicts(), "a token that is issued from now on is good"


def test_who_revokes_a_subject_in_a_restored_store_finds_it_out(story: Story):
    """The answer is of the new epoch, and names every token that is out."""
    world = story.world
    backup, epoch = world.data.copy(), world.data._tables.position.epoch
    story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, "another-token-000000"))
    token = world.issue(0)
    assert token is not None
    world.data.restore(backup)
    entries = world.brokers[0].revoke(RevocationKind.SUBJECT, SUBJECTS[0])
    assert entries[0].before_version > token.claims.revocation_version
    assert epoch < world.data._tables.position.epoch
    story.judge.revoked(entries)
    story.run(8)
    assert ["revoked", "revoked"] == [verifier.judge(token) for verifier in world.verifiers]


def test_who_polls_misses_no_key_and_no_revocation(story: Story):
    """It asks in time for what it needs, from whichever broker it can reach."""
    world = story.world
    poller = Poller(world, 2, 0 * SECOND)
    world.verifiers.append(poller)
    world.cut.add((2, world.brokers[0].replica_id))
    story.run(4)
    before = story.signer
    story.ask()
    story.run(WINDOW + 10)
    assert before != story.signer
    assert poller.is_fresh
    token = world.issue(0)
    assert token is not None
    assert "accepted" == poller.judge(token)
    story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, token.claims.token_id))
    story.run(12)
    assert "revoked" == poller.judge(token)
    story.cut_off(poller)
    story.run(50)
    assert ["accepted", "accepted", "stale"] == story.verdicts()


def test_buffered_heartbeats_do_not_make_a_suspended_verifier_fresh(story: Story):
    """What lay in a buffer while a laptop slept is as old as the last answer before."""
    story.one.suspended = True
    story.run(int(MAX_STALENESS.total_seconds()) + 4)
    story.one.suspended = False
    stream = story.one.stream
    assert stream is not None
    assert stream.down
    while stream.down and story.one.stream is stream:
        stream.carry_down()
        assert "stale" == story.verdicts()[0]
        story.look()


def test_broker_that_dies_between_raise_and_write_holds_up_nobody(story: Story, monkeypatch: pytest.MonkeyPatch):
    """The rollout is ahead of the keyring then; whoever comes next finishes it."""
    world = story.world
    story.ask()
    story.run(WINDOW + 10)
    before = story.signer
    world.data._tables.rollout = replace(world.data._tables.rollout, generation=world.keyring().generation + 1)
    world.restart(0)
    story.run(WARM)
    story.ask()
    story.run(2 * WINDOW + 60)
    assert before != story.signer
    assert ["accepted", "accepted"] == story.verdicts()


# -- the rules have teeth ----------------------------------------------------------------------------------------------


def one_is_cut_off_before_a_publication() -> None:
    """A verifier loses its brokers, a standby is published, and a rotation to it is asked for."""
    story = Story()
    try:
        story.cut_off(story.one)
        story.ask()
        story.run(8)
        story.ask()
        story.run(30)
    finally:
        story.world.close()


def something_is_revoked() -> None:
    """A token is revoked, and shown for as long as it lives."""
    story = Story()
    try:
        token = story.world.issue(0)
        assert token is not None
        story.judge.revoked(story.world.brokers[0].revoke(RevocationKind.TOKEN, token.claims.token_id))
        story.run(56)
    finally:
        story.world.close()


def subject_is_revoked_in_a_restored_store() -> None:
    """By a broker that has seen no more than the backup holds."""
    story = Story()
    try:
        world = story.world
        world.brokers[1].store_up = False
        backup = world.data.copy()
        for number in range(3):
            story.judge.revoked(world.brokers[0].revoke(RevocationKind.TOKEN, f"another-token-{number:012d}"))
        story.run(4)
        world.data.restore(backup)
        world.brokers[1].store_up = True
        story.judge.revoked(world.brokers[1].revoke(RevocationKind.SUBJECT, SUBJECTS[0]))
        story.run(56)
    finally:
        world.close()


class Seldom(Poller):
    """One that asks for keys only as often as it must."""

    def go_on(self, brokers: Sequence[Broker]) -> None:
        """Ask when what is known is as old as it may be."""
        age = self.state.keys.staleness(self.moment())
        if age is None or age >= FRESH:
            self._ask(brokers)


def one_who_polls_sees_rotations() -> None:
    """One after the other is asked for."""
    story = Story()
    try:
        story.world.verifiers.append(Seldom(story.world, 2, 0 * SECOND))
        for _ in range(8):
            story.ask()
            story.run(4)
            story.ask()
            story.run(4)
    finally:
        story.world.close()


def laptop_sleeps() -> None:
    """A token is revoked while a laptop sleeps, on which heartbeats are waiting."""
    story = Story()
    try:
        story.one.suspended = True
        story.run(8)
        token = story.world.issue(0)
        assert token is not None
        story.cut_off(story.one)
        story.judge.revoked(story.world.brokers[0].revoke(RevocationKind.TOKEN, token.claims.token_id))
        story.run(50)
        stream = story.one.stream
        story.one.suspended = False
        story.cut_off(story.one, mend=True)
        while stream is not None and stream.down and story.one.stream is stream:
            stream.carry_down()
            story.judge.look()
    finally:
        story.world.close()


def without_new_revocations(patch: pytest.MonkeyPatch) -> None:
    """A verifier that takes a delta for loaded and does not keep it."""
    load = TrustState._load

    def skips(self: TrustState, told: object, revocations: object) -> None:
        load(self, told, type(self.revocations)())  # type: ignore[arg-type]

    patch.setattr(TrustState, "_load", skips)


def fresh_on_receipt(patch: pytest.MonkeyPatch) -> None:
    """A verifier that counts from the receipt."""

    def receive(self: WatchProtocol, response: Response, now: Moment) -> Outcome:
        self._asked_at = lambda answered: now  # type: ignore[method-assign]
        return original(self, response, now)

    original = WatchProtocol.receive
    patch.setattr(WatchProtocol, "receive", receive)


def without_raising(patch: pytest.MonkeyPatch) -> None:
    """Brokers and a store that leave versions as they were given."""
    for place in ("carnet_broker.store_loop", "support.store_fakes"):
        patch.setattr(f"{place}.outrun_entries", lambda *_, **__: ())


def without_the_poller_window(patch: pytest.MonkeyPatch) -> None:
    """Timing that waits for nobody who polls."""
    patch.setattr(type(TIMING), "poller_window", property(lambda _: 0 * SECOND))


def permit_counts_nobody(patch: pytest.MonkeyPatch) -> None:
    """A store that gives every permit."""
    permit = FakeRollout.permit

    def gives(self: FakeRollout, generation: int, kid: str, **more: object) -> object:
        with self._store.data.transaction() as tables:
            tables.sessions = {}
        return permit(self, generation, kid, overdue=True)

    patch.setattr(FakeRollout, "permit", gives)


@pytest.mark.parametrize(
    ("tell", "damage"),
    [
        (subject_is_revoked_in_a_restored_store, without_raising),
        (one_who_polls_sees_rotations, without_the_poller_window),
        (one_is_cut_off_before_a_publication, permit_counts_nobody),
        (something_is_revoked, without_new_revocations),
        (laptop_sleeps, fresh_on_receipt),
    ],
    ids=lambda one: one.__name__,
)
def test_a_guard_that_is_taken_out_is_missed(
    tell: Callable[[], None], damage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    """With it the story ends well, without it a rule breaks."""
    tell()
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        tell()
