"""Logs and metrics of the broker. No token, no key, no secret, and no SPIFFE ID as a metric label.

Logs are structured, one JSON object a line on standard error (or readable text on a terminal). Metrics are Prometheus'.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from carnet.errors import CarnetError
from carnet.log_lines import LineLimit
from carnet_broker.core.keyring import Keyring, KeyringRegressionError, Step
from carnet_broker.core.mirror import MirrorNotBelievedError
from carnet_broker.core.requests import NAMED_LAGGARDS
from carnet_broker.core.rollout import Permit, VerifierSession
from carnet_broker.core.workload import UnauthenticatedError, Workload
from carnet_broker.issuance import RefusedError
from carnet_broker.log_lines import LibraryLines
from carnet_broker.ports import KeyLostError, StoreUnavailableError
from carnet_broker.rotation import RotationProgress
from carnet_broker.trust_telemetry import TrustTelemetry

__all__ = ["Telemetry", "configure_logging"]

_CAUSES_LOGGED: Final = 20
_LATENCY_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


def configure_logging(*, level: str, json: bool, lines: LineLimit) -> None:
    """Set up structlog for the process, and send what libraries log the same way, as far as `lines` lets them."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared if json else [*shared, _on_one_line],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    handler.addFilter(LibraryLines(lines))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))


