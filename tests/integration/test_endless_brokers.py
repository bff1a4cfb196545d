"""Verifiers against a broker whose answer does not end: it is left for the next one, and the log says why."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from carnet.revocations import Position, RevocationKind
from carnet.trust_state import MAX_GENERATION_JUMP
from carnet.v1 import trust_pb2
from support.broker_stub import BrokerStub, wire_entry
from support.verifiers import KINDS, Scene, stage, until, verifying


@pytest.fixture(name="scene")
def _scene(tmp_path: Path) -> Iterator[Scene]:
    with stage(tmp_path, "stream") as scene:
        yield scene


@pytest.fixture(name="honest")
def _honest(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokerStub]:
    """Run a second broker, with a revocation. Verifiers ask the first one first."""
    monkeypatch.setattr(random, "randrange", lambda _count: 0)
    with BrokerStub.start(scene.broker.ca, signing_key=scene.broker.signing_key) as other:
        other.revoke(RevocationKind.TOKEN, "token-0123456789012345")
        yield other


def part(broker: BrokerStub, *, more: bool) -> trust_pb2.RevocationChange:
    """Return a part of a snapshot that brings nothing."""
    position = broker.position
    return trust_pb2.RevocationChange(
        to_version=position.revocation_version, to_digest=position.revocation_digest, snapshot=True, more=more
    )


def endless(broker: BrokerStub, *, more: bool) -> Iterator[trust_pb2.RevocationChange]:
    """Yield parts for ever."""
    while True:
        yield part(broker, more=more)


def log_of(caplog: pytest.LogCaptureFixture, target: str) -> str:
    """Return what was logged of a broker."""
    return "\n".join(record.message for record in caplog.records if target in record.message)


@pytest.mark.parametrize("kind", KINDS)
async def test_k15_a_stream_of_parts_without_end_is_left(
    kind: str, scene: Scene, honest: BrokerStub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The broker's word never becomes whole: the next broker is followed, and decides."""
    caplog.set_level("WARNING", "carnet.trust")
    liar = scene.broker
    monkeypatch.setattr(liar, "changes_since", lambda _since: endless(liar, more=True))
    async with verifying(kind, scene.settings, trust=[liar.target, honest.target]) as verifier:
        await verifier.wait_ready()
        await until(lambda: verifier.status().target == honest.target)
        assert 1 == verifier.status().revocation_version
    assert "a part of a change has no entries, and says that more will come" in log_of(caplog, liar.target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lie",
    [(True, "a part of a change has no entries"), (False, "its answer goes on after its end")],
    ids=["no end", "after its end"],
)
async def test_k15_a_poll_whose_answer_does_not_end_is_put_to_the_next_broker(
    kind: str,
    lie: tuple[bool, str],
    scene: Scene,
    honest: BrokerStub,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """Long before the time limit of the poll, so that the next one has time to answer."""
    caplog.set_level("WARNING", "carnet.trust")
    (more, why), liar = lie, scene.broker
    monkeypatch.setattr(liar, "changes_since", lambda _since: endless(liar, more=more))
    settings = scene.settings | {"mode": "poll", "trust": [liar.target, honest.target]}
    async with verifying(kind, settings) as verifier:
        await verifier.wait_ready(timedelta(seconds=3))
        assert (1, 1) == (verifier.status().revocation_version, liar.revocation_calls)
    assert why in log_of(caplog, liar.target)


@pytest.mark.parametrize("kind", KINDS)
async def test_k15_an_answer_to_a_poll_that_is_cut_short_is_none(
    kind: str,
    scene: Scene,
    honest: BrokerStub,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """The last part did not come: nothing of it is loaded, and the next broker is asked."""
    caplog.set_level("WARNING", "carnet.trust")
    liar = scene.broker
    liar.revoke(RevocationKind.TOKEN, "token-5432109876543210")
    cut = part(liar, more=True)
    cut.revocations.append(wire_entry(liar.log[0]))
    monkeypatch.setattr(liar, "changes_since", lambda _since: [cut])
    settings = scene.settings | {"mode": "poll", "trust": [liar.target, honest.target]}
    async with verifying(kind, settings) as verifier:
        await verifier.wait_ready(timedelta(seconds=3))
        assert honest.position == verifier.position()
    assert "its answer has no end" in log_of(caplog, liar.target)


@pytest.mark.parametrize("kind", KINDS)
async def test_k15_a_generation_far_ahead_is_not_believed_of_a_poll(
    kind: str, scene: Scene, honest: BrokerStub, caplog: pytest.LogCaptureFixture
):
    """Who believed it would find every honest broker behind. The next broker is asked, and the log says why."""
    caplog.set_level("WARNING", "carnet.trust")
    liar = scene.broker
    for broker in (liar, honest):
        broker.max_age = timedelta(seconds=1)
    async with verifying(kind, scene.settings, mode="poll", trust=[liar.target, honest.target]) as verifier:
        await verifier.wait_ready()
        liar.generation = 2 + MAX_GENERATION_JUMP
        honest.generation = 2
        await until(lambda: verifier.status().generation == 2)
    assert f"it names generation {2 + MAX_GENERATION_JUMP}, 1 is loaded" in log_of(caplog, liar.target)


@pytest.mark.parametrize("kind", KINDS)
async def test_k15_an_epoch_far_ahead_is_not_believed_of_a_stream(
    kind: str, scene: Scene, honest: BrokerStub, caplog: pytest.LogCaptureFixture
):
    """The next broker is followed; the log names the clock of this host as a possible cause."""
    caplog.set_level("WARNING", "carnet.trust")
    liar = scene.broker
    liar.restore(2**42)  # In the year 2109.
    async with verifying(kind, scene.settings, trust=[liar.target, honest.target]) as verifier:
        await verifier.wait_ready()
        await until(lambda: verifier.status().target == honest.target)
        position: Position | None = verifier.position()
    assert honest.position == position
    assert "ahead of the clock of this host" in log_of(caplog, liar.target)
    assert "set that clock if it is behind" in log_of(caplog, liar.target)
