"""A real broker, as a process of its own, on the environment of a test in a real OpenBao.

The certificates are of a test CA, so that a test can make every kind of caller. The process listens on ports that the
system picks, and says where in its log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import yaml
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carnet import Identity
from carnet.testing import CertificateAuthority
from carnet.tls import secure_channel
from carnet.v1 import token_pb2, token_pb2_grpc, trust_pb2, trust_pb2_grpc
from support.prepared_store import put_prepared_file
from support.vault import VaultPlace

__all__ = [
    "BROKER_NAME",
    "ISSUER",
    "ORDERS",
    "OUTSIDER",
    "PAYMENTS",
    "POLICY",
    "QUICK",
    "RunningBroker",
    "reason_of",
    "start_broker",
]

ISSUER: Final = "https://tokens.prod.example"
BROKER: Final = "spiffe://prod.example/ns/carnet/sa/broker"
BROKER_NAME: Final = "broker.carnet.svc.prod.example"
ORDERS: Final = "spiffe://prod.example/ns/shop/sa/orders"
PAYMENTS: Final = "spiffe://prod.example/ns/shop/sa/payments"
OUTSIDER: Final = "spiffe://prod.example/ns/shop/sa/outsider"

POLICY: Final = f"""\
issuer: {ISSUER}
trust_domain: prod.example
audiences:
  payments: {{ served_by: [{PAYMENTS}], scopes: [charge, refund], max_ttl: 10m }}
  reports: {{ served_by: [{PAYMENTS}], scopes: [read], max_ttl: 10m, binding: none }}
grants:
  - {{ workload: {ORDERS}, audience: payments, scopes: [charge] }}
  - {{ workload: {ORDERS}, audience: reports, scopes: [read] }}
