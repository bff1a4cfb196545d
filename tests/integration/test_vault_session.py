"""The login at a real OpenBao: kept alive, renewed, replaced, and shared by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from carnet_broker.edges.vault import (
    SecretFile,
    SecretValue,
    VaultForbiddenError,
    VaultLoginError,
    VaultSession,
    VaultSettings,
)
from carnet_broker.ports import KeyStoreUnavailableError
from support.lying_vault import LyingVault, reply
from support.vault import VaultPlace, idle_sockets


@dataclass
class Clock:
    """Seconds that a test sets."""

    at: float = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at


@pytest.fixture(name="clock")
def _clock() -> Clock:
    return Clock()


@pytest.fixture(name="session")
def _session(vault_place: VaultPlace, clock: Clock) -> Iterator[VaultSession]:
    """A session of the broker that believes the clock of the test. Its tokens live 900 s."""
    session = VaultSession(vault_place.settings(), clock=clock)
    yield session
    session.close()


def _use(session: VaultSession) -> str:
    """Do something that the broker may, and return the token that did it."""
    path = f"carnet/metadata/{session.settings.environment}/requests"
    session.call("list", "LIST", path, accept=(404,))
    assert session._login is not None
    return session._login.token


def _looked_up(place: VaultPlace, token: str) -> dict[str, object]:
    found = place.root().write_data("auth/token/lookup", data={"token": token})["data"]
    assert isinstance(found, dict)
    return found


def _settings(vault: LyingVault) -> VaultSettings:
    return VaultSettings(
        address=vault.address,
        environment="prod",
        role_id=SecretValue("VAULT_ROLE_ID", "role"),
        secret_id=SecretValue("VAULT_SECRET_ID", "secret"),
    )


def test_one_login_serves_many_calls(session: VaultSession, clock: Clock):
    """A token is used until two thirds of its life are over, and not looked at before."""
    token = _use(session)
    clock.at += 900 * 2 / 3 - 1
    assert token == _use(session)
    assert "renew" not in repr(session)


def test_k06_token_is_renewed_at_two_thirds(session: VaultSession, vault_place: VaultPlace, clock: Clock):
    """At two thirds the same token is renewed, and again at two thirds of the new life."""
    token = _use(session)
    assert None is _looked_up(vault_place, token).get("last_renewal")
    for _ in range(3):
        clock.at += 900 * 2 / 3 + 1
        assert token == _use(session)
    assert _looked_up(vault_place, token)["last_renewal"]


def test_k06_token_that_ended_is_replaced(session: VaultSession, clock: Clock):
    """After a sleep longer than the token's life the next call logs in anew, without a try of the old token."""
    token = _use(session)
    clock.at += 900
    assert token != _use(session)


@pytest.mark.parametrize("how", ["revoked", "revoked before the renewal"])
def test_k06_revoked_token_is_replaced(session: VaultSession, vault_place: VaultPlace, clock: Clock, how: str):
    """A token that Vault revoked is replaced in the same call, as is one that cannot be renewed."""
    token = _use(session)
    vault_place.root().write_data("auth/token/revoke", data={"token": token})
    if how == "revoked before the renewal":
        clock.at += 700
    assert token != _use(session)


def test_k06_token_that_may_not_be_renewed_is_replaced_in_time(
    session: VaultSession, vault_place: VaultPlace, clock: Clock
):
    """A token of the batch type is not renewable: at two thirds there is a new login, and no gap."""
    role = f"auth/approle/role/carnet-broker-{vault_place.environment}"
    vault_place.root().write_data(role, data={"token_type": "batch"})
    token = _use(session)
    clock.at += 900 * 2 / 3 - 1
    assert token == _use(session)
    clock.at += 2
    assert token != _use(session)


def test_k06_token_near_its_longest_life_is_replaced(vault_place: VaultPlace):
    """With a real clock, tokens of 2 s that Vault renews to 3 s at most: no call fails over several lives."""
    role = f"auth/approle/role/carnet-broker-{vault_place.environment}"
    vault_place.root().write_data(role, data={"token_ttl": 2, "token_max_ttl": 3})
    session = vault_place.session()
    tokens = set()
    ends_at = time.monotonic() + 7
    while time.monotonic() < ends_at:
        tokens.add(_use(session))
        time.sleep(0.05)
    assert 3 <= len(tokens) <= 8


def test_k06_renewal_that_fails_is_tried_again_later(clock: Clock):
    """While the token is good, a failing renewal disturbs no call, and is not repeated at each."""
    with LyingVault().listening() as vault:
        vault.otherwise = reply(404, {"errors": []})
        vault.lies["auth/token/renew-self"] = reply(503, {"errors": ["Vault is sealed"]})
        session = VaultSession(_settings(vault), clock=clock)
        token = _use(session)
        vault.lies["auth/approle/login"] = reply(503, {"errors": ["Vault is sealed"]})
        clock.at += 2401
        for _ in range(5):
            assert token == _use(session)
        assert 1 == len([one for one in vault.received if one.path == "auth/token/renew-self"])
        clock.at += 301
        assert token == _use(session)
        assert 2 == len([one for one in vault.received if one.path == "auth/token/renew-self"])
        clock.at = 1000 + 3600
        with pytest.raises(KeyStoreUnavailableError, match="Vault is sealed"):
            _use(session)
        vault.lies["auth/approle/login"] = LyingVault.login(token="s.next")
        clock.at += 1
        assert "s.next" == _use(session)
        session.close()


