"""Three brokers on one PostgreSQL and one Vault behave as one, whichever of them dies, restarts or is cut off."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import grpc
import pytest

from carnet import Client, Verifier
from carnet.errors import CarnetError, KeySetUnavailableError
from carnet.jwk import KeySet
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.child_lines import child
from support.fleet import start_fleet
from support.measurements import record
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS, reason_of
from support.vault import prepare
from support.watching import hello, watching

ISLAND = 3.0
STALE = 5.0
SETTINGS = {
    "keys": {
        "max_age": "1s",
        "poller_interval": 0,
        "replica_lag": "500ms",
        "skew": "200ms",
        "min_interval": 0,
        "confirm_within": "1s",
        "island": f"{ISLAND:.0f}s",
    },
    "vault": {"poll_interval": "200ms", "timeout": "1s"},
    "store": {"poll_interval": "200ms", "lease": "3s", "timeout": "1s"},
    "trust": {"heartbeat": "500ms", "max_staleness": f"{STALE:.0f}s"},
}
WITHIN = 20.0
BUDGET = timedelta(seconds=10)
"""Of verifiers. One that cannot say goodbye, as no broker is there to hear it, is waited for until this is over."""

pytestmark = pytest.mark.measured


@contextmanager
def _place(openbao, directory):
    place = prepare(openbao, directory / "login")
    yield place
    place.close()


@pytest.fixture(name="fleet", scope="module")
def _fleet(openbao, postgres, tmp_path_factory):
    """Each test leaves it as it found it: all run, and are ready."""
    directory = tmp_path_factory.mktemp("fleet")
    with (
        _place(openbao, directory) as place,
        start_fleet(place, postgres, directory / "brokers", settings=SETTINGS, cuttable=True) as started,
    ):
        yield started


@pytest.fixture(autouse=True)
def _all_ready(fleet):
    yield
    for replica in fleet:
        if not replica.running:
            replica.start()
    for replica in fleet:
        until(lambda replica=replica: is_well(replica), "all is well")


def until(true, what, within=WITHIN):
    """Wait for it; return how long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < within, f"not within {within} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun


def is_well(replica):
    """Say whether a replica is ready, and nothing is amiss."""
    status, _ = replica.broker.get("/readyz")
    return status == 200 and not replica.broker.readiness()["degraded"]


def kid_of(replica):
    """Return the key that a replica signs with, or the reason why it does not."""
    try:
        return parse_unverified(replica.broker.issue().token).kid
    except grpc.RpcError as error:
        return reason_of(error)


def served_by(replica):
    """Return the names of the keys that a replica serves."""
    return set(KeySet.parse(replica.broker.get("/oauth2/jwks")[1]).keys)


def revoke(replica, token, caller):
    """Revoke a token through one replica; return the version."""
    with replica.broker.channel(caller) as channel:
        request = token_pb2.RevokeTokenRequest(token=token)
        return token_pb2_grpc.TokenServiceStub(channel).RevokeToken(request, timeout=10).revocation_version


def rotate(fleet):
    """Have CI rotate; return when it is done."""
    ci = RotationClient(fleet.place.session("ci"))
    time.sleep(0.3)  # More than the skew: a request that is made sooner joins the rotation before it.
    request = ci.submit(RequestKind.ROTATE)
    told = []

    def is_done():
        told[:] = [ci.result(request)]
        return told[0] is not None and told[0].status is RequestStatus.DONE

    until(is_done, ("the rotation", told))


def open_verifier(stack, fleet, targets=None):
    """Open a verifier for the length of the block."""
    verifier = stack.enter_context(
        Verifier(
            audience="payments",
            issuer=ISSUER,
            trust=targets or fleet.targets("trust"),
            identity=fleet.identity(PAYMENTS),
            ca_file=fleet.ca_file,
            broker_name=BROKER_NAME,
            max_staleness=BUDGET,
        )
    )
    verifier.wait_ready(timedelta(seconds=WITHIN))
    return verifier


def verdict(verifier, token, caller):
    """Return ``accepted``, or why not."""
    try:
        verifier.verify(token, peer_certificate=caller.certificate)
    except CarnetError as error:
        return str(getattr(error, "reason", error.code))
    return "accepted"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_replica_may_be_killed_and_started_again(fleet, number):
    """kill -9 of one: the others rotate and revoke meanwhile; started again, it knows all of it from its first answer,
    and nobody could tell which of them issued or revoked what.
    """
    caller = fleet.identity()
    killed = fleet[number]
    others = [replica for replica in fleet if replica is not killed]
    with ExitStack() as stack:
        verifier = open_verifier(stack, fleet)
        before = killed.broker.issue(identity=caller).token
        killed.kill()
        rotate(fleet)
        until(lambda: len({kid_of(replica) for replica in others}) == 1, "the others sign with one key")
        assert "accepted" == verdict(verifier, before, caller)
        version = revoke(others[0], before, caller)
        until(lambda: verdict(verifier, before, caller) == "REVOKED", "the revocation")
        killed.start()
        after = killed.broker.issue(identity=caller).token
        unverified = parse_unverified(after)
        assert kid_of(others[0]) == unverified.kid
        assert version <= unverified.unverified_payload["rv"]
        assert "accepted" == verdict(verifier, after, caller)
        assert version < revoke(killed, after, caller)
        until(lambda: verdict(verifier, after, caller) == "REVOKED", "the revocation by the one that was killed")
        assert len({frozenset(served_by(replica)) for replica in fleet}) == 1


