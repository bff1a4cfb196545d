"""Verifiers of the SDK that follow running brokers, with their store: promise B end to end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from carnet.errors import InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from carnet.identity import Identity
from carnet.v1 import token_pb2, token_pb2_grpc
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS, RunningBroker, start_broker
from support.vault import VaultPlace, prepare
from support.verifiers import KINDS, until, verifying

SETTINGS = {
    "trust": {"heartbeat": "1s", "max_staleness": "20s"},
    "store": {"poll_interval": "100ms"},
    "limits": {"revocations_per_second": 1000, "revocation_burst": 1000},
}
PUSHED_WITHIN = 0.25


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with start_broker(place, tmp_path_factory.mktemp("broker"), settings=SETTINGS) as running:
        yield running


def settings_of(*brokers: RunningBroker, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - those of Verifier
    """Return what a verifier of payments is made with."""
    return {
        "audience": "payments",
        "issuer": ISSUER,
        "trust": [broker.addresses["trust"] for broker in brokers],
        "identity": brokers[0].identity(PAYMENTS),
        "ca_file": brokers[0].ca_file,
        "broker_name": BROKER_NAME,
    } | more


def revoke(broker: RunningBroker, identity: Identity, token: str) -> None:
    """Revoke a token of one's own."""
    with broker.channel(identity) as channel:
        stub = token_pb2_grpc.TokenServiceStub(channel)
        stub.RevokeToken(token_pb2.RevokeTokenRequest(token=token), timeout=10)


async def until_refused(verifier: Any, token: str, caller: Identity) -> float:  # noqa: ANN401 - of either kind
    """Wait until a token is refused as revoked; return for how many seconds it was not."""
    start = time.monotonic()
    while True:
        try:
            await verifier.verify(token, peer_certificate=caller.certificate)
        except InvalidTokenError as error:
            if error.reason is not InvalidTokenReason.REVOKED:
                raise
            return time.monotonic() - start
        assert time.monotonic() - start < 20
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_revoked_token_is_refused_within_a_quarter_of_a_second(kind: str, broker: RunningBroker):
    """From the answer to the revocation to the refusal; a token beside it stays good."""
    caller = broker.identity()
    async with verifying(kind, settings_of(broker)) as verifier:
        await verifier.wait_ready()
        assert "push" == verifier.status().supply
        beside = broker.issue(identity=caller).token
        for _ in range(5):
            token = broker.issue(identity=caller).token
            await verifier.verify(token, peer_certificate=caller.certificate)
            await asyncio.to_thread(revoke, broker, caller, token)
            assert await until_refused(verifier, token, caller) < PUSHED_WITHIN
        await verifier.verify(beside, peer_certificate=caller.certificate)
        await until(lambda: verifier.status().live)


@pytest.mark.parametrize("kind", KINDS)
async def test_another_broker_is_followed_when_one_is_killed_and_the_first_when_it_is_back(
    kind: str, place: VaultPlace, tmp_path: Path
):
    """Two brokers on one store: no good token is refused meanwhile, and what is revoked is."""
    with start_broker(place, tmp_path / "one", settings=SETTINGS) as one:
        store = {"store": {"url": f"sqlite:///{(tmp_path / 'one').resolve()}/store.db", "poll_interval": "100ms"}}
        with start_broker(place, tmp_path / "two", ca=one.ca, settings=SETTINGS | store) as two:
            caller = one.identity()
            token, other = (one.issue(identity=caller).token for _ in range(2))
            async with verifying(kind, settings_of(one, two)) as verifier:
                await verifier.verify(token, peer_certificate=caller.certificate)
                brokers = {broker.addresses["trust"]: broker for broker in (one, two)}
                followed = brokers.pop(verifier.status().target)
                ((address, left),) = brokers.items()
                followed.stop(signal.SIGKILL)
                while verifier.status().target != address:
                    await verifier.verify(token, peer_certificate=caller.certificate)
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(revoke, left, caller, token)
                assert await until_refused(verifier, token, caller) < 1
                await verifier.verify(other, peer_certificate=caller.certificate)


_SUSPENDED = """
import sys, time
from datetime import timedelta
from pathlib import Path
from carnet import Identity, InvalidTokenError, KeySetUnavailableError, Verifier

audience, issuer, trust, name, directory = sys.argv[1:]
files = Path(directory)
verifier = Verifier(
    audience=audience, issuer=issuer, trust=trust, broker_name=name, ca_file=files / "ca.pem",
    identity=Identity.load(files / "own.pem", files / "own-key.pem"), max_staleness=timedelta(seconds=3),
)
token, leaf = (files / "token").read_text(), (files / "leaf.pem").read_bytes()
verifier.wait_ready()
while True:
    try:
        verifier.verify(token, peer_certificate=leaf)
        print("good", flush=True)
    except InvalidTokenError as error:
        print("no", error.reason, flush=True)
    except KeySetUnavailableError:
        print("cannot tell", flush=True)
    time.sleep(0.05)
"""


def test_a_verifier_that_was_suspended_for_longer_than_its_budget_decides_nothing(place: VaultPlace, tmp_path: Path):
    """SIGSTOP, the brokers go away, SIGCONT: not one token is accepted after that, whatever lay in its buffers."""
    with start_broker(place, tmp_path / "broker", settings=SETTINGS) as broker:
        caller, own = broker.identity(), broker.identity(PAYMENTS)
        files = {
            "token": broker.issue(identity=caller).token.encode(),
            "leaf.pem": caller.certificate_chain_pem,
            "own.pem": own.certificate_chain_pem,
            "own-key.pem": own.private_key_pem,
            "ca.pem": broker.ca.root_pem,
        }
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        arguments = ["payments", ISSUER, broker.addresses["trust"], BROKER_NAME, str(tmp_path)]
        with subprocess.Popen(
            [sys.executable, "-c", _SUSPENDED, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            assert process.stdout is not None
            try:
                assert ["good\n"] * 20 == [process.stdout.readline() for _ in range(20)]
                process.send_signal(signal.SIGSTOP)
                time.sleep(4)
                broker.stop(signal.SIGKILL)
                process.send_signal(signal.SIGCONT)
                said = [process.stdout.readline() for _ in range(60)]
            finally:
                process.kill()
    # What was written before it was stopped may still be in the pipe, and one call may have been under way.
    first = said.index("cannot tell\n")
    assert first <= 2
    assert {"cannot tell\n"} == set(said[first:])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_workload_that_serves_no_audience_is_told_so(kind: str, broker: RunningBroker):
    """served_by is what lets a verifier watch: without it nothing is decided, and the error says what to do."""
    stranger = settings_of(broker, identity=broker.identity())
    async with verifying(kind, stranger) as verifier:
        with pytest.raises(KeySetUnavailableError, match="served_by"):
            await verifier.wait_ready(timedelta(seconds=5))