"""

# The smallest times that hold together, for tests that rotate.
QUICK: Final[Mapping[str, Any]] = {
    "keys": {
        "max_age": "1s",
        "poller_interval": 0,
        "replica_lag": "500ms",
        "skew": "200ms",
        "leeway": 0,
        "island": "2s",
        "min_interval": 0,
    },
    "tokens": {"default_life": "2s", "longest_life": "2s", "shortest_life": "1s"},
    "vault": {"poll_interval": "200ms"},
}

_START_WITHIN: Final = 60.0


@dataclass
class RunningBroker:
    """One broker process, and the certificates of everybody around it. Made by `start_broker`."""

    place: VaultPlace
    ca: CertificateAuthority
    directory: Path
    process: subprocess.Popen[bytes]
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def ca_file(self) -> Path:
        """The root of the trust domain."""
        return self.directory / "ca.pem"

    @property
    def policy_file(self) -> Path:
        """The policy."""
        return self.directory / "policy.yaml"

    @property
    def audit_directory(self) -> Path:
        """The audit files."""
        return self.directory / "audit"

    def identity(self, spiffe_id: str = ORDERS, **more: Any) -> Identity:  # noqa: ANN401 - passed to the CA
        """Return a new identity of a workload."""
        issued = self.ca.issue(spiffe_id, **more)
        return Identity.parse(issued.certificate_pem, issued.private_key_pem)

    @contextmanager
    def channel(self, identity: Identity | None = None, listener: str = "tokens") -> Iterator[grpc.Channel]:
        """Open a channel to a listener as `identity` (default: orders)."""
        with secure_channel(
            self.addresses[listener],
            identity=identity or self.identity(),
            ca_pem=self.ca.root_pem,
            server_name=BROKER_NAME,
        ) as channel:
            yield channel

    def issue(
        self,
        audience: str = "payments",
        scopes: Iterable[str] = (),
        *,
        ttl: timedelta | None = None,
        identity: Identity | None = None,
        timeout: float = 10,
    ) -> token_pb2.IssueTokenResponse:
        """Ask for one token over a new connection. Raises `grpc.RpcError`."""
        request = token_pb2.IssueTokenRequest(audience=audience, scopes=scopes)
        if ttl is not None:
            request.ttl.FromTimedelta(ttl)
        with self.channel(identity) as channel:
            return token_pb2_grpc.TokenServiceStub(channel).IssueToken(request, timeout=timeout)

    def key_set(self, missing: str = "", identity: Identity | None = None) -> trust_pb2.GetKeySetResponse:
        """Ask for the key set over a new connection. Raises `grpc.RpcError`."""
        with self.channel(identity or self.identity(PAYMENTS), "trust") as channel:
            request = trust_pb2.GetKeySetRequest(missing_key_id=missing)
            return trust_pb2_grpc.TrustServiceStub(channel).GetKeySet(request, timeout=10)

    def get(self, path: str) -> tuple[int, str]:
        """Get a path of the plain port; return status and body."""
        try:
            with urllib.request.urlopen(f"http://{self.addresses['plain']}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def readiness(self) -> dict[str, Any]:
        """Return what ``/readyz`` says."""
        answer: dict[str, Any] = json.loads(self.get("/readyz")[1])
        return answer

    def log(self) -> list[dict[str, Any]]:
        """Return the log so far."""
        lines = (self.directory / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def audited(self) -> list[dict[str, Any]]:
        """Return all audit records, of all files."""
        return [
            json.loads(line)
            for file in sorted(self.audit_directory.glob("*.jsonl"))
            for line in file.read_bytes().splitlines()
        ]

    def wait_for(self, condition: Callable[[], object], what: str, *, within: float = 10.0) -> None:
        """Wait until `condition` is true."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"not within {within} s: {what}; log: {self.log()[-5:]}"
            time.sleep(0.05)

    def reload(self) -> None:
        """Send SIGHUP."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)


def write_broker_files(
    place: VaultPlace,
    directory: Path,
    *,
    ca: CertificateAuthority | None = None,
    policy: str = POLICY,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path, CertificateAuthority]:
    """Write all that a broker needs into `directory`; return the configuration file and the CA."""
    directory.mkdir(parents=True, exist_ok=True)
    ca = ca or CertificateAuthority.create()
    ca.issue(BROKER, dns_names=[BROKER_NAME]).write(directory, "broker")
    (directory / "ca.pem").write_bytes(ca.root_pem)
    (directory / "policy.yaml").write_text(policy)
    vault = place.settings()
    credentials = place.bootstrapped.credentials["broker"]
    config: dict[str, Any] = {
        "issuer": ISSUER,
        "policy_file": "policy.yaml",
        "listen": dict.fromkeys(("tokens", "trust", "plain", "admin"), "127.0.0.1:0"),
        "tls": {"certificate_file": "broker.pem", "key_file": "broker-key.pem", "client_ca_file": "ca.pem"},
        "vault": {
            "address": vault.address,
            "role_id_file": str(credentials.role_id_file),
            "secret_id_file": str(credentials.secret_id_file),
            "environment": place.environment,
            "poll_interval": "500ms",
        },
        "audit": {"directory": "audit"},
        "store": {"url": f"sqlite:///{directory.resolve()}/store.db"},
    }
    if vault.ca_file is not None:
        config["vault"]["ca_file"] = str(vault.ca_file)
    for section, values in (settings or {}).items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
    file = directory / "broker.yaml"
    file.write_text(yaml.safe_dump(config))
    return file, ca


@contextmanager
def start_broker(
    place: VaultPlace,
    directory: Path,
    *,
    ca: CertificateAuthority | None = None,
    policy: str = POLICY,
    settings: Mapping[str, Any] | None = None,
    command: Sequence[str] = ("-m", "carnet_broker"),
) -> Iterator[RunningBroker]:
    """Start a broker and wait until it serves; it ends with the block. `command` is what Python is told to run."""
    config, ca = write_broker_files(place, directory, ca=ca, policy=policy, settings=settings)
    if "url" not in (settings or {}).get("store", {}):
        put_prepared_file(directory.resolve() / "store.db")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    broker = RunningBroker(place, ca, directory, process)
    try:
        deadline = time.monotonic() + _START_WITHIN
        while not (serving := [entry for entry in broker.log() if entry.get("event") == "serving"]):
            assert process.poll() is None, f"the broker ended: {(directory / 'log').read_text()}"
            assert time.monotonic() < deadline, f"the broker does not serve: {(directory / 'log').read_text()}"
            time.sleep(0.05)
        broker.addresses = {name: serving[0][name] for name in ("tokens", "trust", "plain", "admin")}
        yield broker
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason that a refusal carries (google.rpc.ErrorInfo), checked to be of our domain."""
    call: Any = error  # What a stub raises is a call as well, which its stubs do not say.
    status = rpc_status.from_call(call)
    assert status is not None, f"no details: {error}"
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), f"no ErrorInfo: {status}"
    assert info.domain == "carnet"
    return str(info.reason)
