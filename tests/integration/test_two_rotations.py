"""Rotations that meet: two CI jobs and two replicas at the same moment, and replicas that are killed in the middle.

All of it in processes of their own, on one environment of a real OpenBao, for each key store.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from carnet.jwk import KeySet, PublicJWK
from carnet.testing import CertificateAuthority
from carnet.verify import Expectations, parse_unverified, verify_token
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.commands import Ended, vault_environment
from support.counts import count
from support.forking import Forking, forking
from support.load import Load
from support.lying_vault import Received
from support.measurements import record
from support.running_broker import ISSUER, POLICY, QUICK, RunningBroker, start_broker
from support.vault import VaultPlace, prepare
from support.vault_proxy import VaultProxy, proxy_before

ROUNDS = count("simultaneous_rotations")
KILLS = count("kills_during_rotations")

SKEW = 0.4
# The time in which a request joins a rotation is short, so that rounds may follow each other; that for which a rotation
# waits for verifiers is long enough for both jobs to begin.
SETTINGS: dict[str, dict[str, Any]] = {
    **QUICK,
    "keys": QUICK["keys"] | {"replica_lag": "300ms", "skew": "400ms", "max_age": "1s", "island": "1s"},
    "limits": {"tokens_per_second": 1000, "token_burst": 1000},
}
SHORT_LIVED = POLICY.replace("10m", "2s")
LIVE = {"PENDING", "STANDBY", "ACTIVE", "RETIRED"}


@dataclass
class Scene:
    """One environment with its brokers, and what root sees of it."""

    store: str
    place: VaultPlace
    brokers: list[RunningBroker] = field(default_factory=list)

    def keyring(self) -> dict[str, Any]:
        """Return the keyring document."""
        path = f"{self.place.kv_path}/keyring"
        found = self.place.root().read(path)
        assert found is not None
        content: dict[str, Any] = json.loads(found["data"]["data"]["document"])
        return content

    def version(self) -> int:
        """Return the number of the newest version of the keyring document."""
        found = self.place.root().read(f"{self.place.metadata_path}/keyring")
        assert found is not None
        return int(found["data"]["current_version"])

    def history(self, after: int) -> list[dict[str, Any]]:
        """Return every keyring after version `after`; KV keeps the last ten."""
        kv, path = self.place.root().secrets.kv.v2, f"{self.place.environment}/keyring"
        entries = [
            kv.read_secret_version(path, version, mount_point="carnet", raise_on_deleted_version=True)
            for version in range(after + 1, self.version() + 1)
        ]
        return [json.loads(entry["data"]["data"]["document"]) for entry in entries]

    def time_between(self, request_ids: Iterable[str]) -> timedelta:
        """Return how far apart two requests were made, by Vault's clock."""
        root = self.place.root()
        made = [
            datetime.fromisoformat(
                root.read(f"{self.place.metadata_path}/requests/{request_id}")["data"]["created_time"]
            )
            for request_id in request_ids
        ]
        return abs(made[0] - made[1])

    def settled(self) -> dict[str, Any]:
        """Return the keyring once the plan rests: one ACTIVE, one STANDBY, nothing half done."""
        deadline = time.monotonic() + 15
        while True:
            content = self.keyring()
            states = [key["state"] for key in content["keys"]]
            if states.count("ACTIVE") == states.count("STANDBY") == 1 and "PENDING" not in states:
                return content
            assert time.monotonic() < deadline, f"the keyring does not come to rest: {states}"
            time.sleep(0.05)

    def private_keys(self) -> set[str]:
        """Return the names of the private keys in KV."""
        found = self.place.root().list(f"{self.place.metadata_path}/keys")
        return set() if found is None else set(found["data"]["keys"])

    def transit_kids(self) -> set[str]:
        """Return the names of all keys that Transit holds, whoever knows of them."""
        found = self.place.root().read(f"transit/keys/carnet-{self.place.environment}")
        assert found is not None
        return {
            PublicJWK.of(load_pem_public_key(entry["public_key"].encode())).kid
            for entry in found["data"]["keys"].values()
        }

    def rotate(self, forked: Forking) -> Ended:
        """Run what CI runs, to its end."""
        command = ("carnet_broker", "keys", "rotate", "--wait", "--json", "--timeout", "20s")
        return forked.run(*command, environment=vault_environment(self.place, "ci"))

    def steps(self) -> list[tuple[int, str, str | None]]:
        """Return every step that any broker took: generation, name, key; in the order of generations."""
        return sorted(
            (entry["generation"], entry["step"], entry["kid"])
            for broker in self.brokers
            for entry in broker.log()
            if entry["event"] == "keyring_step"
        )


