"""What ``keys rotate --wait`` prints while it waits."""

from __future__ import annotations

import pytest

from carnet_broker.cli import keys
from carnet_broker.core.requests import RequestKind, RequestResult, RequestStatus

DEADLINE = "2026-11-24T12:15:00+00:00"


class Answers:
    """Stands for Vault's letter box: gives one answer after the other."""

    def __init__(self, *results: RequestResult) -> None:
        self._results = iter(results)

    def submit(self, kind: RequestKind, kid: str | None = None) -> str:
        """Take a request."""
        del kind, kid
        return "r1"

    def result(self, request_id: str) -> RequestResult:
        """Return the next answer."""
        assert "r1" == request_id
        return next(self._results)


def waiting(**detail: object) -> RequestResult:
    """An answer that is not final."""
    return RequestResult(RequestStatus.ACCEPTED, "WAITING_FOR_VERIFIERS", "waits", detail)


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *results: RequestResult) -> list[str]:
    """Follow a request through `results` and to its end, and return what was said of its progress."""
    monkeypatch.setattr(keys, "_LOOK_EVERY", 0.0)
    done = RequestResult(RequestStatus.DONE, "ROTATED", "done")
    client = Answers(*results, done)
    minute = keys.timedelta(minutes=1)
    assert done == keys._follow(
        client, client.submit(RequestKind.ROTATE), wait=True, timeout=minute, answer_within=minute
    )
    return capsys.readouterr().err.splitlines()


def test_each_progress_is_printed_once_with_who_is_missing(capsys, monkeypatch):
    """The window and its end; then the verifiers by name, how many more, and the deadline; fewer of them later."""
    window = waiting(not_before=DEADLINE)
    two = waiting(deadline=DEADLINE, waiting_for=["a pod-1", "b pod-2"], missing=5)
    one = waiting(deadline=DEADLINE, waiting_for=["b pod-2"], missing=1)
    assert [
        f"waits (from {DEADLINE})",
        f"waits (or at {DEADLINE} without those that lag)",
        "  waiting for a pod-1",
        "  waiting for b pod-2",
        "  and for 3 more",
        f"waits (or at {DEADLINE} without those that lag)",
        "  waiting for b pod-2",
    ] == printed(capsys, monkeypatch, window, window, two, two, one)


def test_an_answer_of_an_older_broker_is_printed_as_it_is(capsys, monkeypatch):
    """It has no figures of verifiers."""
    assert ["waits"] == printed(capsys, monkeypatch, waiting())
