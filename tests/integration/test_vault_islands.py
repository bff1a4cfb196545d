"""A broker that is cut off from Vault, or from Vault and the store: for how long it may sign, and how it comes back.

Elsewhere a later key may be signing by then, which Vault knows, and the store. So a replica that can reach neither
signs on its own for `island` and no longer, by the clock on the wall as well: a process that was stopped, or a machine
that slept, looks again before it signs again. While the store says that there is no later key, nothing is amiss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from carnet.verify import parse_unverified
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.fleet import Replica, start_fleet
from support.running_broker import POLICY, QUICK, RunningBroker, reason_of
from support.tcp_proxy import TcpProxy
from support.vault import VaultPlace, prepare

ISLAND = 2.0
SETTINGS = {
    **QUICK,
    "vault": {"timeout": "1s", "poll_interval": "200ms"},
    "store": {"timeout": "1s", "poll_interval": "200ms"},
}


@dataclass
class Replicas:
    """Two brokers of one environment and one store; what is before and behind the first one is in the test's hand."""

    first: Replica
    second: RunningBroker
    place: VaultPlace

    def rotate_now(self) -> str:
        """Make the second one swap the signing key at once; return the new key's name."""
        breakglass = RotationClient(self.place.session("breakglass"))
        request = breakglass.submit(RequestKind.ROTATE_NOW)
        self.second.wait_for(
            lambda: (r := breakglass.result(request)) is not None and r.status is RequestStatus.DONE, "the rotation"
        )
        return str(breakglass.result(request).detail["active_kid"])

    @contextmanager
    def without(self, what: str, how: Callable[[TcpProxy], None] = TcpProxy.cut) -> Iterator[None]:
        """Take "vault", "store", "vault and store" or "nothing" from the first one, for the length of the block."""
        lines = {"vault": self.first.vault, "store": self.first.store}
        taken = [line for name, line in lines.items() if name in what]
        try:
            for line in taken:
                how(line)
            yield
        finally:
            for line in taken:
                line.mend()


@pytest.fixture(scope="module", name="replicas")
def _replicas(openbao, postgres, tmp_path_factory) -> Iterator[Replicas]:
    directory = tmp_path_factory.mktemp("islands")
    place = prepare(openbao, directory / "login")
    policy = POLICY.replace("10m", "2s")
    with ExitStack() as stack:
        stack.callback(place.close)
        fleet = stack.enter_context(
            start_fleet(place, postgres, directory, replicas=2, policy=policy, settings=SETTINGS, cuttable=True)
        )
        yield Replicas(fleet[0], fleet[1].broker, place)


def signed_by(broker: RunningBroker) -> str:
    """Return the name of the key behind a new token, or the reason why there is none."""
    try:
        return parse_unverified(broker.issue("payments").token).kid
    except grpc.RpcError as error:
        refusal = error
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(refusal).details)
    assert (grpc.StatusCode.UNAVAILABLE, True) == (refusal.code(), retry.retry_delay.ToTimedelta() > timedelta(0))
    return reason_of(refusal)


def health(broker: RunningBroker) -> int:
    """Return what the token listener says of itself."""
    with broker.channel() as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status


@pytest.mark.parametrize("how", [TcpProxy.cut, TcpProxy.hang], ids=["hang up", "hang"])
def test_k09_a_broker_without_vault_and_store_stops_signing_when_its_island_is_over(replicas, how):
    """It signs until then, and is not ready after; it serves the key set all along, says how old that is, and recovers
    by itself.
    """
    broker = replicas.first.broker
    broker.wait_for(lambda: broker.readiness()["ready"], "ready")
    kid = signed_by(broker)
    jwks = broker.get("/oauth2/jwks")
    with replicas.without("vault and store", how):
        cut_off = time.monotonic()
        answers = []
        while time.monotonic() - cut_off < ISLAND + 1:
            asked = time.monotonic()
            answers.append((asked - cut_off, signed_by(broker)))
            time.sleep(0.1)
        assert kid == answers[0][1]
        assert {kid, "NO_SIGNING_KEY"} == {answer for _, answer in answers}
        # The last look at either was before it was cut off, so the island is over before ISLAND has passed since.
        assert [] == [(at, answer) for at, answer in answers if at > ISLAND and answer == kid]
        assert 503 == broker.get("/readyz")[0]
        (problem,) = broker.readiness()["problems"]
        assert problem.startswith("signing key: neither Vault nor the store was reached")
        broker.wait_for(lambda: health(broker) == health_pb2.HealthCheckResponse.NOT_SERVING, "its health")
        assert jwks == broker.get("/oauth2/jwks")
        assert broker.key_set().age.ToTimedelta() > timedelta(seconds=ISLAND)
        assert (200, "ok\n") == broker.get("/livez")
    broker.wait_for(lambda: broker.readiness()["ready"], "ready again")
    assert kid == signed_by(broker)
    broker.wait_for(lambda: health(broker) == health_pb2.HealthCheckResponse.SERVING, "its health")


@pytest.mark.parametrize("gone", ["vault", "store"])
def test_k09_a_broker_that_has_one_of_them_goes_on_when_its_island_is_over(replicas, gone):
    """Either says that no later key signs, so that no token fails; and says when one does, which then signs here."""
    broker = replicas.first.broker
    broker.wait_for(lambda: broker.readiness()["ready"], "ready")
    old = signed_by(broker)
    with replicas.without(gone):
        cut_off = time.monotonic()
        answers = []
        while time.monotonic() - cut_off < 2 * ISLAND:
            answers.append(signed_by(broker))
            time.sleep(0.1)
        assert {old} == {*answers}
        assert broker.readiness()["ready"]
        new = replicas.rotate_now()
        assert old != new
        broker.wait_for(lambda: signed_by(broker) == new, "the new key")
        assert broker.readiness()["ready"]


@pytest.mark.parametrize("gone", ["nothing", "vault", "store", "vault and store"])
def test_a_broker_that_was_stopped_for_longer_than_its_island_does_not_sign_with_an_old_key(replicas, gone):
    """It is stopped, elsewhere the key is swapped, it goes on: from the first call its tokens are by the new key, or
    there are none while it can ask neither Vault nor the store.
    """
    broker = replicas.first.broker
    broker.wait_for(lambda: broker.readiness()["ready"], "ready")
    old = signed_by(broker)
    with ExitStack() as stack:
        with replicas.first.paused():
            stopped = time.monotonic()
            new = replicas.rotate_now()
            assert old != new
            time.sleep(max(0.0, stopped + ISLAND + 0.5 - time.monotonic()))
            stack.enter_context(replicas.without(gone))
        answers = [signed_by(broker) for _ in range(10)]
    assert {*answers} <= {new, "NO_SIGNING_KEY"}
    if gone == "vault and store":
        assert {"NO_SIGNING_KEY"} == {*answers}
    broker.wait_for(lambda: signed_by(broker) == new, "the new key")
    assert broker.readiness()["ready"]


def test_a_broker_that_was_stopped_within_its_island_goes_on(replicas):
    """A short stop is nothing: what it knew is still allowed to be true."""
    broker = replicas.first.broker
    kid = signed_by(broker)
    with replicas.first.paused():
        time.sleep(ISLAND / 4)
    assert [kid] * 3 == [signed_by(broker) for _ in range(3)]
