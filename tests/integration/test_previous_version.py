"""Two versions side by side, the one before and the one here: on one store and one Vault, as while one is upgraded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from carnet.v1 import token_pb2, token_pb2_grpc
from carnet.verify import parse_unverified
from carnet_broker.core.requests import RequestKind, RequestStatus
from carnet_broker.edges.vault import RotationClient
from support.child_lines import child
from support.fleet import start_fleet
from support.previous import PREVIOUS, unpack_previous
from support.running_broker import BROKER_NAME, ISSUER, PAYMENTS

ROOT = Path(__file__).parents[2]
OURS = ("-m", "carnet_broker")
# A rotation takes a second or two, and waits for verifiers for as long as in production.
SETTINGS = {
    "keys": {
        "max_age": "1s",
        "poller_interval": 0,
        "replica_lag": "500ms",
        "skew": "200ms",
        "min_interval": 0,
    },
    "vault": {"poll_interval": "200ms"},
    "trust": {"heartbeat": "1s"},
}
WITHIN = 20.0


@pytest.fixture(name="previous", scope="module")
def _previous(tmp_path_factory):
    return unpack_previous(tmp_path_factory.mktemp("previous") / "files")


def until(true, what):
    """Wait for it."""
    deadline = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < deadline, f"not within {WITHIN} s: {what}"
        time.sleep(0.05)


def watcher(stack, fleet, replica, caller, name, paths=()):
    """Start a process whose verifier knows one replica only."""
    certificate, key = fleet.ca.issue(PAYMENTS).write(fleet.directory, name)
    peer = fleet.directory / "caller.pem"
    peer.write_bytes(caller.certificate_chain_pem)
    return stack.enter_context(
        child(
            "support.verifying_process",
            paths=paths,
            certificate=str(certificate),
            key=str(key),
            caller_certificate=str(peer),
            audience="payments",
            issuer=ISSUER,
            trust=replica.addresses["trust"],
            ca_file=str(fleet.ca_file),
            broker_name=BROKER_NAME,
            max_staleness=60,
        )
    )


def revoke(replica, token, caller):
    """Revoke a token through one replica; return the version."""
    with replica.broker.channel(caller) as channel:
        request = token_pb2.RevokeTokenRequest(token=token)
        return token_pb2_grpc.TokenServiceStub(channel).RevokeToken(request, timeout=10).revocation_version


def kid_of(replica, caller):
    """Return the key that a replica signs with, or why it does not."""
    try:
        return parse_unverified(replica.broker.issue(identity=caller).token).kid
    except grpc.RpcError as error:
        return str(error.code())


def breaking(protos, against):
    """Return exit code and output of `buf breaking`."""
    buf = Path(sys.executable).with_name("buf")
    ended = subprocess.run([buf, "breaking", protos, "--against", against], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def test_the_interface_breaks_nobody_who_has_the_previous_one(previous):
    """What `buf breaking` holds against it: no field, number, name or kind of a message or a call has changed."""
    assert (0, "") == breaking(ROOT / "protos", previous.protos)


def test_an_interface_that_breaks_somebody_is_found(previous, tmp_path):
    """The check finds a field of another number."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    file = tmp_path / "protos/carnet/v1/token.proto"
    file.write_text(file.read_text().replace("string audience = 1;", "string audience = 1001;", 1))
    code, output = breaking(tmp_path / "protos", previous.protos)
    assert 100 == code
    assert "token.proto" in output


def test_what_is_run_as_the_previous_version_is_the_previous_version(previous):
    """Its packages come from its own files, so that the tests beside this one say something."""
    code = "import carnet, carnet_broker; print(carnet.__file__, carnet_broker.__file__)"
    script = Path(previous.command[0])
    script.write_text(script.read_text().replace('"-m", "carnet_broker"', f'"-c", "{code}"'))
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in out.split()]
    assert 2 == len(files)
    assert [] == [file for file in files if previous.directory not in file.parents]
    assert 40 == len(PREVIOUS)


def test_a_store_of_the_previous_version_is_served_by_both_while_an_upgrade_goes_on(
    previous, vault_place, postgres, tmp_path
):
    """One broker of two is upgraded, in place. Verifiers of either version at a broker of the other learn of each
    rotation before it happens and of each revocation, wherever it was made. Then the upgrade is taken back.
    """
    ci = RotationClient(vault_place.session("ci"))
    with (
        start_fleet(
            vault_place, postgres, tmp_path / "fleet", replicas=2, settings=SETTINGS, command=previous.command
        ) as fleet,
        ExitStack() as stack,
    ):
        old, new = fleet
        caller = fleet.identity()
        early = old.broker.issue(identity=caller).token
        before_upgrade = revoke(new, new.broker.issue(identity=caller).token, caller)
        new.restart(command=OURS)
        for replica in fleet:
            until(lambda replica=replica: replica.broker.readiness()["ready"], "ready")
        verifiers = {
            "of the previous version, at a new broker": watcher(stack, fleet, new, caller, "theirs", previous.paths),
            "of this version, at an old broker": watcher(stack, fleet, old, caller, "ours"),
        }
        ours = verifiers["of this version, at an old broker"].ask(do="status")["from"]
        theirs = verifiers["of the previous version, at a new broker"].ask(do="status")["from"]
        assert str(previous.directory) in theirs
        assert str(previous.directory) not in ours

        def verdicts(token):
            return {name: one.ask(do="verify", token=token)["verdict"] for name, one in verifiers.items()}

        def all_at(version):
            statuses = [one.ask(do="status") for one in verifiers.values()]
            return all(status["live"] and status["version"] == version for status in statuses)

        accepted = dict.fromkeys(verifiers, "accepted")
        revoked = dict.fromkeys(verifiers, "REVOKED")
        until(lambda: all_at(before_upgrade), "verifiers that count")
        assert accepted == verdicts(early)
        for _ in range(3):
            before = {kid_of(replica, caller) for replica in fleet}
            assert 1 == len(before)
            time.sleep(0.3)  # More than the skew: a request that is made sooner joins the rotation before it.
            request = ci.submit(RequestKind.ROTATE)
            until(
                lambda request=request: (r := ci.result(request)) is not None and r.status is RequestStatus.DONE,
                "the rotation",
            )
            until(
                lambda before=before: len(kids := {kid_of(one, caller) for one in fleet}) == 1 and kids != before,
                "one new key",
            )
            for replica in fleet:
                assert accepted == verdicts(replica.broker.issue(identity=caller).token)
        for issuing, revoking in ((old, new), (new, old)):
            token = issuing.broker.issue(identity=caller).token
            assert accepted == verdicts(token)
            version = revoke(revoking, token, caller)
            until(lambda version=version: all_at(version), "the revocation")
            assert revoked == verdicts(token)
        new.restart(command=previous.command)
        until(lambda: new.broker.readiness()["ready"], "ready")
        assert revoked == verdicts(token)
        assert accepted == verdicts(new.broker.issue(identity=caller).token)
        until(lambda: all_at(version), "verifiers that count again")
        for replica in fleet:
            assert [] == [entry for entry in replica.broker.log() if entry["event"] == "internal_error"]
