"""`carnet-broker keys` as a pipeline runs it: a process with an AppRole, and an exit code for each way to go on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from carnet.verify import parse_unverified
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.commands import Ended, one_line, run_command, vault_environment
from support.forking import Forking, forking
from support.lying_vault import Received
from support.running_broker import POLICY, QUICK, RunningBroker, start_broker
from support.vault import VaultPlace, prepare
from support.vault_proxy import proxy_before

UNHURRIED: dict[str, dict[str, Any]] = {
    "keys": {"skew": "200ms", "min_interval": "1h"},
    "vault": {"poll_interval": "200ms"},
}
"""As in production: a rotation waits a quarter of an hour for verifiers, and CI may ask for one in an hour."""


@pytest.fixture(scope="module", name="quick")
def _quick(openbao, tmp_path_factory) -> Iterator[RunningBroker]:
    """A broker that rotates within four seconds, as often as CI likes: more than a command takes to start."""
    directory = tmp_path_factory.mktemp("quick")
    place = prepare(openbao, directory / "login")
    settings = {**QUICK, "keys": {**QUICK["keys"], "poller_interval": "2s"}}
    with start_broker(place, directory / "broker", policy=POLICY.replace("10m", "2s"), settings=settings) as broker:
        yield broker
    place.close()


@pytest.fixture(scope="module", name="unhurried")
def _unhurried(openbao, tmp_path_factory) -> Iterator[RunningBroker]:
    """A broker with the times of production."""
    directory = tmp_path_factory.mktemp("unhurried")
    place = prepare(openbao, directory / "login")
    with start_broker(place, directory / "broker", settings=UNHURRIED) as broker:
        yield broker
    place.close()


@pytest.fixture(scope="module", name="forked")
def _forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    with forking(tmp_path_factory.mktemp("forked")) as forked:
        yield forked


def keys(
    place: VaultPlace, *arguments: str, role: str = "ci", run: Callable[..., Ended] = run_command, **changes: str | None
) -> Ended:
    """Run ``carnet-broker keys``; no output ever holds a secret. A variable that is changed to None is not set."""
    environment = {**vault_environment(place, role), **changes}
    given = {name: value for name, value in environment.items() if value is not None}
    ended = run("carnet_broker", "keys", *arguments, environment=given)
    secrets = [place.bootstrapped.credentials[name].secret_id_file.read_text().strip() for name in ("ci", "breakglass")]
    assert [] == [secret for secret in [*secrets, "canary"] if secret in ended.out + ended.err]
    assert "Traceback" not in ended.err
    return ended


def active(place: VaultPlace) -> str:
    """Return the name of the key that signs."""
    content = RotationClient(place.session("ci")).keyring()
    (found,) = [key["jwk"]["kid"] for key in content["keys"] if key["state"] == "ACTIVE"]
    return str(found)


def new_standby(broker: RunningBroker) -> str:
    """Swap the key at once, so that the next rotation has to wait for verifiers; return the key that signs now."""
    breakglass = RotationClient(broker.place.session("breakglass"))
    request = breakglass.submit(RequestKind.ROTATE_NOW)
    broker.wait_for(lambda: breakglass.result(request) is not None, "the rotation")
    return str(breakglass.result(request).detail["active_kid"])


def test_rotate_with_wait_ends_with_0_when_the_new_key_signs(quick):
    """It tells of the waiting on standard error, and of the result on standard output, once."""
    before = new_standby(quick)
    ended = keys(quick.place, "rotate", "--wait", "--json")
    answer = json.loads(ended.out)
    assert (0, "done", "ROTATED") == (ended.code, answer["status"], answer["reason"])
    assert before != active(quick.place) == answer["detail"]["active_kid"]
    # Before it, a broker may have had to load the standby.
    *_, progress = ended.err.splitlines()
    assert progress.startswith("the standby key becomes the signer when every verifier can have it (from ")


def test_rotate_without_wait_ends_with_0_when_it_is_accepted(quick):
    """The rotation is carried out later."""
    before = new_standby(quick)
    ended = keys(quick.place, "rotate")
    assert (0, "") == (ended.code, ended.err)
    assert ended.out.startswith("accepted: the standby key becomes the signer when every ")
    quick.wait_for(lambda: active(quick.place) != before, "the rotation")


def test_rotate_that_is_not_done_in_time_ends_with_4_and_stands(quick):
    """Both outputs say how it is; the broker goes on, and does it."""
    before = new_standby(quick)
    ended = keys(quick.place, "rotate", "--wait", "--timeout", "1ms", "--json")
    answer = json.loads(ended.out)
    assert (4, "accepted") == (ended.code, answer["status"])
    assert answer["reason"] in {"WAITING_FOR_REPLICAS", "WAITING_FOR_POLLERS"}
    last = ended.err.splitlines()[-1]
    assert f"error: not done within 1ms; the request {answer['request']} stands" == last
    quick.wait_for(lambda: active(quick.place) != before, "the rotation")


def test_rotate_if_older_than_does_nothing_while_the_key_is_young(quick):
    """Exit code 0 both times: it is as it was wanted."""
    before = active(quick.place)
    ended = keys(quick.place, "rotate", "--wait", "--if-older-than", "1h")
    assert (0, "") == (ended.code, ended.err)
    assert ended.out.startswith("not needed: the signing key is ")
    told = json.loads(keys(quick.place, "rotate", "--if-older-than", "1h", "--json").out)
    assert "not-needed" == told["status"]
    assert 0 <= told["age_seconds"] < 3600
    assert before == active(quick.place)
    ended = keys(quick.place, "rotate", "--wait", "--if-older-than", "1ms")
    assert (0, True) == (ended.code, ended.out.startswith("done: key "))
    assert before != active(quick.place)


def test_rotate_goes_on_waiting_through_an_outage_of_vault(quick):
    """For a second Vault hangs up on the command, from its first question for the result: the request stands, and so
    does the command.
    """
    asked: list[float] = []
    with proxy_before(quick.place.server) as proxy:

        def away_for_a_second(received: Received, send: Callable[[bytes], None]) -> None:
            now = time.monotonic()
            if "/results/" in received.path:
                asked.append(now)
            if asked and now - asked[0] < 1:
                proxy.hang_up(received, send)
            proxy.forward(received, send)

        proxy.otherwise = away_for_a_second
        ended = keys(quick.place, "rotate", "--wait", "--timeout", "20s", VAULT_ADDR=proxy.address)
    assert (0, True) == (ended.code, ended.out.startswith("done: key ")), ended
    assert asked[-1] - asked[0] >= 1


def test_rotate_too_soon_is_refused_with_3(unhurried):
    """The last rotation is not an hour ago; the answer says from when, for people and for machines."""
    before = active(unhurried.place)
    ended = keys(unhurried.place, "rotate", "--wait")
    assert (3, "") == (ended.code, ended.err)
    assert ended.out.startswith("refused: the last rotation was at ")
    ended = keys(unhurried.place, "rotate", "--json")
    answer = json.loads(ended.out)
    assert (3, "refused", "TOO_SOON") == (ended.code, answer["status"], answer["reason"])
    assert datetime.fromisoformat(answer["detail"]["not_before"]).tzinfo is not None
    assert before == active(unhurried.place)


def test_rotate_now_needs_breakglass(unhurried):
    """With the role of CI it ends with 2, and the line names the role that may; nothing was asked for."""
    before = active(unhurried.place)
    line = one_line(keys(unhurried.place, "rotate", "--now"))
    environment = unhurried.place.environment
    assert line.startswith("the role behind VAULT_ROLE_ID may not ask to rotate-now")
    assert f"carnet-breakglass-{environment}" in line
    assert before == active(unhurried.place)


def test_revoke_takes_breakglass_and_a_key_that_there_is(unhurried):
    """The signer is revoked: the standby signs at once, the key set lacks the key; CI and unknown keys are refused."""
    known = json.loads(keys(unhurried.place, "status", "--json").out)["keys"]
    signer = next(key["jwk"]["kid"] for key in known if key["state"] == "ACTIVE")
    assert 2 == keys(unhurried.place, "revoke", signer).code
    unknown = keys(unhurried.place, "revoke", "A" * 43, role="breakglass")
    assert (3, True) == (unknown.code, "no key of that name" in unknown.out)
    done = keys(unhurried.place, "revoke", signer, "--json", role="breakglass")
    assert (0, "REVOKED") == (done.code, json.loads(done.out)["reason"])
    assert signer not in unhurried.key_set().jwks
    assert parse_unverified(unhurried.issue("payments").token).kid != signer


def test_rotate_now_with_breakglass_is_done_at_once(unhurried):
    """In the middle of the quarter of an hour in which CI's rotation would wait."""
    before = active(unhurried.place)
    ended = keys(unhurried.place, "rotate", "--now", "--json", role="breakglass")
    answer = json.loads(ended.out)
    assert (0, "", "done") == (ended.code, ended.err, answer["status"])
    assert before != active(unhurried.place) == answer["detail"]["active_kid"]
    assert ended.seconds < 5


