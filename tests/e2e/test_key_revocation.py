"""A signing key is revoked under load, with three replicas: how soon every connected verifier refuses its tokens.

The replicas look at Vault and at the store as often as in production, so that what is fast is so because one tells the
other, and not because all look all the time.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from carnet.errors import InvalidTokenError, KeySetUnavailableError
from carnet.v1 import admin_pb2
from carnet_broker.core.keyring_document import keyring_of_content
from carnet_broker.core.requests import RequestKind
from carnet_broker.edges.vault import RotationClient
from support.admin import ADMINS, admin_stub
from support.counts import count
from support.fleet import start_fleet
from support.fleet_load import FleetLoad, published_in, stream_judges
from support.measurements import record
from support.running_broker import ISSUER, POLICY
from support.spread import milliseconds
from support.vault import prepare

REVOCATIONS = {"by_admin": count("keys_revoked_under_load"), "by_vault": count("keys_revoked_through_vault")}
VERIFIERS = 6
ISSUES_PER_SECOND = 60
BOUND = 1.0
"""Seconds from the moment that a broker has adopted the revocation to the refusal by the last verifier."""
VAULT_POLL = timedelta(seconds=5)

SETTINGS = {
    "keys": {"max_age": "200ms", "poller_interval": 0, "skew": "100ms"},
    "tokens": {"default_life": "60s", "longest_life": "60s"},
    "vault": {"poll_interval": f"{VAULT_POLL.seconds}s"},
}

pytestmark = [pytest.mark.measured, pytest.mark.timeout(120 + 15 * max(REVOCATIONS.values()))]


@contextmanager
def _place(openbao, directory):
    place = prepare(openbao, directory / "login")
    yield place
    place.close()


@pytest.fixture(scope="module")
def fleet(openbao, postgres, tmp_path_factory):
    """Three replicas with the polling of production, and an admin."""
    directory = tmp_path_factory.mktemp("fleet")
    with (
        _place(openbao, directory) as place,
        start_fleet(
            place, postgres, directory / "brokers", policy=POLICY.replace("10m", "60s") + ADMINS, settings=SETTINGS
        ) as started,
    ):
        yield started


class _Watch:
    """One verifier that is shown a token again and again, until it refuses it."""

    def __init__(self, judge, token, caller) -> None:
        self._judge, self._token, self._caller = judge, token, caller
        self.refused_at = 0.0
        """When the first call began that did not accept it: whoever came from then on was refused."""
        self.answered_at = 0.0
        """When that call ended. It asks a broker for the key that it misses, as far as the cooldown lets it."""
        self.reason = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        judge.judge(token, caller, datetime.now(UTC))
        self.thread.start()

    def _run(self):
        while True:
            begun = time.monotonic()
            try:
                self._judge.judge(self._token, self._caller, datetime.now(UTC))
            except (InvalidTokenError, KeySetUnavailableError) as error:
                self.refused_at, self.answered_at = begun, time.monotonic()
                self.reason = str(getattr(error, "reason", error.code))
                return
            time.sleep(0.004)


class _Scene:
    """Revokes the key that signs, again and again, and measures."""

    def __init__(self, fleet, judges, load) -> None:
        self.fleet, self.judges, self.load = fleet, judges, load
        self._ci = RotationClient(fleet.place.session("ci"))
        self._rng = random.Random(1)  # noqa: S311 - picks a replica, guards nothing
        self.from_adopted: list[float] = []
        self.call: list[float] = []
        self.answer: list[float] = []
        self.reasons: Counter[str | None] = Counter()

    def _ready(self):
        """Wait until the standby is out, and a token of the signer is at hand; return kid and token."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            keyring = keyring_of_content(self._ci.keyring(), issuer=ISSUER, store="kv")
            newest = {judge.loaded() for judge in self.judges}
            if keyring.standby is not None and keyring.active is not None and newest == {keyring.generation}:
                for token, kid in list(self.load.latest.values()):
                    if kid == keyring.active.kid:
                        return kid, token
            time.sleep(0.05)
        pytest.fail(f"no standby is out: {keyring}, {newest}")

    def revoke(self, ask):
        """Have the key that signs revoked by `ask`, and wait until every verifier refuses its tokens."""
        kid, token = self._ready()
        watches = [_Watch(judge, token, self.load.caller) for judge in self.judges]
        time.sleep(self._rng.uniform(0.1, 0.6))
        self.load.revoked.add(kid)
        begun = time.monotonic()
        ask(kid)
        self.call.append(time.monotonic() - begun)
        for watch in watches:
            watch.thread.join(30)
        self.reasons.update(watch.reason for watch in watches)
        adopted = self._adopted_at(kid)
        self.from_adopted += [watch.refused_at - adopted for watch in watches]
        self.answer += [watch.answered_at - watch.refused_at for watch in watches]

    def _adopted_at(self, kid):
        """Return when the broker that revoked the key had done so, on the monotonic clock."""
        (at,) = {
            entry["timestamp"]
            for replica in self.fleet
            for entry in replica.broker.log()
            if entry.get("event") == "keyring_step" and entry["step"] == "RevokeKey" and entry["kid"] == kid
        }
        return datetime.fromisoformat(at).timestamp() - (time.time() - time.monotonic())

    def by_admin(self, kid):
        """Ask any replica's AdminService."""
        with admin_stub(self.fleet, self._rng.choice(self.fleet.replicas)) as stub:
            answer = stub.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=kid), timeout=20)
        assert answer.active_key_id not in {"", kid}

    def by_vault(self, kid):
        """Put the request into Vault, where the next replica that looks finds it."""
        RotationClient(self.fleet.place.session("breakglass")).submit(RequestKind.REVOKE, kid)


@pytest.mark.parametrize("way", REVOCATIONS)
def test_all_verifiers_refuse_a_revoked_key_within_a_second_and_no_new_token_is_refused(fleet, way):
    """The standby takes over in the same step. Tokens that come from it are good at once, everywhere."""
    with (
        stream_judges(fleet, VERIFIERS) as judges,
        FleetLoad(fleet, {"stream": judges}, issues_per_second=ISSUES_PER_SECOND, again=False) as load,
    ):
        scene = _Scene(fleet, judges, load)
        started = time.monotonic()
        for _ in range(REVOCATIONS[way]):
            scene.revoke(getattr(scene, way))
        time.sleep(1)
        elapsed = time.monotonic() - started
    not_loaded = load.not_loaded(published_in(fleet))
    figures = {
        "replicas": len(fleet),
        "verifiers": VERIFIERS,
        "keys_revoked": REVOCATIONS[way],
        "seconds": round(elapsed, 1),
        "adopted_to_refused_ms": milliseconds(scene.from_adopted),
        "refusal_took_ms": milliseconds(scene.answer),
        "refusals": dict(scene.reasons),
        "call_ms": milliseconds(scene.call),
        **load.figures(),
        "issued_by_brokers_that_had_not_heard_yet": load.issued_of_revoked.total(),
        "keys_that_signed_before_a_live_verifier_had_loaded_them": len(not_loaded),
    }
    record(f"key_revoked_{way}", figures)
    assert {} == dict(load.issue_failures)
    assert {} == dict(load.refused["stream"])
    assert {} == not_loaded
    assert VERIFIERS * REVOCATIONS[way] == scene.reasons.total() == len(scene.from_adopted)
    assert set(scene.reasons) <= {"UNKNOWN_KEY", KeySetUnavailableError.code}
    assert max(scene.from_adopted) < BOUND
    assert load.issued > 0.6 * ISSUES_PER_SECOND * elapsed