def activated_at(content: dict[str, Any]) -> datetime:
    """Return since when the ACTIVE key signs."""
    (found,) = [key["activated_at"] for key in content["keys"] if key["state"] == "ACTIVE"]
    return datetime.fromisoformat(found)


def in_state(content: dict[str, Any], *states: str) -> list[str]:
    """Return the names of the keys in one of `states`."""
    return [key["jwk"]["kid"] for key in content["keys"] if key["state"] in states]


def kid_of(broker: RunningBroker) -> str:
    """Return the name of the key that a broker signs with."""
    return parse_unverified(broker.issue("payments").token).kid


def is_good(broker: RunningBroker, verifier_at: RunningBroker | None = None) -> None:
    """Show that a token of `broker` is good by the keys of `verifier_at`."""
    identity = broker.identity()
    token = broker.issue("payments", identity=identity).token
    verify_token(
        token,
        keys=KeySet.parse((verifier_at or broker).key_set().jwks),
        expectations=Expectations(issuer=ISSUER, audience="payments"),
        peer_thumbprint=identity.thumbprint,
        now=datetime.now(UTC),
    )


@pytest.fixture(name="scene", scope="module", params=["kv", "transit"])
def _scene(request, openbao, tmp_path_factory) -> Iterator[Scene]:
    """Two brokers on one environment, for all rounds."""
    directory = tmp_path_factory.mktemp("rotations")
    scene = Scene(request.param, prepare(openbao, directory / "login"))
    settings = {**SETTINGS, "keys": SETTINGS["keys"] | {"store": request.param}}
    with ExitStack() as stack:
        stack.callback(scene.place.close)
        for name in ("first", "second"):
            ca = scene.brokers[0].ca if scene.brokers else None
            broker = start_broker(scene.place, directory / name, policy=SHORT_LIVED, settings=settings, ca=ca)
            scene.brokers.append(stack.enter_context(broker))
        yield scene


@pytest.fixture(name="two_machines", scope="module")
def _two_machines(tmp_path_factory) -> Iterator[tuple[ThreadPoolExecutor, list[Forking]]]:
    """Two places to run a job, where a command starts within milliseconds; and how to start both at once."""
    with ExitStack() as stack:
        machines = [stack.enter_context(forking(tmp_path_factory.mktemp("machine"))) for _ in range(2)]
        yield stack.enter_context(ThreadPoolExecutor(2)), machines


