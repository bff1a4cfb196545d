"""What each role may do in Vault: every path with every verb, against the cells that are documented."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bootstrap_vault import Bootstrapped, Mounts, Workload, bootstrap
from carnet_broker.demo.openbao import OpenBao
from support.vault import fresh_name
from support.vault_probes import EVERYBODY, Scene, probes

_OWN_TOKEN = {"token lookup self", "token renew self", "token revoke self"}
_CI = {
    *("keyring read", "keyring read version"),
    *("requests create", "requests read", "requests read version"),
    *("results read", "results read version"),
}
ALLOWED = {
    "ci": _CI | _OWN_TOKEN,
    "breakglass": _CI | _OWN_TOKEN | {"breakglass create", "breakglass read", "breakglass read version"},
    "broker": _OWN_TOKEN
    | {
        *("keyring read", "keyring read version", "keyring update", "keyring update by put", "keyring metadata read"),
        *("keys create", "keys read", "keys read version", "keys metadata delete"),
        *("requests list", "requests read", "requests read version"),
        *("requests metadata read", "requests metadata delete"),
        *("breakglass list", "breakglass read", "breakglass read version"),
        *("breakglass metadata read", "breakglass metadata delete"),
        *("results create", "results read", "results read version", "results update", "results update by put"),
        "results metadata delete",
        *("transit read", "transit rotate", "transit sign", "transit sign sha2-256", "transit trim"),
        *("transit config min_decryption_version", "transit config min_encryption_version"),
    },
}


@pytest.fixture(name="made", scope="module")
def _made(openbao: OpenBao, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Bootstrapped]:
    mounts = Mounts(
        kv=fresh_name("kv"),
        transit=fresh_name("transit"),
        pki=fresh_name("pki"),
        pki_int=fresh_name("pki-int"),
        approle=fresh_name("approle"),
    )
    scene = Scene(openbao, mounts, fresh_name("env"))
    done = bootstrap(
        openbao.client(),
        environment=scene.environment,
        trust_domain="prod.example",
        workloads=[Workload.parse("spiffe://prod.example/ns/shop/sa/orders")],
        now=datetime.now(UTC),
        credentials_dir=tmp_path_factory.mktemp("credentials"),
        mounts=mounts,
    )
    return scene, done


def log_in(scene: Scene, done: Bootstrapped, role: str) -> str:
    """A token of a role, by its login files."""
    files = done.credentials[role]
    answer = scene.server.client(token="").auth.approle.login(
        files.role_id_file.read_text().strip(),
        files.secret_id_file.read_text().strip(),
        mount_point=scene.mounts.approle,
    )
    token: str = answer["auth"]["client_token"]
    return token


@pytest.mark.parametrize("role", ALLOWED)
def test_role_may_do_exactly_what_is_documented(made: tuple[Scene, Bootstrapped], role: str) -> None:
    """Of all probes those pass, and succeed, that are in the table, and no other; there are over 300."""
    scene, done = made
    token = log_in(scene, done, role)
    scene.reset()
    allowed, failed = set(), {}
    for probe in probes(scene):
        answer = scene.send(probe, token)
        if answer.status_code != 403:
            allowed.add(probe.name)
            if answer.status_code >= 300:
                failed[probe.name] = answer.text
            if probe.method not in {"GET", "LIST"}:
                scene.reset()
    assert sorted(ALLOWED[role] | EVERYBODY) == sorted(allowed)
    # Of what is open to everybody the login fails: its credentials are made up.
    assert {} == {name: text for name, text in failed.items() if name not in EVERYBODY}


def test_every_probe_reaches_something_in_vault(made: tuple[Scene, Bootstrapped]) -> None:
    """With all rights no probe is refused, and none ends at a path that does not exist: a refusal is the policy's."""
    scene, _ = made
    scene.reset()
    names = [probe.name for probe in probes(scene)]
    assert len(set(names)) == len(names)
    assert len(names) > 300
    unsupported = {
        probe.name: answer.text
        for probe in probes(scene)
        if probe.method in {"GET", "LIST", "SCAN"} and "sys raw" != probe.name
        for answer in [scene.send(probe, scene.server.root_token)]
        if "unsupported path" in answer.text or answer.status_code == 403
    }
    assert {} == unsupported
