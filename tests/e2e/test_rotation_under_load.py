"""Rotations under load, with the smallest times that are allowed: no good token is refused."""

from __future__ import annotations

import time

import pytest

from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.counts import count
from support.load import Load
from support.measurements import record
from support.running_broker import POLICY, QUICK, start_broker

ROTATIONS = count("rotations_under_load")


@pytest.mark.measured
@pytest.mark.timeout(60 + 10 * ROTATIONS)
def test_no_good_token_is_refused_through_rotations_under_load(vault_place, tmp_path):
    """100 issues and 200 verifications a second; each rotation by the CI role, through Vault, as CI does it."""
    with start_broker(vault_place, tmp_path / "broker", policy=POLICY.replace("10m", "2s"), settings=QUICK) as broker:
        ci = RotationClient(vault_place.session("ci"))
        started = time.monotonic()
        with Load(broker, issues_per_second=100, verifies_per_second=200) as tally:
            for _ in range(ROTATIONS):
                time.sleep(0.25)  # More than the skew: a request that is made sooner joins the rotation before it.
                request = ci.submit(RequestKind.ROTATE)
                broker.wait_for(
                    lambda request=request: (r := ci.result(request)) is not None and r.status is RequestStatus.DONE,
                    "the rotation",
                )
            time.sleep(2)
        elapsed = time.monotonic() - started
    assert ROTATIONS + 1 == len(tally.by_key)
    figures = {
        "rotations": ROTATIONS,
        "seconds": round(elapsed, 1),
        "issued": tally.issued,
        "verified": tally.verified,
        "good_tokens_refused": sum(tally.refused.values()),
        "issues_failed": sum(tally.issue_failures.values()),
        "fetches_for_a_missing_key": tally.fetches_for_a_missing_key,
    }
    record("rotations_under_load", figures)
    assert {} == dict(tally.refused)
    assert {} == dict(tally.issue_failures)
    assert 0 == tally.fetches_for_a_missing_key
    # The load must have been one: at least 64 % of what was asked for.
    assert tally.issued > 64 * elapsed
    assert tally.verified > 128 * elapsed
