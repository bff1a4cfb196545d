"""The rules of `test_trust_model` have teeth: each story here takes a guard out of the real code, and a rule breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from carnet.keysets import Moment
from carnet.revocations import RevocationKind
from carnet.trust_messages import Response
from carnet.trust_state import Outcome, TrustState
from carnet.watch_protocol import WatchProtocol
from support.keyrings import SECOND
from support.store_fakes import FakeRollout
from support.trust_broker import Broker
from support.trust_parts import SUBJECTS, TIMING
from support.trust_poller import FRESH, Poller
from support.trust_story import Story


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