def test_a_rolling_restart_fails_no_issue_and_refuses_no_good_token(fleet):
    """Each replica is stopped as an upgrade does it and started again, under load by a client that knows all of them.
    Verifiers follow whoever is there.
    """
    caller = fleet.identity()
    tally: Counter[str] = Counter()
    stop = threading.Event()
    with ExitStack() as stack:
        verifiers = [open_verifier(stack, fleet) for _ in range(3)]
        client = stack.enter_context(
            Client(brokers=fleet.targets("tokens"), identity=caller, ca_file=fleet.ca_file, broker_name=BROKER_NAME)
        )

        def load():
            beat = 0
            while not stop.wait(0.04):
                beat += 1
                try:
                    # Another life each time: what is at hand already would need no broker.
                    token = client.get_token("payments", ttl=timedelta(seconds=30 + beat % 500))
                except CarnetError as error:
                    tally[f"not issued: {error}"] += 1
                    continue
                tally["issued"] += 1
                for verifier in verifiers:
                    tally[verdict(verifier, token.value, caller)] += 1

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for replica in fleet:
                time.sleep(0.5)
                replica.restart()
                until(lambda replica=replica: is_well(replica), "ready")
            time.sleep(0.5)
        finally:
            stop.set()
            thread.join(10)
    record("rolling_restart", {"replicas": len(fleet), "verifiers": len(verifiers), **tally})
    assert {"issued", "accepted"} == set(tally)
    assert tally["issued"] > 20
    assert 3 * tally["issued"] == tally["accepted"]


def test_a_replica_without_vault_goes_on_by_the_word_of_the_store(fleet):
    """Longer than its island, degraded and ready. When the others rotate, it learns of the later key from the mirror:
    it serves the new key, signs with it as it held it as the standby, and with none once it holds none.
    """
    alone, *others = fleet
    caller = fleet.identity()
    with ExitStack() as stack:
        verifier = open_verifier(stack, fleet, targets=[alone.addresses["trust"]])
        first = kid_of(alone)
        with alone.cut_off(vault=True):
            time.sleep(ISLAND + 1)
            assert first == kid_of(alone)
            assert 200 == alone.broker.get("/readyz")[0]
            assert any(text.startswith("vault:") for text in alone.broker.readiness()["degraded"])
            rotate(fleet)
            until(lambda: len(kids := {kid_of(replica) for replica in others}) == 1 and first not in kids, "a new key")
            second = kid_of(others[0])
            until(lambda: kid_of(alone) == second, "the key that it held as the standby")
            until(lambda: served_by(others[0]) == served_by(alone), "what it serves")
            rotate(fleet)
            until(
                lambda: len(kids := {kid_of(replica) for replica in others}) == 1 and second not in kids, "a third key"
            )
            until(lambda: kid_of(alone) == "NO_SIGNING_KEY", "it does not hold the third")
            assert 503 == alone.broker.get("/readyz")[0]
            until(lambda: served_by(others[0]) == served_by(alone), "what it serves")
            token = others[0].broker.issue(identity=caller).token
            until(lambda: verdict(verifier, token, caller) == "accepted", "its verifiers know the third key")
        until(lambda: kid_of(alone) == kid_of(others[0]), "it signs again")


