"""kill -9 of brokers and of the database while revocations are made: what was acknowledged is never lost."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter

import pytest

from support.counts import count
from support.fleet import start_fleet
from support.measurements import record
from support.revokers import revokers, witnesses
from support.running_broker import POLICY

RUNS = count("runs_of_kills_while_revoking")
KILLS = count("kills_while_revoking")
VERIFIERS = 4
WITHIN = 20.0
"""Seconds in which brokers and verifiers are to be back by themselves: a bound for a machine that does other things."""

# Tokens live longer than a run, so that all that were revoked can be verified at its end.
LASTING = POLICY.replace("10m", "1h")
SETTINGS = {
    "limits": {
        "tokens_per_second": 10_000,
        "token_burst": 10_000,
        "revocations_per_second": 10_000,
        "revocation_burst": 10_000,
    }
}
VICTIMS = ((0,), (1,), (2,), ("database",), ("database", 0), ("database",))


def victims(rng):
    """Yield whom to kill: each kind as often as the others, in any order."""
    while True:
        yield from rng.sample(VICTIMS, len(VICTIMS))


def kill(fleet, victim):
    """kill -9 a replica, or the postmaster and all of its backends."""
    if victim == "database":
        fleet.postgres.kill()
    else:
        fleet[victim].kill()


def start(fleet, victim):
    """Start again what was killed."""
    if victim == "database":
        fleet.postgres.start()
    else:
        fleet[victim].start()


def log_of(fleet):
    """Return the epoch and the version of the log, and its entries by version."""
    with fleet.postgres.connect(fleet.database) as connection:
        log = connection.execute("SELECT epoch, version FROM revocation_log").fetchone()
        rows = connection.execute("SELECT version, value FROM revocations ORDER BY version").fetchall()
    return *log, dict(rows)


@pytest.mark.measured
@pytest.mark.timeout(120 + 14 * KILLS)
@pytest.mark.parametrize("run", range(RUNS))
def test_no_acknowledged_revocation_is_lost_by_kill_9(run, vault_place, own_postgres, tmp_path):
    """At random moments, under revocations through all replicas. After each kill everything recovers by itself: every
    replica revokes again, and every verifier refuses all that was acknowledged. None skips a version, and none takes
    the crash for a restored store.
    """
    rng = random.Random(run)  # noqa: S311 - picks moments and victims, guards nothing
    killed: Counter[str] = Counter()
    recovered = []
    begun = time.monotonic()
    checked = lost = 0
    with (
        start_fleet(vault_place, own_postgres, tmp_path / "fleet", policy=LASTING, settings=SETTINGS) as fleet,
        witnesses(fleet, VERIFIERS) as watching,
    ):
        epoch, _, _ = log_of(fleet)
        with revokers(fleet, per_second=60) as revoking:
            peer = revoking.identity.certificate_chain_pem
            revoking.wait_for_each(0)
            for _, struck in zip(range(KILLS), victims(rng), strict=False):
                time.sleep(rng.uniform(0.0, 0.5))
                for victim in struck:
                    kill(fleet, victim)
                killed[" and ".join("a broker" if victim != "database" else victim for victim in struck)] += 1
                time.sleep(rng.uniform(0.0, 0.5))
                for victim in struck:
                    start(fleet, victim)
                back = time.monotonic()
                revoking.wait_for_each(len(revoking.acknowledged()), WITHIN)
                new = revoking.acknowledged(checked)
                for witness in watching:
                    witness.wait_for(max(one.version for one in new), WITHIN)
                recovered.append(time.monotonic() - back)
                verdicts = Counter(witness.verdict(one.token, peer) for witness in watching for one in new)
                assert {"REVOKED": len(new) * VERIFIERS} == dict(verdicts)
                checked += len(new)
        acknowledged = revoking.acknowledged()
        epoch_after, version, stored = log_of(fleet)
        lost = [one for one in acknowledged if stored.get(one.version) != one.token_id]
        with witnesses(fleet, 1) as late:
            late[0].wait_for(version, WITHIN)
            for witness in (*watching, *late):
                witness.wait_for(version, WITHIN)
                verdicts = Counter(witness.verdict(one.token, peer) for one in acknowledged)
                assert {"REVOKED": len(acknowledged)} == dict(verdicts)
            deltas, snapshots = (sum(getattr(one, what) for one in watching) for what in ("deltas", "snapshots"))
        record(
            f"killed_while_revoking_{run + 1}",
            {
                "kills": dict(killed),
                "seconds": round(time.monotonic() - begun, 1),
                "acknowledged": len(acknowledged),
                "acknowledged_and_lost": len(lost),
                "in_the_store": version,
                "not_acknowledged_at_first": dict(revoking.failed),
                "verifiers": VERIFIERS,
                "deltas_loaded": deltas,
                "snapshots_loaded": snapshots,
                "versions_skipped": sum(len(witness.gaps) for witness in watching),
                "all_back_s": {
                    "p50": round(statistics.median(recovered), 2),
                    "max": round(max(recovered), 2),
                },
            },
        )
        assert [] == lost
        assert [*range(1, version + 1)] == [*stored]
        assert [] == [gap for witness in watching for gap in witness.gaps]
        assert epoch == epoch_after
        assert [0] * VERIFIERS == [witness.verifier.status().new_epochs for witness in watching]
        assert deltas > KILLS
