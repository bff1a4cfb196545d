"""What a signature by Transit costs the process that asks for it: as the broker asks, and with hvac as it comes.

The broker's way has a deadline and a limit, and checks the signature; both are measured in turns against an OpenBao of
their own, without and with TLS. The median of the rounds is printed, in microseconds of CPU of the calling thread.

Run in ``tests/``: ``PYTHONPATH=../certs/scripts python -m bench.vault_sign [--rounds N] [--calls N]``
"""

from __future__ import annotations

import base64
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import hvac
import requests

from carnet_broker.demo.openbao import OpenBao
from carnet_broker.edges.vault import TransitKeyStore
from support.vault import VaultPlace, prepare

SIGNING_INPUT = b"a.b" * 100


def _as_the_broker(place: VaultPlace) -> Callable[[], object]:
    store = TransitKeyStore(place.session())
    signer = store.signer(store.create())
    return lambda: signer.sign(SIGNING_INPUT)


def _with_hvac_as_it_comes(place: VaultPlace) -> Callable[[], object]:
    settings = place.settings()
    session = requests.Session()
    session.trust_env = False
    if settings.ca_file is not None:
        session.verify = str(settings.ca_file)
    client = hvac.Client(url=settings.address, session=session, timeout=5)
    client.auth.approle.login(settings.role_id(), settings.secret_id())
    content = base64.b64encode(SIGNING_INPUT).decode("ascii")
    return lambda: client.secrets.transit.sign_data(
        settings.transit_key, hash_input=content, hash_algorithm="sha2-256", marshaling_algorithm="jws"
    )


WAYS = {"as the broker": _as_the_broker, "hvac as it comes": _with_hvac_as_it_comes}


def _cost(sign: Callable[[], object], calls: int) -> float:
    started = time.thread_time()
    for _ in range(calls):
        sign()
    return (time.thread_time() - started) / calls * 1e6


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--calls", default=400, show_default=True)
def main(rounds: int, calls: int) -> None:
    """Measure, and print a line for each way."""
    for tls in (False, True):
        with tempfile.TemporaryDirectory() as name, OpenBao.start(Path(name) / "bao", dev=True, tls=tls) as server:
            place = prepare(server, Path(name) / "login")
            signers = {way: make(place) for way, make in WAYS.items()}
            costs: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, sign in signers.items():
                    costs[way].append(_cost(sign, calls))
            place.close()
        for way, found in costs.items():
            print(f"{'TLS' if tls else 'plain':5} {way:16} {statistics.median(found):6.0f} us")


if __name__ == "__main__":
    main()