def test_a_replica_without_the_store_is_ready_within_the_budget_and_then_lets_its_verifiers_go(fleet):
    """It issues, degraded, until what it knows of revocations is older than the budget; then it ends its streams. Its
    verifiers go to others, and refuse what is revoked meanwhile.
    """
    alone, *others = fleet
    caller = fleet.identity()
    with ExitStack() as stack:
        following = stack.enter_context(watching(alone.broker, hello(max_staleness=10)))
        following.wait_for(lambda response: response.live)
        verifiers = [open_verifier(stack, fleet) for _ in range(4)]
        token = alone.broker.issue(identity=caller).token
        with alone.cut_off(store=True):
            cut = time.monotonic()
            until(lambda: alone.broker.readiness()["degraded"], "degraded")
            assert 200 == alone.broker.get("/readyz")[0]
            assert "store: the last look at it failed; the log says why" in alone.broker.readiness()["degraded"]
            assert kid_of(others[0]) == kid_of(alone)
            error = following.wait_for_end(STALE + 5)
            took = time.monotonic() - cut
            assert error is not None
            assert grpc.StatusCode.UNAVAILABLE == error.code()
            # The last look at the store may be a moment before the cut.
            assert STALE - 1 < took < STALE + 2
            until(lambda: kid_of(alone) == "STORE_UNAVAILABLE", "it issues nothing")
            assert 503 == alone.broker.get("/readyz")[0]
            elsewhere = {replica.addresses["trust"] for replica in others}
            until(lambda: {one.status().target for one in verifiers} <= elsewhere, "verifiers that went elsewhere")
            revoke(others[0], token, caller)
            for verifier in verifiers:
                until(lambda verifier=verifier: verdict(verifier, token, caller) == "REVOKED", "the revocation")
        until(lambda: kid_of(alone) == kid_of(others[0]), "it issues again")
        again = stack.enter_context(watching(alone.broker, hello("two", max_staleness=10)))
        until(
            lambda: again.position.revocation_version == verifiers[0].position().revocation_version,
            "it tells of what was revoked meanwhile",
        )


def test_a_replica_without_vault_and_store_stops_signing_when_its_island_is_over(fleet):
    """Then a later key may sign elsewhere. Mended, it goes on by itself."""
    alone, *others = fleet
    kid = kid_of(alone)
    answers = []
    with alone.cut_off(vault=True, store=True):
        cut = time.monotonic()
        while (at := time.monotonic() - cut) < ISLAND + 1:
            answers.append((at, kid_of(alone)))
            time.sleep(0.1)
        assert kid == answers[0][1]
        # The last look was before the cut, so the island is over before ISLAND has passed since.
        assert {"NO_SIGNING_KEY"} == {answer for at, answer in answers if at > ISLAND}
        assert {kid, "NO_SIGNING_KEY"} == {answer for _, answer in answers}
        rotate(fleet)
        until(lambda: len(kids := {kid_of(one) for one in others}) == 1 and kid not in kids, "the others rotate")
        # By then what it knows of revocations may be too old as well.
        assert kid_of(alone) in {"NO_SIGNING_KEY", "STORE_UNAVAILABLE"}
    until(lambda: kid_of(alone) == kid_of(others[0]), "it signs with the key of the others")


def test_a_verifier_that_starts_while_all_brokers_are_down_lives_on_what_was_kept(fleet, tmp_path):
    """It is killed, and so are all brokers. The next process verifies, and refuses what was revoked, until the budget
    is over; then it says why it cannot tell. When brokers come back it goes on by itself.
    """
    caller = fleet.identity()
    certificate, key = fleet.ca.issue(PAYMENTS).write(tmp_path, "payments")
    (tmp_path / "caller.pem").write_bytes(caller.certificate_chain_pem)
    budget = 8.0
    settings = {
        "certificate": str(certificate),
        "key": str(key),
        "caller_certificate": str(tmp_path / "caller.pem"),
        "audience": "payments",
        "issuer": ISSUER,
        "trust": fleet.targets("trust"),
        "ca_file": str(fleet.ca_file),
        "broker_name": BROKER_NAME,
        "max_staleness": budget,
        "state_dir": str(tmp_path / "state"),
    }
    good, bad = (fleet[number].broker.issue(identity=caller).token for number in (0, 1))
    with child("support.verifying_process", **settings) as first:
        revoke(fleet[2], bad, caller)
        until(lambda: first.ask(do="verify", token=bad) == {"verdict": "REVOKED"}, "the revocation")
        time.sleep(1)  # What changed last is on the disk after a moment.
        first.kill()
        killed = time.monotonic()
        for replica in fleet:
            replica.kill()
    with child("support.verifying_process", **settings) as second:
        assert {"verdict": "REVOKED"} == second.ask(do="verify", token=bad)
        assert {"verdict": "accepted"} == second.ask(do="verify", token=good)
        last = {}

        def cannot_tell():
            last.update(second.ask(do="verify", token=good))
            return last["verdict"] != "accepted"

        until(cannot_tell, "the end of the budget", within=budget + 2)
        assert budget - 3 < time.monotonic() - killed < budget + 1
        assert KeySetUnavailableError.code == last["verdict"]
        assert "over the limit of 8 s, and no newer one could be had" in last["why"]
        for replica in fleet:
            replica.start()
        until(lambda: second.ask(do="verify", token=good) == {"verdict": "accepted"}, "it can tell again")
        assert {"verdict": "REVOKED"} == second.ask(do="verify", token=bad)
