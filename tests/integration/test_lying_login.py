"""A login that lies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from carnet_broker.edges.vault import (
    VaultForbiddenError,
    VaultLoginError,
    VaultSession,
)
from support.lying_vault import LyingVault, once, reply
from support.vault_lies import OPERATIONS, WRONG_BODIES, fails, settings_for


@pytest.fixture(name="vault")
def _vault() -> Iterator[LyingVault]:
    """A server that can be told to lie."""
    with LyingVault().listening() as vault:
        yield vault


@pytest.fixture(name="session")
def _session(vault: LyingVault) -> Iterator[VaultSession]:
    """A session with it."""
    session = VaultSession(settings_for(vault))
    yield session
    session.close()


# -- a login that lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        *(answer for name, answer in WRONG_BODIES.items() if name != "a large body"),
        LyingVault.login(token=""),
        LyingVault.login(token="two words"),
        LyingVault.login(token="a\r\nX-Injected: yes"),
        LyingVault.login(token="\u00e9"),
        LyingVault.login(life="3600"),
        LyingVault.login(life=-1),
        LyingVault.login(life=True),
        LyingVault.login(life=None),
        reply(200, {"auth": None}),
        reply(200, {"auth": {"client_token": 7, "lease_duration": 1}}),
        reply(500, {"errors": ["canary"]}),
        reply(503, {"errors": ["Vault is sealed"]}),
        reply(307, b"", headers={"Location": "http://127.0.0.1:1/"}),
    ],
    ids=lambda answer: repr(answer[-60:]),
)
def test_k06_login_that_makes_no_sense(vault: LyingVault, session: VaultSession, answer: bytes):
    """No login comes of an answer that is none, and no request is made with what it named as a token."""
    vault.lies["auth/approle/login"] = once(answer)
    fails(session, OPERATIONS["read the keyring"])
    assert {"auth/approle/login"} == {received.path for received in vault.received}


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_k06_login_that_is_refused_says_so(vault: LyingVault, session: VaultSession, status: int):
    """A refused login is told apart from a Vault that is down: it is the AppRole that must be looked at."""
    vault.lies["auth/approle/login"] = reply(status, {"errors": ["invalid role or secret ID"]})
    error = fails(session, OPERATIONS["read the keyring"])
    assert isinstance(error, VaultLoginError)
    assert "check the role id and the secret id" in str(error)


def test_k06_failing_logins_do_not_flood_vault(vault: LyingVault, session: VaultSession):
    """A broker that is asked to sign all the time tries to log in twice a second, and answers the rest at once."""
    vault.lies["auth/approle/login"] = reply(400, {"errors": ["invalid role or secret ID"]})
    errors = {str(fails(session, OPERATIONS["sign with Transit"])) for _ in range(200)}
    assert 1 == len(errors)
    assert len(vault.received) <= 3


def test_k06_forbidden_is_asked_again_once_with_a_new_login(vault: LyingVault, session: VaultSession):
    """A 403 may be a dead token: one new login is tried, and after it did not help no other for a while."""
    vault.otherwise = reply(403, {"errors": ["permission denied"]})
    error = fails(session, OPERATIONS["read the keyring"])
    assert isinstance(error, VaultForbiddenError)
    logins = [received for received in vault.received if received.path == "auth/approle/login"]
    assert (2, 4) == (len(logins), len(vault.received))
    for _ in range(20):
        fails(session, OPERATIONS["read the keyring"])
    assert 2 == len([received for received in vault.received if received.path == "auth/approle/login"])