def test_rotate_with_no_broker_ends_with_4_and_the_request_stands(openbao, tmp_path):
    """The line says so, and a broker that comes later answers."""
    place = prepare(openbao, tmp_path / "login")
    line = one_line(keys(place, "rotate", "--answer-within", "300ms"), code=4)
    prefix, suffix = "no broker answered request ", " within 300ms: is one running? The request stands."
    assert (prefix, suffix) == (line[: len(prefix)], line[-len(suffix) :])
    request = line.removeprefix(prefix).removesuffix(suffix)
    client = RotationClient(place.session("ci"))
    assert client.result(request) is None
    with start_broker(place, tmp_path / "broker", settings=UNHURRIED) as broker:
        broker.wait_for(lambda: client.result(request) is not None, "the answer")
    assert RequestStatus.DONE is client.result(request).status
    place.close()


def test_status_names_every_key_with_its_state(unhurried):
    """The same for people as for machines, by each role that may look; and no private key."""
    told = keys(unhurried.place, "status", "--json")
    shown = keys(unhurried.place, "status", role="breakglass")
    assert [(0, ""), (0, "")] == [(ended.code, ended.err) for ended in (told, shown)]
    found = json.loads(told.out)
    first, *lines = shown.out.splitlines()
    assert f"{found['issuer']}: generation {found['generation']}, keys in kv" == first
    assert {"ACTIVE", "STANDBY"} <= {key["state"] for key in found["keys"]}
    assert [(key["state"], key["jwk"]["kid"]) for key in found["keys"]] == [tuple(line.split()[:2]) for line in lines]
    assert all(" created 20" in line for line in lines)
    assert all(key["jwk"].keys() == {"kty", "crv", "x", "y", "kid", "use", "alg"} for key in found["keys"])
    assert "private" not in shown.out + told.out


