"""The set-up of the demo: OpenBao, its bootstrap, a broker, and the payments service, as processes of their own.

Everything is real and everything is thrown away: certificates from OpenBao's PKI, keys in its KV or Transit engine,
mutual TLS, one directory. Whatever happens, the processes end with the stage, also when it is killed.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from carnet import Identity
from carnet.errors import CarnetError
from carnet_broker.demo.children import ending_with_us
from carnet_broker.demo.openbao import OpenBao, OpenBaoError

__all__ = ["ISSUER", "Stage", "StageError"]

ISSUER: Final = "https://tokens.prod.example"
TRUST_DOMAIN: Final = "prod.example"
_WORKLOADS: Final = {
    "broker": "spiffe://prod.example/ns/carnet/sa/broker,serves",
    "payments": "spiffe://prod.example/ns/shop/sa/payments,serves",
    "orders": "spiffe://prod.example/ns/shop/sa/orders",
    "cron": "spiffe://prod.example/ns/shop/sa/cron",
    "outsider": "spiffe://prod.example/ns/shop/sa/outsider",
    "admin": "spiffe://prod.example/ns/ops/sa/breakglass",
}
_POLICY: Final = """\
issuer: https://tokens.prod.example
trust_domain: prod.example

audiences:
  payments:
    served_by: [spiffe://prod.example/ns/shop/sa/payments]
    scopes: [charge, refund]
    max_ttl: 10m

grants:
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [charge] }
  - { workload: spiffe://prod.example/ns/shop/sa/cron, audience: payments, scopes: [charge] }

admins:
  - { workload: spiffe://prod.example/ns/ops/sa/breakglass, from: [127.0.0.0/8] }

tests:
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [charge], expect: allow }
  - { workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [refund], expect: deny }
  - { workload: spiffe://prod.example/ns/shop/sa/outsider, audience: payments, scopes: [charge], expect: deny }
"""
_START_WITHIN: Final = 20.0


class StageError(CarnetError):
    """A part of the demo did not start. The message names its log."""

    code = "STAGE"


def _running_thread() -> ThreadPoolExecutor:
    """Return a thread that starts processes: a signal breaks off the main thread at any point, and never this one.

    So no process starts without being noted, and each ends when this thread does (see `children`). It runs already: a
    pool whose start of a thread is broken off forgets it.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage-starter")
    pool.submit(int).result()
    return pool


@dataclass
class Stage:
    """The running set-up. Made by `Stage.build`."""

    directory: Path
    key_store: str
    vault: OpenBao
    tokens: str = ""
    trust: str = ""
    plain: str = ""
    admin: str = ""
    payments: str = ""
    broker_pid: int = 0
    _processes: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    _starter: ThreadPoolExecutor = field(default_factory=_running_thread)

    @classmethod
    def build(cls, directory: Path, *, key_store: str, tell: Callable[[str], None]) -> Stage:
        """Start everything in `directory`; `tell` hears of each part. Raises `StageError` or `ConfigError`."""
        tell("OpenBao (Vault's API), from its wheel, with TLS")
        stage = cls(directory, key_store, OpenBao.start(directory / "openbao", tls=True))
        try:
            stage._set_up(tell)
        except BaseException:
            stage.close()
            raise
        return stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process: services first, then the broker, then OpenBao."""
        self._starter.submit(int).result()  # A start that is under way is noted after that.
        for _, process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for _, process in reversed(self._processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        self._processes.clear()
        self._starter.shutdown()  # Not before: its end is the end of what it started.
        self.vault.stop()

    def ended(self) -> list[str]:
        """Say of each part that has ended by itself that it did, and where its log is."""
        ended = [
            f"{name} ended by itself (exit code {process.returncode}); its log is {self._log(name)}"
            for name, process in self._processes
            if process.poll() is not None
        ]
        try:
            _ = self.vault.pid
        except OpenBaoError as error:
            ended.append(str(error))
        return ended

    # -- what the scenes use ---------------------------------------------------------------------------------------

    def file(self, workload: str, kind: str = "") -> Path:
        """Return the certificate file of a workload, or with ``-key`` its key file."""
        return self.directory / "identities" / f"{workload}{kind}.pem"

    @property
    def ca_file(self) -> Path:
        """The root of the trust domain."""
        return self.directory / "identities" / "ca.pem"

    @property
    def policy_file(self) -> Path:
        """The policy of the broker."""
        return self.directory / "policy.yaml"

    @property
    def store_url(self) -> str:
        """The shared store of the brokers: a file of the stage."""
        return f"sqlite:///{(self.directory / 'store.db').resolve()}"

    def credential(self, role: str, kind: str) -> Path:
        """Return the ``role-id`` or ``secret-id`` file of a role in Vault (``ci``, ``breakglass``, ``broker``)."""
        return self.directory / "credentials" / f"carnet-{role}-prod-{kind}"

    def identity(self, workload: str) -> Identity:
        """Return the identity of a workload."""
        return Identity.load(self.file(workload), self.file(workload, "-key"))

    def environment(self, workload: str) -> dict[str, str]:
        """Return what the SDK finds in the environment of a workload."""
        return {
            "CARNET_BROKER": self.tokens,
            "CARNET_TRUST": self.trust,
            "CARNET_ADMIN": self.admin,
            "CARNET_ISSUER": ISSUER,
            "CARNET_CERT_FILE": str(self.file(workload)),
            "CARNET_KEY_FILE": str(self.file(workload, "-key")),
            "CARNET_CA_FILE": str(self.ca_file),
            "PAYMENTS_TARGET": self.payments,
        }

    def vault_environment(self, role: str) -> dict[str, str]:
        """Return what a pipeline with that role has in its environment."""
        return {
            "VAULT_ADDR": self.vault.address,
            "VAULT_CACERT": str(self.vault.ca_file),
            "VAULT_ROLE_ID": self.credential(role, "role-id").read_text().strip(),
            "VAULT_SECRET_ID_FILE": str(self.credential(role, "secret-id")),
        }

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a process of the stage; what it prints goes to ``NAME.out`` and ``NAME.log``."""
        return self._starter.submit(self._start, name, command, environment).result()

    def _start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.out").open("wb") as out, self._log(name).open("wb") as log:
            process = subprocess.Popen(
                ending_with_us([sys.executable, "-m", *command]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=_base_environment() | dict(environment),
                start_new_session=True,
            )
            self._processes.append((name, process))
        return process

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a module to its end and return what it printed."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            env=_base_environment() | dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def write_environment(self) -> Path:
        """Write ``env``: shell assignments for whoever wants to use what runs here."""
        entries = {
            "CARNET_BROKER": self.tokens,
            "CARNET_TRUST": self.trust,
            "CARNET_ADMIN": self.admin,
            "CARNET_HEALTH_URL": f"http://{self.plain}/readyz",
            "CARNET_JWKS_URL": f"http://{self.plain}/oauth2/jwks",
            "CARNET_ISSUER": ISSUER,
            "CARNET_CA_FILE": self.ca_file,
            "CARNET_POLICY_FILE": self.policy_file,
            "CARNET_LEDGER_DIR": self.directory / "audit",
            "CARNET_STORE_URL": self.store_url,
            "CARNET_BROKER_PIDS": self.broker_pid,
            "PAYMENTS_TARGET": self.payments,
            "VAULT_ADDR": self.vault.address,
            "VAULT_CACERT": self.vault.ca_file,
        }
        for role in ("ci", "breakglass"):
            for kind in ("role-id", "secret-id"):
                name = f"{role}_{kind}_file".replace("-", "_").upper()
                entries[name] = self.credential(role, kind)
        for workload in ("orders", "payments", "cron", "outsider", "admin"):
            entries[f"{workload.upper()}_CERT_FILE"] = self.file(workload)
            entries[f"{workload.upper()}_KEY_FILE"] = self.file(workload, "-key")
        file = self.directory / "env"
        file.write_text("".join(f"{name}={shlex.quote(str(value))}\n" for name, value in entries.items()))
        return file

    # -- building --------------------------------------------------------------------------------------------------

    def _set_up(self, tell: Callable[[str], None]) -> None:
        tell("bootstrap: PKI with a role for each workload, KV, Transit, AppRoles, least-privilege policies")
        workloads = [argument for workload in _WORKLOADS.values() for argument in ("--workload", workload)]
        self._script(
            "bootstrap_vault.py",
            "setup",
            "--env",
            "prod",
            "--trust-domain",
            TRUST_DOMAIN,
            *workloads,
            "--credentials-dir",
            str(self.directory / "credentials"),
        )
        tell(f"certificates for {', '.join(_WORKLOADS)}")
        out = str(self.directory / "identities")
        with ThreadPoolExecutor(max_workers=3) as pool:
            jobs = [
                pool.submit(
                    self._script, "bootstrap_vault.py", "issue-certificate", workload, "--out", out, "--name", name
                )
                for name, workload in _WORKLOADS.items()
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Those that run are waited for, and no others.
                raise
        self.policy_file.write_text(_POLICY)
        self.tokens, self.trust, self.plain, self.admin, self.payments = (
            f"127.0.0.1:{port}" for port in _free_ports(5)
        )
        config = self.directory / "broker.yaml"
        config.write_text(self._config())
        tell(f"broker: tokens on {self.tokens}, trust on {self.trust}, keys in Vault's {self.key_store} engine")
        broker = self.start("broker", ["carnet_broker", "serve", "--config", str(config)], {})
        self.broker_pid = broker.pid
        self._wait("broker", broker, lambda: _answers(f"http://{self.plain}/readyz"))
        tell(f"payments: a gRPC service on {self.payments} that verifies tokens offline")
        environment = self.environment("payments") | {"CARNET_AUDIENCE": "payments", "PAYMENTS_LISTEN": self.payments}
        payments = self.start("payments", ["carnet_broker.demo.payments"], environment)
        self._wait("payments", payments, lambda: b"serving" in (self.directory / "payments.out").read_bytes())

    def _config(self) -> str:
        """Return the broker's configuration: that of production, with short times so that nobody has to wait."""
        return f"""\
issuer: {ISSUER}
policy_file: policy.yaml
listen: {{ tokens: "{self.tokens}", trust: "{self.trust}", plain: "{self.plain}", admin: "{self.admin}" }}
tls:
  certificate_file: identities/broker.pem
  key_file: identities/broker-key.pem
  client_ca_file: identities/ca.pem
vault:
  address: {self.vault.address}
  ca_file: {self.vault.ca_file}
  role_id_file: credentials/carnet-broker-prod-role-id
  secret_id_file: credentials/carnet-broker-prod-secret-id
  environment: prod
  poll_interval: 500ms
audit: {{ directory: audit }}
store: {{ url: "{self.store_url}", poll_interval: 200ms, lease: 3s }}
trust: {{ heartbeat: 2s, max_staleness: 30s }}
keys: {{ store: {self.key_store}, max_age: 2s, poller_interval: 0, replica_lag: 1s, skew: 1s, min_interval: 0 }}
"""

    def _script(self, script: str, *arguments: str) -> None:
        environment = {"VAULT_ADDR": self.vault.address, "VAULT_TOKEN": self.vault.root_token}
        if self.vault.ca_file is not None:
            environment["VAULT_CACERT"] = str(self.vault.ca_file)
        done = subprocess.run(
            [sys.executable, str(_scripts() / script), *arguments],
            env=_base_environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            msg = f"{script} {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}"
            raise StageError(msg)

    def _wait(self, name: str, process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_WITHIN
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                log = self._log(name)
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                msg = f"{name} did not start: {' '.join(last)} (log: {log})"
                raise StageError(msg)
            time.sleep(0.05)


def _scripts() -> Path:
    """Return the folder of the bootstrap script: in a checkout at its root, in a wheel beside this file."""
    for folder in (Path(__file__).parents[3] / "certs" / "scripts", Path(__file__).parent / "scripts"):
        if (folder / "bootstrap_vault.py").is_file():
            return folder
    msg = "the script bootstrap_vault.py is missing: install carnet[broker] anew"
    raise StageError(msg)


def _base_environment() -> dict[str, str]:
    """Return our environment without what would speak to another Vault or another broker."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("CARNET_", "VAULT_", "BAO_"))}


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - an http URL of our own
            return bool(answer.status == 200)  # noqa: PLR2004
    except (urllib.error.URLError, OSError):
        return False
