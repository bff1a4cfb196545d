"""Logs and metrics: what is counted, what is said once, and that nobody's words end a line or become a label."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from carnet.errors import ConfigError
from carnet.log_lines import LineLimit
from carnet_broker.core.keyring import CreateKey, PublishKey
from carnet_broker.core.mirror import MirrorNotBelievedError
from carnet_broker.core.rollout import Permit, VerifierSession
from carnet_broker.core.workload import IdentityReason, UnauthenticatedError, Workload
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import KeyLostError, KeyStoreUnavailableError
from carnet_broker.telemetry import Telemetry
from support.keyrings import T0, jwk, running
from support.policies import ORDERS

METHOD = "/carnet.v1.TokenService/IssueToken"
CALLER = Workload(spiffe_id=ORDERS, thumbprint="A" * 43, leaf=None, not_after=T0)
HOSTILE = 'a\nfake="line"\r\x1b[2J\u2028\u202eb\x00\x7f\ud800'


@pytest.fixture
def telemetry() -> Telemetry:
    """Nothing counted yet."""
    return Telemetry()


@pytest.fixture
def log() -> Iterator[list[dict[str, object]]]:
    """What is logged."""
    with capture_logs() as entries:
        yield entries


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    """Return the value of a metric, None where there is none yet."""
    return telemetry.registry.get_sample_value(name, labels)


def refused(reason: RefusalReason, cause: Exception | None = None) -> RefusedError:
    """A refusal, as it reaches the log."""
    error = RefusedError(Refusal(reason, "the broker cannot sign now", timedelta(seconds=1)))
    error.__cause__ = cause
    return error


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_call_that_was_answered_is_counted_and_timed(telemetry, log):
    """By its method; nothing is logged."""
    telemetry.answered(METHOD, 0.003)
    assert 1 == value(telemetry, "carnet_calls_total", method=METHOD, reason="OK")
    assert 0.003 == value(telemetry, "carnet_call_seconds_sum", method=METHOD)
    assert [] == log


def test_a_refused_call_is_counted_by_its_reason_and_logged_with_its_cause(telemetry, log):
    """The cause that the caller is not told is in the log, with who it was."""
    telemetry.refused(METHOD, refused(RefusalReason.KEY_STORE_UNAVAILABLE, KeyStoreUnavailableError("sealed")), CALLER)
    assert 1 == value(telemetry, "carnet_calls_total", method=METHOD, reason="KEY_STORE_UNAVAILABLE")
    assert [
        {
            "event": "refused",
            "log_level": "warning",
            "method": METHOD,
            "reason": "KEY_STORE_UNAVAILABLE",
            "subject": str(ORDERS),
            "cause": "sealed",
        }
    ] == log


def test_a_refusal_without_a_cause_is_logged_with_its_own_text(telemetry, log):
    """And an error of another kind by its code."""
    telemetry.refused(METHOD, refused(RefusalReason.NOT_GRANTED), CALLER)
    telemetry.refused(METHOD, ConfigError("no"), None)
    told = [(entry["reason"], entry["subject"], entry["cause"]) for entry in log]
    assert [
        ("NOT_GRANTED", str(ORDERS), "NOT_GRANTED: the broker cannot sign now"),
        ("CONFIG", None, "no"),
    ] == told


def test_an_unauthenticated_call_is_counted_by_the_reason_that_the_caller_is_not_told(telemetry, log):
    """In a metric of its own, and among the calls."""
    telemetry.refused(METHOD, UnauthenticatedError(IdentityReason.EXPIRED, "valid until then"), None)
    assert 1 == value(telemetry, "carnet_unauthenticated_total", reason="EXPIRED")
    assert 1 == value(telemetry, "carnet_calls_total", method=METHOD, reason="UNAUTHENTICATED")
    assert ("unauthenticated", "EXPIRED", "valid until then") == tuple(log[0][k] for k in ("event", "reason", "cause"))


def test_a_call_that_ended_in_a_fault_is_logged_with_its_traceback(telemetry, log):
    """It counts as INTERNAL."""
    error = ZeroDivisionError("ours")
    telemetry.failed(METHOD, error)
    assert 1 == value(telemetry, "carnet_calls_total", method=METHOD, reason="INTERNAL")
    assert ("internal_error", "error", error) == tuple(log[0][k] for k in ("event", "log_level", "exc_info"))


def test_b11_refused_calls_fill_a_bounded_part_of_the_log_and_all_are_counted(log):
    """What is left out is said, once a look, and not when there is nothing."""
    telemetry = Telemetry(LineLimit(1, mono=lambda: 0.0))
    for _ in range(10):
        telemetry.refused(METHOD, refused(RefusalReason.NOT_GRANTED), CALLER)
        telemetry.refused(METHOD, UnauthenticatedError(IdentityReason.EXPIRED, ""), None)
        telemetry.failed(METHOD, ValueError(""))
    telemetry.tell_left_out()
    telemetry.tell_left_out()
    assert 10 == value(telemetry, "carnet_calls_total", method=METHOD, reason="NOT_GRANTED")
    assert 10 == value(telemetry, "carnet_unauthenticated_total", reason="EXPIRED")
    assert ["refused", "unauthenticated", "internal_error"] * 4 + ["lines_left_out"] == [one["event"] for one in log]
    assert (18, 18) == (log[-1]["count"], value(telemetry, "carnet_log_lines_left_out_total"))


# -- keyring, Vault, files ---------------------------------------------------------------------------------------------


def test_steps_keys_and_the_generation_in_force_are_shown(telemetry, log):
    """Which step, of which key, by this replica; and what is in force here, whoever took the step."""
    keyring = running()
    telemetry.step_taken(CreateKey(), keyring)
    telemetry.step_taken(PublishKey(jwk(1).kid), keyring)
    telemetry.adopted(keyring)
    telemetry.key_lost(jwk(0).kid, KeyLostError("deleted"))
    assert 1 == value(telemetry, "carnet_keyring_steps_total", step="PublishKey")
    assert (5, 1) == (value(telemetry, "carnet_keyring_generation"), value(telemetry, "carnet_keys_lost_total"))
    told = [(entry["event"], entry.get("step"), entry["kid"]) for entry in log]
    assert [
        ("keyring_step", "CreateKey", None),
        ("keyring_step", "PublishKey", jwk(1).kid),
        ("key_lost", None, jwk(0).kid),
    ] == told


def test_a_mirror_that_is_not_believed_is_an_alarm_and_a_keyring_that_is_not_kept_a_warning(telemetry, log):
    """Each with what there is to know."""
    telemetry.mirror_refused(MirrorNotBelievedError("it is not signed"))
    assert 1 == value(telemetry, "carnet_mirrors_refused_total")
    telemetry.keyring_not_kept(OSError(28, "No space left on device", "/audit/keyring.json"))
    assert [
        {"event": "mirror_refused", "log_level": "error", "problem": "it is not signed"},
        {
            "event": "keyring_not_kept",
            "log_level": "warning",
            "file": "/audit/keyring.json",
            "problem": "No space left on device",
        },
    ] == log


def test_tokens_are_counted(telemetry):
    """By how many a call got."""
    telemetry.tokens.inc(3)
    assert 3 == value(telemetry, "carnet_tokens_issued_total")


def test_a_vault_that_fails_is_said_once_for_each_cause_and_so_is_its_recovery(telemetry, log):
    """Not at each poll; two causes by turns are two lines, not a thousand."""
    telemetry.vault_answered()
    for _ in range(3):
        telemetry.vault_failed(KeyStoreUnavailableError("sealed"))
        telemetry.vault_failed(KeyStoreUnavailableError("refused"))
    assert 0 == value(telemetry, "carnet_vault_reachable")
    for _ in range(2):
        telemetry.vault_answered()
    assert 1 == value(telemetry, "carnet_vault_reachable")
    telemetry.vault_failed(fault := ZeroDivisionError("ours"))
    told = [(entry["event"], entry.get("cause"), entry.get("exc_info")) for entry in log]
    assert [
        ("vault_failed", "sealed", None),
        ("vault_failing_otherwise", "refused", None),
        ("vault_recovered", None, None),
        ("vault_failed", "ours", fault),
    ] == told


def test_causes_without_end_do_not_fill_the_log(telemetry, log):
    """A cause that differs each time is said a bounded number of times."""
    for number in range(1000):
        telemetry.vault_failed(KeyStoreUnavailableError(f"request {number} failed"))
    assert 20 == len(log)


def test_t23_reloads_are_counted_and_a_failing_one_is_an_alarm(telemetry, log):
    """Until the good one comes."""
    telemetry.reload_failed("policy", ConfigError("policy.yaml:3: no"))
    assert 1 == value(telemetry, "carnet_reload_failing", what="policy")
    telemetry.reloaded("policy")
    assert 0 == value(telemetry, "carnet_reload_failing", what="policy")
    for result in ("ok", "failed"):
        assert 1 == value(telemetry, "carnet_reloads_total", what="policy", result=result)
    assert [("reload_failed", "policy.yaml:3: no"), ("reloaded", None)] == [(e["event"], e.get("cause")) for e in log]


# -- what nobody's words may do (B10, B11) -----------------------------------------------------------------------------


def test_no_metric_has_a_spiffe_id_or_a_peers_words_as_a_label(telemetry, log):
    """Its series would grow with the callers, and tell whoever reads metrics who they are."""
    for error in (
        refused(RefusalReason.NOT_GRANTED, ValueError(HOSTILE)),
        UnauthenticatedError(IdentityReason.SPIFFE_ID, f"{ORDERS} {HOSTILE}"),
        ConfigError(f"{ORDERS} {HOSTILE}"),
    ):
        telemetry.refused(METHOD, error, CALLER)
    telemetry.answered(METHOD, 0.1)
    telemetry.vault_failed(KeyStoreUnavailableError(f"{ORDERS} {HOSTILE}"))
    telemetry.reload_failed("tls", ConfigError(f"{ORDERS} {HOSTILE}"))
    labels = {
        text for metric in telemetry.registry.collect() for sample in metric.samples for text in sample.labels.values()
    }
    assert {METHOD, "NOT_GRANTED", "SPIFFE_ID", "tls"} <= labels
    assert not [text for text in labels if "spiffe://" in text or not text.isprintable()]


SCRIPT = """\
import logging, sys
from carnet_broker.core.workload import IdentityReason, UnauthenticatedError
from carnet.log_lines import LineLimit
from carnet_broker.ports import KeyStoreUnavailableError
from carnet_broker.telemetry import Telemetry, configure_logging

