from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from datetime import datetime
from typing import Any

import pytest

from carnet import claims, encoding, jwk, verify
from carnet.errors import InvalidTokenError, InvalidTokenReason
from carnet.jwk import KeySet
from carnet.verify import Binding, Expectations, verify_token
from vectors.generate import FILE, document

CONTENT: dict[str, Any] = json.loads(FILE.read_text(encoding="ascii"))
SHARED = {"about", "issuer", "audience", "now", "peer_thumbprint", "binding", "key_set", "vectors"}
REPLACEABLE = {"now", "peer_thumbprint", "binding"}
EXPECTATIONS = {"accepted": {"id", "token", "result"}, "refused": {"id", "token", "result", "reason"}}


@pytest.mark.parametrize("vector", CONTENT["vectors"], ids=lambda vector: vector["id"])
def test_the_verifier_answers_as_the_vector_says(vector: dict[str, Any]) -> None:
    """Accepted, or refused for this reason. A vector that says more than is understood here fails."""
    assert EXPECTATIONS[vector["result"]] == vector.keys() - REPLACEABLE
    setting = CONTENT | {name: vector[name] for name in REPLACEABLE & vector.keys()}
    try:
        verify_token(
            vector["token"],
            keys=KeySet.parse(json.dumps(setting["key_set"])),
            expectations=Expectations(setting["issuer"], setting["audience"], Binding(setting["binding"])),
            peer_thumbprint=setting["peer_thumbprint"],
            now=datetime.fromisoformat(setting["now"]),
        )
        reason = None
    except InvalidTokenError as error:
        reason = error.reason
    assert (InvalidTokenReason(vector["reason"]) if "reason" in vector else None) is reason


def test_the_file_holds_what_is_understood_and_each_vector_once() -> None:
    """An unknown setting, or two vectors of one name, would be a test that is not run."""
    assert SHARED == CONTENT.keys()
    assert [] == [name for name, times in Counter(v["id"] for v in CONTENT["vectors"]).items() if times > 1]


def reasons_of_the_verifier() -> set[InvalidTokenReason]:
    """Return the reasons that `verify_token` can give: those named in its module, and in what that is made of."""
    trees = [ast.parse(inspect.getsource(module)) for module in (verify, claims, encoding, jwk)]
    return {
        InvalidTokenReason[node.attr]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "InvalidTokenReason"
    }


def test_every_reason_for_a_refusal_has_a_vector() -> None:
    """All that the token, the keys and the moment decide. Scopes are looked at where the call is known, revocations
    where they are kept.
    """
    reasons = {InvalidTokenReason(v["reason"]) for v in CONTENT["vectors"] if v["result"] == "refused"}
    assert reasons_of_the_verifier() == reasons
    assert {InvalidTokenReason.INSUFFICIENT_SCOPE, InvalidTokenReason.REVOKED} == set(InvalidTokenReason) - reasons


def test_the_file_is_what_the_generator_writes() -> None:
    """Run `python -m vectors.generate` in tests/ after a change."""
    assert document() == FILE.read_text(encoding="ascii")
