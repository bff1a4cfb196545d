"""What CI and breakglass can do through Vault alone, and what each is refused."""

from __future__ import annotations

import uuid

import pytest

from carnet.errors import ConfigError
from carnet_broker.edges.vault import (
    KvKeyStore,
    RotationClient,
    SecretValue,
    TransitKeyStore,
    VaultForbiddenError,
    VaultKeyringDocument,
    VaultRotationRequests,
)
from carnet_broker.ports import KeyStoreUnavailableError, RequestKind, RequestResult, RequestStatus
from support.vault import VaultPlace

_KID = "x" * 42 + "A"


@pytest.mark.parametrize("role", ["ci", "breakglass"])
def test_keyring_is_read_without_secrets(vault_place: VaultPlace, role: str):
    """Both roles see the document; before there is one, the error says what makes it."""
    client = RotationClient(vault_place.session(role))
    with pytest.raises(KeyStoreUnavailableError, match="start a broker"):
        client.keyring()
    VaultKeyringDocument(vault_place.session()).replace({"generation": 1}, expected_version=0)
    assert {"generation": 1} == client.keyring()


def test_request_id_is_a_random_uuid(vault_place: VaultPlace):
    """Every request has a name of its own that nobody can foresee."""
    client = RotationClient(vault_place.session("ci"))
    ids = [uuid.UUID(client.submit(RequestKind.ROTATE)) for _ in range(3)]
    assert 3 == len(set(ids))
    assert {4} == {one.version for one in ids}


def test_breakglass_may_ask_for_everything(vault_place: VaultPlace):
    """Its role may rotate, rotate now, and revoke, and reads the answers."""
    client = RotationClient(vault_place.session("breakglass"))
    asked = [
        client.submit(RequestKind.ROTATE),
        client.submit(RequestKind.ROTATE_NOW),
        client.submit(RequestKind.REVOKE, _KID),
    ]
    box = VaultRotationRequests(vault_place.session())
    pending = box.pending()
    assert asked == [one.request_id for one in pending]
    result = RequestResult(RequestStatus.DONE, "REVOKED", "gone")
    box.answer(pending[2], result)
    assert [None, None, result] == [client.result(one) for one in asked]


@pytest.mark.parametrize(("kind", "kid"), [(RequestKind.ROTATE_NOW, None), (RequestKind.REVOKE, _KID)])
def test_ci_is_told_which_role_may(vault_place: VaultPlace, kind: RequestKind, kid: str | None):
    """What takes breakglass is refused by Vault itself, and the error names the role to use."""
    client = RotationClient(vault_place.session("ci"))
    with pytest.raises(ConfigError, match=f"may not ask to {kind}.*carnet-breakglass-{vault_place.environment}"):
        client.submit(kind, kid)
    assert [] == list(VaultRotationRequests(vault_place.session()).pending())


def test_role_of_another_environment_is_told_so(vault_place: VaultPlace):
    """The login files of one environment open nothing in another."""
    client = RotationClient(vault_place.session("ci", environment="elsewhere"))
    with pytest.raises(ConfigError, match=r"carnet-ci-elsewhere; .*the environment \(elsewhere\) and the KV mount \("):
        client.submit(RequestKind.ROTATE)
    with pytest.raises(ConfigError, match="may not read results in elsewhere"):
        client.result(str(uuid.uuid4()))
    with pytest.raises(ConfigError, match="may not read the keyring in elsewhere"):
        client.keyring()


@pytest.mark.parametrize("field", ["role_id", "secret_id"])
@pytest.mark.parametrize("value", ["canary-wrong", ""])
def test_wrong_login_names_the_variable(vault_place: VaultPlace, field: str, value: str):
    """A wrong or empty role id or secret id is a fault of the configuration, and is not repeated."""
    client = RotationClient(vault_place.session("ci", **{field: SecretValue("VAULT_SECRET_ID", value)}))
    for call in (lambda: client.submit(RequestKind.ROTATE), lambda: client.result("x"), client.keyring):
        with pytest.raises(ConfigError, match="VAULT_ROLE_ID or VAULT_SECRET_ID") as caught:
            call()
        assert "canary" not in str(caught.value)


def test_ci_reaches_nothing_but_its_own_requests(vault_place: VaultPlace):
    """Every path that CI has no business with is refused, for every way of using it; its own three go."""
    broker = vault_place.session()
    kid = KvKeyStore(broker).create().jwk.kid
    transit = TransitKeyStore(broker).create()
    VaultKeyringDocument(broker).replace({"generation": 1}, expected_version=0)
    session = vault_place.session("ci")
    request_id = RotationClient(session).submit(RequestKind.ROTATE)
    data, metadata = vault_place.kv_path, vault_place.metadata_path
    environment, key = vault_place.environment, f"carnet-{vault_place.environment}"
    write = {"data": {"kind": "rotate"}, "options": {"cas": 1}}
    refused = [
        ("GET", f"{data}/keys/{kid}", None),
        ("POST", f"{data}/keys/{kid}", write),
        ("POST", f"{data}/keys/new", {"data": {}, "options": {"cas": 0}}),
        ("DELETE", f"{data}/keys/{kid}", None),
        ("GET", f"{metadata}/keys/{kid}", None),
        ("DELETE", f"{metadata}/keys/{kid}", None),
        ("LIST", f"{metadata}/keys", None),
        ("POST", f"carnet/destroy/{environment}/keys/{kid}", {"versions": [1]}),
        ("POST", f"carnet/undelete/{environment}/keys/{kid}", {"versions": [1]}),
        ("POST", f"{data}/keyring", write),
        ("DELETE", f"{data}/keyring", None),
        ("DELETE", f"{metadata}/keyring", None),
        ("POST", f"{metadata}/keyring", {"cas_required": False}),
        ("POST", f"{data}/requests/{request_id}", write),
        ("DELETE", f"{data}/requests/{request_id}", None),
        ("DELETE", f"{metadata}/requests/{request_id}", None),
        ("LIST", f"{metadata}/requests", None),
        ("POST", f"{data}/breakglass/{uuid.uuid4()}", {"data": {"kind": "rotate-now"}, "options": {"cas": 0}}),
        ("GET", f"{data}/breakglass/{uuid.uuid4()}", None),
        ("POST", f"{data}/results/{request_id}", {"data": {}, "options": {"cas": 0}}),
        ("GET", f"transit/keys/{key}", None),
        ("POST", f"transit/keys/{key}/rotate", {}),
        ("POST", f"transit/keys/{key}/config", {"min_decryption_version": transit.version}),
        ("POST", f"transit/keys/{key}/trim", {"min_available_version": 1}),
        ("POST", f"transit/sign/{key}/sha2-256", {"input": "eA=="}),
        ("GET", f"transit/export/signing-key/{key}", None),
        ("GET", f"transit/backup/{key}", None),
        ("GET", "sys/policies/acl", None),
        ("GET", f"auth/approle/role/carnet-broker-{environment}/role-id", None),
        ("POST", f"auth/approle/role/carnet-broker-{environment}/secret-id", {}),
        ("POST", "auth/token/create", {}),
    ]
    for method, path, body in refused:
        with pytest.raises(VaultForbiddenError):
            session.call("try", method, path, body)
    allowed = [("GET", f"{data}/keyring"), ("GET", f"{data}/requests/{request_id}")]
    for method, path in allowed:
        assert 200 == session.call("try", method, path).status
