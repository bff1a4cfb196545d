"""A verifier that stops answering: it holds up a rotation until the deadline, is named everywhere, and then no more."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest

from carnet.v1 import admin_pb2
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.admin import ADMIN, ADMINS, admin_stub
from support.commands import run_command, vault_environment
from support.fleet import start_fleet
from support.fleet_load import stream_judges
from support.running_broker import BROKER_NAME, PAYMENTS, POLICY, QUICK
from support.vault import prepare
from support.watching import hello, watching

ACKNOWLEDGE_WITHIN = timedelta(seconds=6)
SILENT = "payments-7"
SETTINGS = {
    **QUICK,
    "keys": {
        **QUICK["keys"],
        "max_age": "200ms",
        "skew": "100ms",
        "island": "5s",
        "acknowledge_within": f"{ACKNOWLEDGE_WITHIN.seconds}s",
    },
    "store": {"poll_interval": "200ms"},
}

pytestmark = pytest.mark.measured


@contextmanager
def _place(openbao, directory):
    place = prepare(openbao, directory / "login")
    yield place
    place.close()


@pytest.fixture
def fleet(openbao, postgres, tmp_path):
    """Two replicas with a short deadline, and an admin."""
    policy = POLICY.replace("10m", "2s") + ADMINS
    with (
        _place(openbao, tmp_path) as place,
        start_fleet(place, postgres, tmp_path / "brokers", replicas=2, policy=policy, settings=SETTINGS) as started,
    ):
        yield started


class _Rotation:
    """One rotation by CI, from its request on."""

    def __init__(self, fleet) -> None:
        self._client = RotationClient(fleet.place.session("ci"))
        self.begun = time.monotonic()
        self._request = self._client.submit(RequestKind.ROTATE)

    def wait_for(self, condition):
        """Return the first answer for which `condition` holds, and how long that took."""
        while time.monotonic() < self.begun + 30:
            result = self._client.result(self._request)
            if result is not None and condition(result):
                return result, time.monotonic() - self.begun
            time.sleep(0.05)
        pytest.fail(f"not within 30 s: {result}")

    def wait_until_done(self):
        """Return how long it took."""
        return self.wait_for(lambda result: result.status is RequestStatus.DONE)[1]


def status_of(fleet, replica):
    """Return what GetStatus says at a replica."""
    with admin_stub(fleet, replica) as stub:
        return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10)


def status_command(fleet, replica):
    """Return what ``keys status`` prints, as text and as JSON."""
    fleet.ca.issue(ADMIN).write(fleet.directory, "admin")
    environment = vault_environment(fleet.place, "ci") | {
        "CARNET_ADMIN": replica.addresses["admin"],
        "CARNET_CERT_FILE": str(fleet.directory / "admin.pem"),
        "CARNET_KEY_FILE": str(fleet.directory / "admin-key.pem"),
        "CARNET_CA_FILE": str(fleet.ca_file),
        "CARNET_BROKER_NAME": BROKER_NAME,
    }
    text = run_command("carnet_broker", "keys", "status", environment=environment)
    assert 0 == text.code, text
    as_json = run_command("carnet_broker", "keys", "status", "--json", environment=environment)
    return text.out, json.loads(as_json.out)


def test_a_verifier_that_stops_answering_is_named_and_holds_up_one_rotation_until_the_deadline(fleet):
    """The first rotation waits for it, and says for whom; the second does not; once it answers it counts again."""
    first, second = fleet
    with (
        stream_judges(fleet, 2),
        watching(first.broker, hello(SILENT), answers=False) as silent,
        ThreadPoolExecutor(1) as waiting,
    ):
        silent.wait_for(lambda response: response.position.generation)
        silent.answer(1)
        # The standby that it has already is no trouble.
        assert _Rotation(fleet).wait_until_done() < ACKNOWLEDGE_WITHIN.total_seconds()
        time.sleep(0.2)

        held = _Rotation(fleet)
        done = waiting.submit(held.wait_until_done)
        result, _ = held.wait_for(lambda result: result.reason == "WAITING_FOR_VERIFIERS")
        assert [f"{PAYMENTS} {SILENT}"] == result.detail["waiting_for"]
        told = status_of(fleet, second)  # Not the one that it watches.
        assert (3, 1, False) == (told.live_verifiers, told.rollout.missing, told.rollout.permitted)
        assert [SILENT] == [one.instance_id for one in told.verifiers if one.lagging]
        text, as_json = status_command(fleet, second)
        assert any("LAGS" in line and f"{PAYMENTS} {SILENT}" in line for line in text.splitlines()), text
        assert [SILENT] == [one["instance_id"] for one in as_json["brokers"]["verifiers"] if one["lagging"]]
        # A request and the store have clocks that need not agree to the last moment.
        assert ACKNOWLEDGE_WITHIN.total_seconds() - 0.5 < done.result() < ACKNOWLEDGE_WITHIN.total_seconds() + 4
        permits = [
            entry for replica in fleet for entry in replica.broker.log() if entry.get("event") == "key_permitted"
        ]
        left_behind = {(entry["kid"], *entry["left_behind"]) for entry in permits if entry["left_behind"]}
        assert {(told.rollout.key_id, f"{PAYMENTS} {SILENT}")} == left_behind
        time.sleep(0.2)

        assert _Rotation(fleet).wait_until_done() < ACKNOWLEDGE_WITHIN.total_seconds() / 2
        # The others have the newest key in a moment; this one is not counted among those that miss it.
        second.broker.wait_for(lambda: status_of(fleet, second).rollout.missing == 0, "the others to answer")
        told = status_of(fleet, second)
        assert 3 == told.live_verifiers
        assert [SILENT] == [one.instance_id for one in told.verifiers if one.lagging]

        answered = 1

        def counts_again():
            nonlocal answered
            for number in range(answered + 1, len(silent.responses) + 1):
                silent.answer(number)
                answered = number
            return not any(one.lagging for one in status_of(fleet, second).verifiers)

        first.broker.wait_for(counts_again, "the verifier to count again")
