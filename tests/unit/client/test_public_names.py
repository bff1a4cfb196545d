from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import carnet
import carnet.errors

PUBLIC = [
    "AsyncClient",
    "AsyncVerifier",
    "BrokerUnavailableError",
    "CarnetError",
    "Claims",
    "Client",
    "ConfigError",
    "Identity",
    "InvalidIdentityError",
    "InvalidKeySetError",
    "InvalidRevocationError",
    "InvalidTokenError",
    "InvalidTokenReason",
    "KeySetUnavailableError",
    "RequestDeniedError",
    "SpiffeID",
    "Token",
    "TokenError",
    "Verifier",
    "VerifierStatus",
    "current",
]


def loaded_after(statement: str) -> set[str]:
    """The modules that a process has loaded after `statement`."""
    text = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_public_names_are_these() -> None:
    """What users may rely on is this list: a change here is a change of the API."""
    assert PUBLIC == carnet.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_there(name: str) -> None:
    """Each name loads from its module, and is the same object there."""
    value = getattr(carnet, name)
    assert name == value.__name__
    assert value is getattr(importlib.import_module(value.__module__), name)


def test_every_error_is_public() -> None:
    """Whatever Carnet raises on purpose can be caught by a public name."""
    assert set() == set(carnet.errors.__all__) - set(PUBLIC)


def test_public_names_are_listed() -> None:
    """`dir` shows the names before they are loaded."""
    assert set() == set(PUBLIC) - set(dir(carnet))


def test_other_names_do_not_exist() -> None:
    """A wrong name is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="module 'carnet' has no attribute 'Clinet'"):
        _ = carnet.Clinet


@pytest.mark.parametrize("module", ["carnet", "carnet.spiffe", "carnet.claims", "carnet.verify", "carnet.identity"])
def test_rules_load_without_the_wire(module: str) -> None:
    """Who parses a SPIFFE ID or verifies a token offline does not pay for gRPC, protobuf or click."""
    assert set() == loaded_after(f"import {module}") & {"grpc", "google.protobuf", "click", "jwt"}
