"""Stories of rotations, restored stores and cut-off verifiers, each told from its beginning to its end.

They run in the world of `support.trust_world`, and are held to the rules of `test_trust_model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from carnet.revocations import RevocationKind
from carnet_broker.core.rollout import RECOUNT_FOR
from support.keyrings import SECOND
from support.trust_parts import LEASE, MAX_STALENESS, SUBJECTS
from support.trust_poller import Poller
from support.trust_story import WARM, WINDOW, Story
from support.trust_verifier import Verifier


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