def _on_one_line(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep what a library says from beginning another line, or steering a terminal. JSON escapes it anyway."""
    del logger, method
    text = str(event["event"])
    event["event"] = text if text.isprintable() else repr(text)
    return event


class Telemetry:
    """Everything that is counted and logged, by the names of what happened. Thread-safe."""

    def __init__(self, lines: LineLimit | None = None) -> None:
        """`lines` says how many lines about refused calls go into the log; None is the default limit."""
        self.registry = CollectorRegistry()
        self._lines = lines or LineLimit()
        self._vault_failures: set[str] = set()
        self._store_failure: str | None = None
        self.log = structlog.get_logger("carnet_broker")
        registry = self.registry
        self.trust = TrustTelemetry(registry, self.log)
        self.calls = Counter(
            "carnet_calls_total", "Calls by method and reason of the answer.", ["method", "reason"], registry=registry
        )
        self.seconds = Histogram(
            "carnet_call_seconds", "Time to answer a call.", ["method"], registry=registry, buckets=_LATENCY_BUCKETS
        )
        self.tokens = Counter("carnet_tokens_issued_total", "Tokens issued.", registry=registry)
        self.unauthenticated = Counter(
            "carnet_unauthenticated_total", "Calls whose certificate was refused.", ["reason"], registry=registry
        )
        self.steps = Counter(
            "carnet_keyring_steps_total", "Steps of the keyring taken here.", ["step"], registry=registry
        )
        self.generation = Gauge("carnet_keyring_generation", "Generation of the keyring in force.", registry=registry)
        self.keys_lost = Counter("carnet_keys_lost_total", "Keys found unusable.", registry=registry)
        self.laggards = Gauge(
            "carnet_rotation_laggards",
            "Live verifiers that a rotation which is due waits for, because they have not loaded the key.",
            registry=registry,
        )
        self.left_behind = Counter(
            "carnet_verifiers_left_behind_total",
            "Live verifiers that had not loaded a key when it was permitted to sign.",
            registry=registry,
        )
        self.regressions = Counter(
            "carnet_keyring_regressions_total",
            "Readings of a keyring that was refused, because Vault was restored or the document was rolled back.",
            registry=registry,
        )
        self.mirrors_refused = Counter(
            "carnet_mirrors_refused_total",
            "Readings of a keyring in the shared store that claims to be later, and is not signed by a trusted key.",
            registry=registry,
        )
        self.without_store = Gauge(
            "carnet_rotation_without_store",
            "1 while the keyring cannot be rotated for want of the shared store.",
            registry=registry,
        )
        self._waits_for: object = None
        self.vault_ok = Gauge("carnet_vault_reachable", "1 while Vault answers, else 0.", registry=registry)
        self.reloads = Counter(
            "carnet_reloads_total", "Reloads of files, by what and result.", ["what", "result"], registry=registry
        )
        self.reload_failed_now = Gauge(
            "carnet_reload_failing",
            "1 while the newest file of its kind cannot be used and the last good one serves.",
            ["what"],
            registry=registry,
        )
        self.lines_left_out = Counter(
            "carnet_log_lines_left_out_total", "Lines that did not go into the log, being too many.", registry=registry
        )

    # -- calls (edges.grpc.calls.CallEvents) -----------------------------------------------------------------------

    def answered(self, method: str, seconds: float) -> None:
        """Count a call that was answered well."""
        self.calls.labels(method, "OK").inc()
        self.seconds.labels(method).observe(seconds)

    def refused(self, method: str, error: CarnetError, workload: Workload | None) -> None:
        """Count and log a call that was answered with an error that was meant.

        Those that are not authenticated share one part of the log.
        """
        subject = str(workload.spiffe_id) if workload is not None else None
        if isinstance(error, UnauthenticatedError):
            self.unauthenticated.labels(str(error.reason)).inc()
            self.calls.labels(method, "UNAUTHENTICATED").inc()
            if self._lines.admits(""):
                self.log.warning("unauthenticated", method=method, reason=str(error.reason), cause=error.detail)
            return
        reason = str(error.refusal.reason) if isinstance(error, RefusedError) else error.code
        self.calls.labels(method, reason).inc()
        if self._lines.admits(subject or ""):
            cause = str(error.__cause__) if error.__cause__ is not None else str(error)
            self.log.warning("refused", method=method, reason=reason, subject=subject, cause=cause)

    def failed(self, method: str, error: Exception) -> None:
        """Count and log a call that ended in an error that nobody meant."""
        self.calls.labels(method, "INTERNAL").inc()
        if self._lines.admits(method):
            self.log.error("internal_error", method=method, exc_info=error)

    def tell_left_out(self) -> None:
        """Say how many lines were left out since the last time, if any. To be called every second or so."""
        left_out = self._lines.take_left_out()
        if left_out:
            self.lines_left_out.inc(left_out)
            self.log.warning("lines_left_out", count=left_out)

    # -- keyring (rotation.RotationEvents) -------------------------------------------------------------------------

    def step_taken(self, step: Step, keyring: Keyring) -> None:
        """Count and log a step of the keyring."""
        name = type(step).__name__
        self.steps.labels(name).inc()
        self.log.info("keyring_step", step=name, kid=getattr(step, "kid", None), generation=keyring.generation)

    def adopted(self, keyring: Keyring) -> None:
        """Show the generation that is in force."""
        self.generation.set(keyring.generation)

    def key_lost(self, kid: str, error: KeyLostError) -> None:
        """Count and log a private key that cannot be used."""
        self.keys_lost.inc()
        self.log.error("key_lost", kid=kid, cause=str(error))

    def permitted(self, permit: Permit, left_behind: Sequence[VerifierSession]) -> None:
        """Log the permit for a key, and count and name the verifiers that it left behind; by who gave it alone."""
        if permit.repeated:
            return
        self.left_behind.inc(len(left_behind))
        log = self.log.warning if left_behind else self.log.info
        log(
            "key_permitted",
            kid=permit.kid,
            generation=permit.generation,
            overdue=permit.overdue,
            left_behind=_named(left_behind),
            missing=len(left_behind),
        )

    def waits(self, progress: RotationProgress) -> None:
        """Show what a rotation waits for, and log it where it has changed."""
        self.laggards.set(len(progress.laggards))
        hold = progress.wait.hold if progress.wait is not None else None
        names = _named(progress.laggards)
        if (hold, names) != self._waits_for:
            self._waits_for = (hold, names)
            if names:
                self.log.warning("rotation_waits", hold=hold, waiting_for=names, missing=len(progress.laggards))
            elif hold is not None:
                self.log.info("rotation_waits", hold=hold)

    def regressed(self, error: KeyringRegressionError) -> None:
        """Count a keyring that was refused; the round that found it fails, and is logged as such."""
        del error
        self.regressions.inc()

    def mirror_refused(self, error: MirrorNotBelievedError) -> None:
        """Count a mirror that nobody vouches for, and say why."""
        self.mirrors_refused.inc()
        self.log.error("mirror_refused", problem=str(error))

    def keyring_not_kept(self, error: OSError) -> None:
        """Say that this broker may not be able to start without Vault."""
        self.log.warning("keyring_not_kept", file=error.filename, problem=error.strerror)

    # -- Vault (keyring_loop.VaultEvents) --------------------------------------------------------------------------

    def vault_answered(self) -> None:
        """Note that Vault answers, and say so where it did not before."""
        if self._vault_failures:
            self.log.info("vault_recovered")
        self._vault_failures.clear()
        self.vault_ok.set(1)

    def vault_failed(self, error: Exception) -> None:
        """Note that a round with Vault failed; log that once, and each other cause until it recovers once as well."""
        self.vault_ok.set(0)
        cause = str(error)
        if cause not in self._vault_failures and len(self._vault_failures) < _CAUSES_LOGGED:
            event = "vault_failing_otherwise" if self._vault_failures else "vault_failed"
            self.log.error(event, cause=cause, exc_info=None if isinstance(error, CarnetError) else error)
            self._vault_failures.add(cause)

    def rotation_without_store(self, error: StoreUnavailableError | None) -> None:
        """Note whether rotation has the shared store, and log when that changes."""
        cause = None if error is None else str(error)
        if error is not None and cause != self._store_failure:
            self.log.error("rotation_without_store", cause=cause)
        elif error is None and self._store_failure is not None:
            self.log.info("rotation_has_store")
        self._store_failure = cause
        self.without_store.set(error is not None)

    # -- files (watched.ReloadEvents) ------------------------------------------------------------------------------

    def reloaded(self, what: str) -> None:
        """Count and log a file that was taken up."""
        self.reloads.labels(what, "ok").inc()
        self.reload_failed_now.labels(what).set(0)
        self.log.info("reloaded", what=what)

    def reload_failed(self, what: str, error: CarnetError) -> None:
        """Count and log a file that cannot be used."""
        self.reloads.labels(what, "failed").inc()
        self.reload_failed_now.labels(what).set(1)
        self.log.error("reload_failed", what=what, cause=str(error), serving="the last good one")


def _named(sessions: Sequence[VerifierSession]) -> list[str]:
    """Return the names of verifiers for a line of the log, not too many."""
    return [f"{session.spiffe_id} {session.instance_id}" for session in sessions[:NAMED_LAGGARDS]]
