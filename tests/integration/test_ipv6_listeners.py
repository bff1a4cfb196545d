"""Listeners on IPv6: all of them on `[::1]`, whom the policy lets in from there, and addresses that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from carnet.v1 import admin_pb2, admin_pb2_grpc
from support.commands import one_line, run_command
from support.running_broker import POLICY, RunningBroker, start_broker, write_broker_files
from support.vault import VaultPlace, prepare

ADMIN = "spiffe://prod.example/ns/ops/sa/breakglass"
ELSEWHERE = "spiffe://prod.example/ns/ops/sa/elsewhere"
ADMINS = f"""{POLICY}
admins:
  - {{ workload: {ADMIN}, from: ["::1/128"] }}
  - {{ workload: {ELSEWHERE}, from: [127.0.0.0/8] }}
"""
ON_SIX = {"listen": dict.fromkeys(("tokens", "trust", "admin"), "[::1]:0")}


@pytest.fixture(name="place", scope="module")
def _place(openbao, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultPlace]:
    place = prepare(openbao, tmp_path_factory.mktemp("login"))
    yield place
    place.close()


@pytest.fixture(name="broker", scope="module")
def _broker(place: VaultPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    with start_broker(place, directory, policy=ADMINS, settings=ON_SIX) as running:
        running.ca.issue(ADMIN).write(directory, "admin")
        yield running


def status_of(broker: RunningBroker, spiffe_id: str) -> admin_pb2.GetStatusResponse:
    """Ask the admin port as somebody. Raises `grpc.RpcError`."""
    with broker.channel(broker.identity(spiffe_id), "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        answer: admin_pb2.GetStatusResponse = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=20)
        return answer


def test_the_admin_port_on_ipv6_loopback_takes_who_may_come_from_there(broker: RunningBroker):
    """Its address is in the log with brackets. The network of the policy is compared with the IPv6 address."""
    assert re.fullmatch(r"\[::1\]:[1-9][0-9]*", broker.addresses["admin"])
    assert 1 == len(status_of(broker, ADMIN).replicas)
    with pytest.raises(grpc.RpcError) as caught:
        status_of(broker, ELSEWHERE)
    assert grpc.StatusCode.PERMISSION_DENIED is caught.value.code()


def test_the_commands_take_an_ipv6_address(broker: RunningBroker):
    """`CARNET_ADMIN=[::1]:PORT`; and a token can be had from a listener on IPv6 as well."""
    environment = {
        "CARNET_ADMIN": broker.addresses["admin"],
        "CARNET_CERT_FILE": str(broker.directory / "admin.pem"),
        "CARNET_KEY_FILE": str(broker.directory / "admin-key.pem"),
        "CARNET_CA_FILE": str(broker.ca_file),
    }
    ended = run_command("carnet_broker", "revoke", "--jti", "token-0123456789012345", "--json", environment=environment)
    assert (0, "") == (ended.code, ended.err)
    assert 1 == json.loads(ended.out)["revocation_version"]
    assert broker.issue()


@pytest.mark.parametrize(
    ("address", "beyond", "says"),
    [
        ("[2001:db8::1]:0", False, "admin_beyond_loopback"),
        ("[::]:0", False, "admin_beyond_loopback"),
        ("::1:0", False, "is no address; write host:port, for instance 0.0.0.0:8443 or [::1]:8443"),
        ("[2001:db8::1]:0", True, "listen.admin: cannot listen on [2001:db8::1]:0: "),
    ],
)
def test_an_ipv6_address_that_cannot_be_is_one_line_that_says_why(
    place: VaultPlace, tmp_path: Path, address: str, beyond: bool, says: str
):
    """Beyond loopback without its flag, without brackets, or of no interface of this host."""
    settings = {"listen": {"admin": address, "admin_beyond_loopback": beyond}}
    config, _ = write_broker_files(place, tmp_path, policy=ADMINS, settings=settings)
    ended = run_command("carnet_broker", "serve", "--config", str(config))
    assert 2 == ended.code
    if beyond:  # Found out while it starts: the log comes before.
        assert says in ended.err.splitlines()[-1]
    else:
        assert says in one_line(ended)