def test_renewal_that_makes_no_sense_keeps_the_token(clock: Clock):
    """An answer to a renewal that cannot be read does not take away a token that is good."""
    with LyingVault().listening() as vault:
        vault.lies["auth/token/renew-self"] = reply(200, {"auth": {"client_token": ""}})
        session = VaultSession(_settings(vault), clock=clock)
        token = _use(session)
        clock.at += 2401
        assert token == _use(session)
        session.close()


def test_token_without_an_end_is_never_renewed(clock: Clock):
    """A token whose life is 0 has no end: it is used until it is refused."""
    with LyingVault().listening() as vault:
        vault.lies["auth/approle/login"] = LyingVault.login(life=0)
        session = VaultSession(_settings(vault), clock=clock)
        token = _use(session)
        clock.at += 1e9
        assert token == _use(session)
        assert ["auth/approle/login"] == [one.path for one in vault.received if one.method == "POST"]
        session.close()


def test_rotated_secret_id_is_picked_up(vault_place: VaultPlace, tmp_path: Path, clock: Clock):
    """The file is read at each login: a secret id that was wrong or missing needs no restart to be put right."""
    good = vault_place.bootstrapped.credentials["broker"].secret_id_file.read_text(encoding="ascii")
    file = tmp_path / "secret-id"
    session = vault_place.session(secret_id=SecretFile(file))
    with pytest.raises(VaultLoginError, match=f"{file} cannot be read"):
        session.check()
    file.write_text("wrong\n", encoding="ascii")
    time.sleep(0.6)  # The pause after a login that failed.
    with pytest.raises(VaultLoginError, match="invalid role or secret ID"):
        session.check()
    file.write_text(good, encoding="ascii")
    time.sleep(0.6)
    session.check()
    assert _use(session)


def test_k06_permission_revoked_and_given_back_while_running(session: VaultSession, vault_place: VaultPlace):
    """A policy that was taken away is an error that says so; given back, the same session goes on."""
    policy = f"sys/policies/acl/carnet-broker-{vault_place.environment}"
    root = vault_place.root()
    text = root.read(policy)["data"]["policy"]
    assert _use(session)
    root.write_data(policy, data={"policy": 'path "nothing" { capabilities = ["read"] }'})
    for _ in range(5):
        with pytest.raises(VaultForbiddenError, match="policy of this AppRole does not allow it"):
            _use(session)
    root.write_data(policy, data={"policy": text})
    assert _use(session)


def test_k06_role_that_got_another_policy_is_used_after_a_new_login(
    session: VaultSession, vault_place: VaultPlace, clock: Clock
):
    """A token carries the policies of its login: a role that was put right is tried again, once in ten seconds."""
    role = f"auth/approle/role/carnet-broker-{vault_place.environment}"
    root = vault_place.root()
    root.write_data(role, data={"token_policies": ["default"]})
    with pytest.raises(VaultForbiddenError):
        _use(session)
    root.write_data(role, data={"token_policies": [f"carnet-broker-{vault_place.environment}"]})
    with pytest.raises(VaultForbiddenError):
        _use(session)
    clock.at += 10
    assert _use(session)


def test_threads_share_one_login(vault_place: VaultPlace):
    """Sixteen threads that begin together cause one login, and all of them get their answers."""
    session = vault_place.session()
    barrier = threading.Barrier(16)
    tokens: list[str] = []

    def use() -> None:
        barrier.wait()
        tokens.append(_use(session))

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 16 == len(tokens)
    assert 1 == len(set(tokens))


def test_threads_whose_token_was_revoked_share_the_next(session: VaultSession, vault_place: VaultPlace):
    """All threads that are refused with the same dead token go on with one new login."""
    token = _use(session)
    vault_place.root().write_data("auth/token/revoke", data={"token": token})
    barrier = threading.Barrier(8)
    tokens: list[str] = []

    def use() -> None:
        barrier.wait()
        tokens.append(_use(session))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8 == len(tokens)
    assert 1 == len(set(tokens) - {token})


def test_connections_are_used_again_and_closed(session: VaultSession):
    """Calls one after the other use one connection; `close` ends it, and the session can still be used."""
    _use(session)
    first = idle_sockets(session)
    assert 1 == len(first)
    for _ in range(5):
        _use(session)
        assert first == idle_sockets(session)
    session.close()
    assert [] == idle_sockets(session)
    assert [-1] == [each.fileno() for each in first]
    assert _use(session)


@pytest.mark.parametrize(
    "path", ["carnet/../sys/mounts", "carnet//x", "/x", "x/", "", "a b", "x?y=1", "x#y", "%2e", "a%2Fb", "%2E%2E"]
)
def test_path_that_would_lead_elsewhere_is_refused(session: VaultSession, path: str):
    """Whatever a name in a path holds, no request goes to another place than it seems to."""
    with pytest.raises(KeyStoreUnavailableError, match="not of Carnet's form"):
        session.call("try", "GET", path)
