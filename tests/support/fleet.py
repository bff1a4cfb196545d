"""Several real brokers on one PostgreSQL and one environment in OpenBao: the brokers of production, on one host.

::

    with start_fleet(vault_place, own_postgres, tmp_path) as fleet:
        fleet[0].kill()
        fleet[0].start()

A replica keeps its ports through its lives, so that those who know it by its address find it again. With `cuttable`
there is a proxy between each replica and Vault, and one between it and the store; without, nothing is in the way.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

from carnet import Identity
from carnet.testing import CertificateAuthority
from support.postgres import Postgres
from support.prepared_store import prepared_database
from support.running_broker import ORDERS, POLICY, RunningBroker, start_broker
from support.tcp_proxy import TcpProxy, proxy_to
from support.vault import VaultPlace

__all__ = ["LISTENERS", "Fleet", "Replica", "start_fleet"]

LISTENERS: Final = ("tokens", "trust", "plain", "admin")
_COMMAND: Final = ("-m", "carnet_broker")
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below those that the system picks: what a test opens in between cannot take the port of a replica that is down."""


@dataclass
class Replica:
    """One broker of a fleet, through all its lives. `broker` is the process that runs now."""

    number: int
    directory: Path
    vault: TcpProxy | None = None
    """The line to Vault, where the fleet is cuttable."""
    store: TcpProxy | None = None
    """The line to the store, where the fleet is cuttable."""
    lives: int = 0
    _place: VaultPlace | None = None
    _ca: CertificateAuthority | None = None
    _policy: str = POLICY
    _settings: Mapping[str, Any] = field(default_factory=dict)
    _command: Sequence[str] = _COMMAND
    _life: ExitStack = field(default_factory=ExitStack)
    _broker: RunningBroker | None = None

    @property
    def broker(self) -> RunningBroker:
        """The process of this life."""
        assert self._broker is not None, f"replica {self.number} was not started"
        return self._broker

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where it listens, by listener; the same through all lives."""
        return self.broker.addresses

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._broker is not None and self._broker.process.poll() is None

    def start(self, *, command: Sequence[str] | None = None) -> RunningBroker:
        """Start it, and wait until it serves. `command` is what Python is told to run from now on."""
        assert not self.running, f"replica {self.number} runs"
        assert self._place is not None
        self._life.close()
        self._command = command or self._command
        log = self.directory / "log"
        if log.exists():
            log.rename(self.directory / f"log.{self.lives}")
        self.lives += 1
        self._life = ExitStack()
        self._broker = self._life.enter_context(
            start_broker(
                self._place,
                self.directory,
                ca=self._ca,
                policy=self._policy,
                settings=self._settings,
                command=self._command,
            )
        )
        return self._broker

    def kill(self) -> None:
        """kill -9."""
        self.broker.process.send_signal(signal.SIGCONT)
        self.broker.process.kill()
        self.broker.process.wait(10)

    def stop(self) -> int:
        """Stop it as an administrator does, and return the exit code."""
        return self.broker.stop()

    def restart(self, *, command: Sequence[str] | None = None) -> RunningBroker:
        """Stop it as an administrator does, if it runs, and start it again."""
        if self.running:
            self.stop()
        return self.start(command=command)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP for the length of the block: connections stay open, nothing is answered."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """SIGSTOP."""
        self.broker.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.broker.process.send_signal(signal.SIGCONT)

    @contextmanager
    def cut_off(self, *, vault: bool = False, store: bool = False) -> Iterator[None]:
        """Cut it from Vault, from the store, or from both, for the length of the block."""
        lines = [line for wanted, line in ((vault, self.vault), (store, self.store)) if wanted]
        for line in lines:
            assert line is not None, "start the fleet with cuttable=True"
            line.cut()
        try:
            yield
        finally:
            for line in lines:
                assert line is not None
                line.mend()

    def cpu_seconds(self) -> float:
        """Return how much CPU time the process has used so far."""
        times = psutil.Process(self.broker.process.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        """Return how much memory the process holds now, in bytes (RSS)."""
        return int(psutil.Process(self.broker.process.pid).memory_info().rss)

    def close(self) -> None:
        """End it."""
        if self.running:
            self.resume()
        self._life.close()


@dataclass(frozen=True)
class Fleet:
    """Brokers that share a store and a Vault. Made by `start_fleet`."""

    place: VaultPlace
    postgres: Postgres
    database: str
    ca: CertificateAuthority
    directory: Path
    replicas: Sequence[Replica]

    def __getitem__(self, number: int) -> Replica:
        return self.replicas[number]

    def __len__(self) -> int:
        return len(self.replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self.replicas)

    @property
    def ca_file(self) -> Path:
        """The root of the trust domain."""
        return self.directory / "ca.pem"

    @property
    def store_url(self) -> str:
        """The store, as a test that looks into it opens it: with no proxy in between."""
        return self.postgres.url(self.database)

    def targets(self, listener: str) -> list[str]:
        """Return where all replicas listen, as `Client(broker=...)` and `Verifier(trust=...)` take it."""
        return [replica.addresses[listener] for replica in self.replicas]

    def identity(self, spiffe_id: str = ORDERS, **more: Any) -> Identity:  # noqa: ANN401 - passed to the CA
        """Return a new identity of a workload."""
        issued = self.ca.issue(spiffe_id, **more)
        return Identity.parse(issued.certificate_pem, issued.private_key_pem)

    def alive(self) -> list[Replica]:
        """Return those that run."""
        return [replica for replica in self.replicas if replica.running]


@contextmanager
def start_fleet(
    place: VaultPlace,
    postgres: Postgres,
    directory: Path,
    *,
    replicas: int = 3,
    policy: str = POLICY,
    settings: Mapping[str, Any] | None = None,
    cuttable: bool = False,
    command: Sequence[str] = _COMMAND,
) -> Iterator[Fleet]:
    """Start brokers at the same moment, on a database of their own, and wait until all serve; they end with the block.

    `settings` and `command` are those of `start_broker`, for each replica.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ca = CertificateAuthority.create()
    (directory / "ca.pem").write_bytes(ca.root_pem)
    database = prepared_database(postgres)
    with ExitStack() as stack:
        members = []
        for number in range(replicas):
            own: dict[str, Any] = dict(settings or {})
            vault = store = None
            url = postgres.url(database)
            if cuttable:
                vault, store, url = stack.enter_context(_lines(place, postgres, database))
                scheme = place.server.address.partition("://")[0]
                own["vault"] = {**own.get("vault", {}), "address": f"{scheme}://{vault.address}"}
            own["store"] = {**own.get("store", {}), "url": url}
            own["listen"] = {name: f"127.0.0.1:{_port()}" for name in LISTENERS} | own.get("listen", {})
            replica = Replica(
                number,
                directory / f"replica-{number}",
                vault=vault,
                store=store,
                _place=place,
                _ca=ca,
                _policy=policy,
                _settings=own,
                _command=command,
            )
            stack.callback(replica.close)
            members.append(replica)
        with ThreadPoolExecutor(replicas) as starting:
            list(starting.map(Replica.start, members))
        stack.callback(_tell_to_stop, members)
        yield Fleet(place, postgres, database, ca, directory, members)


def _tell_to_stop(replicas: Sequence[Replica]) -> None:
    """Have all drain at the same time; each is waited for when it is closed."""
    for replica in replicas:
        if replica.running:
            replica.resume()
            replica.broker.process.terminate()


@contextmanager
def _lines(place: VaultPlace, postgres: Postgres, database: str) -> Iterator[tuple[TcpProxy, TcpProxy, str]]:
    """Put proxies before Vault and PostgreSQL; give both, and the address of the store through its one."""
    with ExitStack() as stack:
        vault = stack.enter_context(proxy_to(place.server.address.partition("://")[2]))
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carnet-line-")))
        name = ".s.PGSQL.5432"
        store = stack.enter_context(proxy_to(postgres.directory / name, listen=sockets / name))
        yield vault, store, f"postgresql://postgres@/{database}?host={sockets}"


_given: Final[set[int]] = set()


def _port() -> int:
    """Return a port that is free, that was not given before, and that the system gives to nobody who asks for any."""
    order = random.Random(os.urandom(8))  # noqa: S311 - spreads tests that run side by side
    while True:
        port = order.randrange(_FIRST_PORT, _LAST_PORT)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
