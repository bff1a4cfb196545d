"""Whether this broker can issue. Pure: the edge brings the facts.

Ready means: a key to sign with, a policy, a certificate of its own that is valid, and an audit file that takes records.
What is amiss and does not stop issuing, such as a Vault that is down, is *degraded*: reported, and still ready.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Readiness", "judge_readiness"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of ``/readyz``."""

    problems: tuple[str, ...]
    """What stops this broker from issuing; empty when it is ready."""
    degraded: tuple[str, ...]
    """What is amiss and will stop it if nobody acts."""

    @property
    def ready(self) -> bool:
        """Whether it can issue."""
        return not self.problems


def judge_readiness(
    *, needed: Iterable[tuple[bool, str]], wanted: Iterable[tuple[bool, str]], draining: bool
) -> Readiness:
    """Return the answer from facts, each with the text to say where it does not hold."""
    problems = [text for holds, text in needed if not holds]
    if draining:
        problems.insert(0, "the broker is shutting down")
    return Readiness(tuple(problems), tuple(text for holds, text in wanted if not holds))