def test_status_of_an_environment_without_keys_ends_with_4(openbao, tmp_path):
    """There is nothing to show, and the line says who makes the first key."""
    place = prepare(openbao, tmp_path / "login")
    line = one_line(keys(place, "status"), code=4)
    assert f"there is no keyring in {place.environment}: start a broker, which makes the first key" in line
    place.close()


def nobody() -> str:
    """Return an address of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("command", ["rotate", "status"])
def test_a_vault_that_is_not_there_ends_with_4(unhurried, command):
    """It may be there later, so a pipeline may try again; the line names the address and the variable."""
    address = f"http://{nobody()}"
    line = one_line(keys(unhurried.place, command, VAULT_ADDR=address), code=4)
    assert line.startswith(f"VAULT_ADDR: Vault at {address}: cannot log in (auth/approle/login): no connection")


WRONG: dict[str, tuple[dict[str, str | None], str]] = {
    "no address": ({"VAULT_ADDR": None}, "VAULT_ADDR is not set: set it to the URL of Vault"),
    "empty address": ({"VAULT_ADDR": ""}, "VAULT_ADDR is not set: set it to the URL of Vault"),
    "address of another form": (
        {"VAULT_ADDR": "vault.example"},
        "VAULT_ADDR: the address of Vault 'vault.example' is not of the form https://HOST:PORT",
    ),
    "address with a path": ({"VAULT_ADDR": "https://127.0.0.1:1/v1"}, "VAULT_ADDR: the address of Vault"),
    "address in the clear": (
        {"VAULT_ADDR": "http://192.0.2.1:8200"},
        "VAULT_ADDR: the address of Vault 'http://192.0.2.1:8200' would send keys and tokens in the clear",
    ),
    "no role": ({"VAULT_ROLE_ID": None}, "VAULT_ROLE_ID is not set: set it to the role id of carnet-ci"),
    "role of several lines": ({"VAULT_ROLE_ID": "canary\ncanary"}, "VAULT_ROLE_ID is empty, or not one line"),
    "unknown role": ({"VAULT_ROLE_ID": "canary"}, "VAULT_ROLE_ID or VAULT_SECRET_ID is wrong: Vault at http"),
    "no secret": (
        {"VAULT_SECRET_ID_FILE": None},
        "VAULT_SECRET_ID_FILE is not set: set it to the file with the AppRole secret id, or set VAULT_SECRET_ID",
    ),
    "unknown secret": (
        {"VAULT_SECRET_ID_FILE": None, "VAULT_SECRET_ID": "canary"},
        "VAULT_ROLE_ID or VAULT_SECRET_ID is wrong: Vault at http",
    ),
    "secret file that is missing": (
        {"VAULT_SECRET_ID_FILE": "/nowhere/secret-id"},
        "VAULT_SECRET_ID_FILE: /nowhere/secret-id cannot be read (No such file or directory)",
    ),
    "secret file that is a directory": (
        {"VAULT_SECRET_ID_FILE": "/tmp"},  # noqa: S108 - a directory that is everywhere
        "VAULT_SECRET_ID_FILE: /tmp cannot be read (Is a directory)",
    ),
    "environment of another form": (
        {"CARNET_ENVIRONMENT": "../prod"},
        "CARNET_ENVIRONMENT (--env): the environment of Vault '../prod' is not letters, digits",
    ),
    "another environment": (
        {"CARNET_ENVIRONMENT": "elsewhere"},
        "the role behind VAULT_ROLE_ID may not ask to rotate in elsewhere: use the role carnet-ci-elsewhere",
    ),
    "namespace of another form": ({"VAULT_NAMESPACE": "a b"}, "VAULT_NAMESPACE: the namespace of Vault 'a b' is not"),
    "CA file that is missing": (
        {"VAULT_CACERT": "/nowhere/ca.pem"},
        "VAULT_CACERT: /nowhere/ca.pem cannot be read (No such file or directory): give the PEM file",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_variable_that_is_missing_or_wrong_ends_with_2(forked, unhurried, wrong):
    """One line that names the variable and says what to do."""
    changes, expected = WRONG[wrong]
    line = one_line(keys(unhurried.place, "rotate", run=forked.run, **changes))
    assert line.startswith(expected)
    assert ": " in line


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff rubbish", b"-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n"]
)
def test_a_ca_file_that_is_none_ends_with_2(forked, unhurried, tmp_path, content):
    """It is looked at before anything is sent."""
    file = tmp_path / "ca.pem"
    file.write_bytes(content)
    line = one_line(keys(unhurried.place, "status", run=forked.run, VAULT_CACERT=str(file)))
    assert line.startswith(f"VAULT_CACERT: {file} holds no certificate that can be read: give the PEM file")


def test_the_ca_of_another_ends_with_2(own_vault_place, unhurried):
    """Vault is there and cannot be believed: trying again does not help."""
    line = one_line(keys(own_vault_place, "status", VAULT_CACERT=str(unhurried.ca_file)))
    assert line.startswith("VAULT_CACERT is wrong or not set: Vault at https://127.0.0.1:")
    assert "TLS failed (" in line
    line = one_line(keys(own_vault_place, "status", VAULT_CACERT=None))
    assert line.startswith("VAULT_CACERT is wrong or not set: Vault at https://127.0.0.1:")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Missing command: see 'carnet-broker keys --help'"),
        (("rotate", "--soon"), "No such option"),
        (
            ("rotate", "--if-older-than", "yesterday"),
            "Invalid value for '--if-older-than': 'yesterday' is not a duration",
        ),
        (("rotate", "--timeout", "0s"), "Invalid value for '--timeout': '0s' is no time at all"),
        (("rotate", "soon"), "Got unexpected extra argument (soon)"),
        (("rotate", "--kv-mount", "a b"), "--kv-mount: the kv_mount of Vault 'a b' is not"),
    ],
)
def test_an_option_that_is_wrong_ends_with_2(forked, unhurried, arguments, expected):
    """One line here as well."""
    assert one_line(keys(unhurried.place, *arguments, run=forked.run)).startswith(expected)
