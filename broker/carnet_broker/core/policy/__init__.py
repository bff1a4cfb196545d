"""Policy: who may call which audience with which scopes, and why."""

from __future__ import annotations

from carnet_broker.core.policy.document import PolicyError
from carnet_broker.core.policy.explain import Explanation, explain
from carnet_broker.core.policy.load import PolicyTestError, PolicyTestResult, compile_policy, load_policy, run_tests
from carnet_broker.core.policy.model import Admin, Audience, Denial, DenialReason, Grant, Granted, Policy, PolicyTest

__all__ = [
    "Admin",
    "Audience",
    "Denial",
    "DenialReason",
    "Explanation",
    "Grant",
    "Granted",
    "Policy",
    "PolicyError",
    "PolicyTest",
    "PolicyTestError",
    "PolicyTestResult",
    "compile_policy",
    "explain",
    "load_policy",
    "run_tests",
]