@pytest.mark.measured
@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_k01_two_jobs_at_the_same_moment_cause_one_rotation(scene, two_machines):
    """Each round: two `keys rotate --wait` at once, two brokers that both want to act; one rotation, and both are told
    so. No generation is written twice, and what the loser of a race had made is never heard of again.
    """
    lost: set[str] = set()
    started = time.monotonic()
    pool, machines = two_machines
    rounds = tries = 0
    while rounds < ROUNDS:
        tries += 1
        assert tries <= 2 * ROUNDS, "this machine is too slow to make two requests at the same moment"
        before, known = scene.settled(), len(scene.steps())
        # A request that is made sooner after a rotation than the skew joins that one.
        time.sleep(max(0.0, (activated_at(before) - datetime.now(UTC)).total_seconds() + SKEW + 0.1))
        jobs = [pool.submit(scene.rotate, forked) for forked in machines]
        for broker, other in (scene.brokers, scene.brokers[::-1]):
            is_good(broker, other)
        ended = [job.result() for job in jobs]
        assert [0, 0] == [job.code for job in ended], ended
        answers = [json.loads(job.out) for job in ended]
        assert ["done", "done"] == [answer["status"] for answer in answers]
        after = scene.settled()
        steps = [step for _, step, _ in scene.steps()[known:]]
        if scene.time_between(answer["request"] for answer in answers) > timedelta(seconds=SKEW):
            assert steps.count("ActivateKey") in (1, 2), answers
            continue  # Two moments: then a second rotation is what was asked for.
        rounds += 1
        assert [1, 1, 1] == [steps.count(step) for step in ("ActivateKey", "CreateKey", "PublishKey")], answers
        (active,) = in_state(after, "ACTIVE")
        assert [active] == in_state(before, "STANDBY")
        assert {active} == {answer["detail"]["active_kid"] for answer in answers}
        assert in_state(before, "ACTIVE")[0] in in_state(after, "RETIRED")
        if scene.store == "transit":
            # Read in this order: with a STANDBY in the document, whoever made another key has lost already.
            present = scene.transit_kids()
            lost |= present - {key["jwk"]["kid"] for key in scene.settled()["keys"]}
        assert not lost & {key["jwk"]["kid"] for key in after["keys"]}
        assert not lost & KeySet.parse(scene.brokers[0].get("/oauth2/jwks")[1]).keys.keys()
    for broker in scene.brokers:
        broker.wait_for(lambda broker=broker, active=active: active == kid_of(broker), "the broker follows")
    generations = [generation for generation, _, _ in scene.steps()]
    assert [*range(1, len(generations) + 1)] == generations
    adopted = {kid for _, _, kid in scene.steps() if kid is not None}
    assert not lost & adopted
    if scene.store == "kv":
        scene.brokers[0].wait_for(lambda: scene.private_keys() == set(in_state(scene.settled(), *LIVE)), "no orphans")
    else:
        assert set() == scene.private_keys()
    taken_by = {entry["event"] for broker in scene.brokers for entry in broker.log()}
    assert "internal_error" not in taken_by
    record(
        f"simultaneous_rotations_{scene.store}",
        {
            "rounds": ROUNDS,
            "rounds_set_aside_as_two_moments": tries - ROUNDS,
            "seconds": round(time.monotonic() - started, 1),
            "keys_of_lost_races": len(lost),
            "steps_by_broker": [
                sum(entry["event"] == "keyring_step" for entry in broker.log()) for broker in scene.brokers
            ],
        },
    )


class Saboteur:
    """Does something at the n-th write of a broker, when Vault has done it and before the answer is out."""

    def __init__(self, proxy: VaultProxy) -> None:
        self._proxy = proxy
        self._left = 0
        self._act: Callable[[], object] | None = None
        self.struck: str | None = None

    def arm(self, number: int, act: Callable[[], object]) -> None:
        """Call `act` at the `number`-th write from now; its answer is lost."""
        self._left, self._act, self.struck = number, act, None
        self._proxy.otherwise = self._pass

    def _pass(self, received: Received, send: Callable[[bytes], None]) -> None:
        answer = self._proxy.ask(received)
        reads = received.method in ("GET", "LIST") or received.path.startswith(("auth/", "transit/sign/"))
        self._left -= not reads
        if not reads and self._left == 0 and self._act is not None:
            self.struck = f"{received.method} {received.path}"
            self._act()
            raise ConnectionAbortedError
        send(answer)


@pytest.mark.measured
@pytest.mark.timeout(60 + 10 * KILLS)
def test_k02_replicas_killed_at_random_moments_cost_no_caller_anything(scene):
    """One of two brokers is killed (kill -9) again and again while keys rotate, and a new one takes its place. Under
    load on the other: every call is answered, every token is good, and there is always an ACTIVE key.
    """
    ci = RotationClient(scene.place.session("ci"))
    rng = random.Random(1)  # noqa: S311 - picks a moment, guards nothing
    staying, victim = scene.brokers
    with ExitStack() as stack, Load(staying, issues_per_second=40, verifies_per_second=40) as tally:
        for number in range(KILLS):
            time.sleep(SKEW + 0.1)  # A request that is made sooner joins the rotation before it.
            before, version = scene.settled(), scene.version()
            request = ci.submit(RequestKind.ROTATE)
            time.sleep(rng.uniform(0, 0.6))
            victim.process.kill()
            victim.process.wait(10)
            folder = staying.directory.parent / f"next-{number}"
            settings = {**SETTINGS, "keys": SETTINGS["keys"] | {"store": scene.store}}
            victim = stack.enter_context(
                start_broker(scene.place, folder, policy=SHORT_LIVED, settings=settings, ca=staying.ca)
            )
            victim.wait_for(lambda request=request: is_done(ci, request), "the rotation", within=20)
            after = scene.settled()
            assert in_state(before, "STANDBY") == in_state(after, "ACTIVE")
            assert [] == [content for content in scene.history(version) if len(in_state(content, "ACTIVE")) != 1]
            for broker, other in ((staying, victim), (victim, staying)):
                broker.wait_for(lambda broker=broker, after=after: kid_of(broker) in in_state(after, "ACTIVE"), "it")
                is_good(broker, other)
    record(
        f"kills_during_rotations_{scene.store}",
        {"kills": KILLS, "issued": tally.issued, "verified": tally.verified, "refused": dict(tally.refused)},
    )
    assert ({}, {}) == (dict(tally.refused), dict(tally.issue_failures))
    assert KILLS + 1 == len(tally.by_key)


