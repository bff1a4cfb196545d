"""How fast a revocation reaches verifiers that never call home: three replicas, fifty verifiers, load running."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import pytest

from carnet import Verifier
from carnet.errors import InvalidTokenError, InvalidTokenReason, KeySetUnavailableError
from support.child_lines import child
from support.counts import count, form
from support.fleet import start_fleet
from support.measurements import record
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS
from support.spread import callers, milliseconds, revoke_one_by_one, together, verifier_processes
from support.tcp_proxy import proxy_to
from support.vault import prepare

VERIFIERS = 50
REVOCATIONS = count("revocations_under_load")
UNNOTIFIED = count("revocations_without_notify")
STREAMS = count("watch_streams")
TO_STREAMS = count("revocations_to_streams")
P50, P99 = 50, 250
"""Milliseconds."""
TIMES = {"quick": 10, "full": 1}[form()]
"""`make test` is for machines that do other things as well."""
BUDGET = timedelta(seconds=3)

LIMITS = {"revocations_per_second": 100, "revocation_burst": 1000}
QUIET = {"limits": LIMITS, "trust": {"heartbeat": "500ms"}}

pytestmark = [pytest.mark.measured, pytest.mark.timeout(1200)]


@contextmanager
def _fleet(openbao, postgres, directory, **how):  # noqa: ANN003 - those of start_fleet
    place = prepare(openbao, directory / "login")
    try:
        with start_fleet(place, postgres, directory / "brokers", **how) as started:
            yield started
    finally:
        place.close()


@pytest.fixture(scope="module")
def fleet(openbao, postgres, tmp_path_factory):
    """Three replicas with the settings of production, but for how often a workload may revoke."""
    with _fleet(openbao, postgres, tmp_path_factory.mktemp("fleet"), settings={"limits": LIMITS}) as started:
        yield started


@pytest.fixture(scope="module")
def unnotified(openbao, postgres, tmp_path_factory):
    """Three replicas that tell each other nothing: each finds revocations when it looks."""
    directory = tmp_path_factory.mktemp("unnotified")
    command = ("-m", "support.broker_without_notify")
    with _fleet(openbao, postgres, directory, settings=QUIET, command=command) as started:
        yield started


def _measure(fleet, revocations):
    """Revoke under load, and check that nothing but what was revoked is refused; return spread and load."""
    with (
        callers(fleet) as calls,
        verifier_processes(
            fleet, calls.identity, verifiers=VERIFIERS, processes=2, issues_per_second=60, verifies_per_second=60
        ) as processes,
    ):
        begun = together(processes, do="begin")
        spread = revoke_one_by_one(calls, processes, revocations)
        ended = together(processes, do="check", tokens=spread.revoked[-10:])
    assert VERIFIERS == sum(answer["live"] for answer in begun)
    following = sum((Counter(answer["following"]) for answer in begun), Counter())
    assert set(fleet.targets("trust")) == set(following)
    verdicts = sum((Counter(answer["verdicts"]) for answer in ended), Counter())
    assert {"REVOKED": VERIFIERS * min(10, revocations)} == dict(verdicts)
    load = sum((Counter(answer["load"]) for answer in ended), Counter())
    assert {"issued", "verified"} == set(load), load
    return spread, dict(load)


def test_a_revocation_reaches_fifty_verifiers_in_milliseconds_under_load(fleet):
    """From durable to refused; each verifier verifies the token itself. No good token is refused meanwhile."""
    spread, load = _measure(fleet, REVOCATIONS)
    figures = {"replicas": len(fleet), "verifiers": VERIFIERS, **spread.figures(), "load": load}
    record("revocation_spread", figures)
    assert REVOCATIONS * VERIFIERS == figures["refusals"]
    assert figures["durable_to_refused_ms"]["p50"] < P50 * TIMES
    assert figures["durable_to_refused_ms"]["p99"] < P99 * TIMES


def test_a_revocation_that_nobody_is_notified_of_is_found_within_two_seconds(unnotified):
    """NOTIFY only wakes: without it each replica finds the revocation when it looks, once a second."""
    spread, load = _measure(unnotified, UNNOTIFIED)
    figures = {"replicas": len(unnotified), "verifiers": VERIFIERS, **spread.figures(), "load": load}
    record("revocation_spread_without_notify", figures)
    assert max(spread.from_created) < 2.0
    # Some verifiers are at replicas that had to look: the proof would be none if all had been told.
    assert max(spread.from_created) > 0.25


def _reason(verifier, token, identity):
    try:
        verifier.verify(token, peer_certificate=identity.certificate)
    except InvalidTokenError as error:
        return error.reason
    except KeySetUnavailableError:
        return "cannot tell"
    return "accepted"


def _wait_for(reason, verifier, token, identity, *, within):
    """Verify until the outcome is `reason`; return after how many seconds that was."""
    begun = time.monotonic()
    while _reason(verifier, token, identity) != reason:
        assert time.monotonic() - begun < within, (reason, verifier.status())
        time.sleep(0.01)
    return time.monotonic() - begun


@pytest.mark.parametrize("how", ["cut", "hang"])
def test_a_verifier_that_is_cut_off_accepts_nothing_once_its_budget_is_over_and_recovers(unnotified, how):
    """A token that is revoked meanwhile is accepted for no longer than the budget, and refused when the line is back.

    The line breaks, or nothing comes through it any more.
    """
    with callers(unnotified) as calls, proxy_to(unnotified.targets("trust")[0]) as line:
        good, bad = calls.issue(), calls.issue()
        with Verifier(
            audience="payments",
            issuer=ISSUER,
            trust=line.address,
            identity=unnotified.identity(PAYMENTS),
            ca_file=unnotified.ca_file,
            broker_name=BROKER_NAME,
            max_staleness=BUDGET,
        ) as verifier:
            verifier.wait_ready()
            _wait_for("accepted", verifier, bad, calls.identity, within=5)
            getattr(line, how)()
            calls.revoke(bad)
            revoked = time.monotonic()
            # It cannot know, and says so as soon as it has known nothing for as long as it may.
            _wait_for("cannot tell", verifier, bad, calls.identity, within=BUDGET.total_seconds() + 0.5)
            accepted_for = time.monotonic() - revoked
            assert "cannot tell" == _reason(verifier, good, calls.identity)
            status = verifier.status()
            assert (False, True) == (status.usable, status.staleness >= BUDGET)
            line.mend()
            recovered_in = _wait_for("accepted", verifier, good, calls.identity, within=20)
            assert InvalidTokenReason.REVOKED == _reason(verifier, bad, calls.identity)
    figures = {
        "budget_s": BUDGET.total_seconds(),
        "revoked_but_accepted_for_s": round(accepted_for, 2),
        "recovered_in_s": round(recovered_in, 2),
    }
    record(f"verifier_{how}_off", figures)
    assert accepted_for < BUDGET.total_seconds() + 0.5


def test_a_revocation_reaches_a_thousand_streams_of_one_trust_process(openbao, postgres, tmp_path):
    """Each stream has a connection of its own. What each costs in memory, and each push in CPU, is stated."""
    limits = {**LIMITS, "streams": STREAMS, "key_sets_per_second": 1000}
    settings = {"limits": limits, "store": {"verifier_sessions": STREAMS}}
    with (
        _fleet(openbao, postgres, tmp_path, replicas=1, settings=settings) as fleet,
        callers(fleet) as calls,
    ):
        (replica,) = fleet
        certificate, key = fleet.ca.issue(PAYMENTS).write(tmp_path, "payments")
        memory = replica.memory()
        with child(
            "support.stream_process",
            trust=replica.addresses["trust"],
            streams=STREAMS,
            certificate=str(certificate),
            key=str(key),
            ca_file=str(fleet.ca_file),
        ) as process:
            begun = process.ask(do="begin")
            assert (STREAMS, []) == (begun["ready"], begun["ended"])
            time.sleep(2)  # Until the sessions are written.
            memory = replica.memory() - memory
            idle = replica.cpu_seconds()
            time.sleep(2)
            idle = (replica.cpu_seconds() - idle) / 2
            seconds = []
            cpu, since = replica.cpu_seconds(), time.monotonic()
            for _ in range(TO_STREAMS):
                version = calls.revoke(calls.issue())
                answer = process.ask(do="reached", version=version)
                assert (STREAMS, []) == (len(answer["at"]), answer["ended"])
                created = calls.created_at(version)
                seconds += [at - created for at in answer["at"]]
                time.sleep(1)  # Until the answers are written.
            cpu = replica.cpu_seconds() - cpu - idle * (time.monotonic() - since)
    pushed = milliseconds(seconds)
    figures = {
        "streams": STREAMS,
        "revocations": TO_STREAMS,
        "durable_to_arrived_ms": pushed,
        "memory_kb_per_stream": round(memory / 1024 / STREAMS),
        "cpu_us_per_push_and_answer": round(cpu * 1e6 / (STREAMS * TO_STREAMS)),
        "cpu_idle_percent": round(100 * idle, 1),
    }
    record("revocation_to_streams", figures)
    assert pushed["p99"] < 10 * P99