form, level, hostile = sys.argv[1], sys.argv[2], eval(sys.argv[3])
configure_logging(level=level, json=form == "json", lines=LineLimit())
telemetry = Telemetry()
telemetry.refused("/m", UnauthenticatedError(IdentityReason.UNTRUSTED, hostile), None)
telemetry.vault_failed(KeyStoreUnavailableError(hostile))
telemetry.reloaded("policy")
logging.getLogger("some.package").error("it says %s", hostile)
logging.getLogger("some.package").info("chatter")
"""


def logged(form: str, level: str = "info") -> list[str]:
    """Return the lines that a process of its own logs in that form."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, form, level, ascii(HOSTILE)],
        capture_output=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(str(Path(one)) for one in sys.path if one)},
    )
    assert b"" == done.stdout
    return done.stderr.decode("utf-8").splitlines()


def test_b10_in_json_each_event_is_one_line_and_says_what_was_said():
    """Whatever a peer put into it: printable ASCII, and the text itself when it is read back."""
    lines = logged("json")
    assert [True] * 4 == [line.isascii() and line.isprintable() for line in lines]
    entries = [json.loads(line) for line in lines]
    assert ["unauthenticated", "vault_failed", "reloaded", f"it says {HOSTILE}"] == [one["event"] for one in entries]
    assert [HOSTILE, HOSTILE] == [one["cause"] for one in entries[:2]]
    assert all({"level", "timestamp"} <= one.keys() for one in entries)