@pytest.fixture(name="sabotaged", scope="module", params=["kv", "transit"])
def _sabotaged(request, openbao, tmp_path_factory) -> Iterator[tuple[Scene, Saboteur, Callable[[], RunningBroker]]]:
    """An environment with one broker at a time, behind a proxy; and how to start the next one."""
    directory = tmp_path_factory.mktemp("sabotaged")
    scene = Scene(request.param, prepare(openbao, directory / "login"))
    ca = CertificateAuthority.create()
    with ExitStack() as stack:
        stack.callback(scene.place.close)
        proxy = stack.enter_context(proxy_before(openbao))
        settings = {
            **SETTINGS,
            # With a long island no key is removed meanwhile, so that each write is one of the rotation.
            "keys": SETTINGS["keys"] | {"store": request.param, "island": "1m"},
            "vault": SETTINGS["vault"] | {"address": proxy.address},
        }

        def start() -> RunningBroker:
            proxy.be_honest()
            folder = directory / f"broker-{len(scene.brokers)}"
            broker = stack.enter_context(
                start_broker(scene.place, folder, policy=SHORT_LIVED, settings=settings, ca=ca)
            )
            scene.brokers.append(broker)
            return broker

        start()
        yield scene, Saboteur(proxy), start


@pytest.mark.parametrize("fate", ["answer lost", "broker killed"])
def test_k02_a_rotation_that_breaks_off_at_any_write_is_completed(sabotaged, fate):
    """At each write of a rotation in turn, its answer is lost, or the broker is killed (kill -9) and a new one started.
    The rotation is completed, once; there was always an ACTIVE key; tokens from before are good after.
    """
    scene, saboteur, start = sabotaged
    breakglass = RotationClient(scene.place.session("breakglass"))
    struck: list[str] = []
    broker = scene.brokers[-1]
    while True:
        before, version = scene.settled(), scene.version()
        (old,), (new,) = in_state(before, "ACTIVE"), in_state(before, "STANDBY")
        assert old == kid_of(broker)
        saboteur.arm(len(struck) + 1, broker.process.kill if fate == "broker killed" else lambda: None)
        request = breakglass.submit(RequestKind.ROTATE_NOW)
        broker.wait_for(lambda request=request: saboteur.struck or is_done(breakglass, request), "the rotation")
        if saboteur.struck is None:
            break
        struck.append(saboteur.struck)
        if fate == "broker killed":
            assert -9 == broker.process.wait(10)
            broker = start()
        broker.wait_for(lambda request=request: is_done(breakglass, request), "the rotation is completed")
        after = scene.settled()
        assert [new] == in_state(after, "ACTIVE")
        broker.wait_for(lambda broker=broker, new=new: new == kid_of(broker), "the broker follows")
        assert old in KeySet.parse(broker.key_set().jwks).keys
        is_good(broker)
        # At no moment none, and never another: this rotation, and only this one.
        signers = [in_state(content, "ACTIVE") for content in scene.history(version)]
        assert [new] in signers
        assert {(old,), (new,)} >= {tuple(kids) for kids in signers}
    # The activation, the new key, its entry, its publication, the answer: each was struck.
    assert {"keyring": 3, "results": 1, "made": 1} == tally(struck)
    # A key whose maker did not live, or did not hear, to enter it into the document stays in KV, named by nobody.
    left = scene.private_keys() - {key["jwk"]["kid"] for key in scene.settled()["keys"]}
    assert len(left) <= (2 if scene.store == "kv" else 0)


def is_done(client: RotationClient, request: str) -> bool:
    """Say whether a request is carried out."""
    result = client.result(request)
    return result is not None and result.status is RequestStatus.DONE


def tally(struck: list[str]) -> dict[str, int]:
    """Count writes by what they write."""
    kinds = [
        "keyring" if path.endswith("/keyring") else "results" if "/results/" in path else "made" for path in struck
    ]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