def test_b10_as_text_each_event_is_one_line_too():
    """Nothing of it ends the line, or steers the terminal of who reads it."""
    lines = logged("text")
    assert [True] * 4 == [line.isprintable() for line in lines]
    assert [True, True, False, True] == ["fake=" in line for line in lines]


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 4), ("warning", 3), ("error", 2)])
def test_the_level_is_kept_and_libraries_do_not_chat(level, expected):
    """A library is heard from its warnings on, whatever the level."""
    assert expected == len(logged("json", level))


def test_a_permit_that_another_broker_gave_is_neither_logged_nor_counted(telemetry, log):
    """The one that gave it names whom it left behind; three brokers would count one verifier three times."""
    permit = Permit(generation=2, kid="k2", given_at=T0, overdue=True)
    late = VerifierSession(
        spiffe_id=str(ORDERS),
        instance_id="one",
        audience="payments",
        replica_id="r",
        generation=1,
        generation_at=T0,
        revocation_version=0,
        revocation_at=T0,
        max_staleness=timedelta(minutes=5),
    )
    for given in (permit, replace(permit, repeated=True), replace(permit, repeated=True)):
        telemetry.permitted(given, [late])
    assert ["key_permitted"] == [entry["event"] for entry in log]
    assert 1 == log[0]["missing"]
    assert 1 == telemetry.registry.get_sample_value("carnet_verifiers_left_behind_total")
