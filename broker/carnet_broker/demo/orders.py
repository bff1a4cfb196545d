"""The orders service of the demo: a long-lived process that calls payments again and again.

``python -m carnet_broker.demo.orders``. It never handles a token: the channel attaches one to each call, and the client
replaces it in time. On standard output it prints one JSON object a second: calls so far, failures so far, and the last
failure.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import grpc

from carnet import Client
from carnet.errors import CarnetError
from carnet.grpc import secure_channel
from carnet_broker.demo.shop import AUDIENCE, SERVER_NAME, charge


def main() -> None:
    """Call until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    pause = 1 / float(os.environ.get("ORDERS_PER_SECOND", "20"))
    calls = failures = 0
    last_failure = ""
    with (
        Client() as client,
        secure_channel(
            os.environ["PAYMENTS_TARGET"], client=client, audience=AUDIENCE, server_name=SERVER_NAME
        ) as channel,
    ):
        told_at = time.monotonic()
        while not stop.wait(pause):
            calls += 1
            try:
                charge(channel, amount=calls)
            except grpc.RpcError as error:
                failures += 1
                last_failure = str(error)
            if time.monotonic() - told_at >= 1:
                told_at = time.monotonic()
                print(json.dumps({"calls": calls, "failures": failures, "last_failure": last_failure}), flush=True)
    print(json.dumps({"calls": calls, "failures": failures, "last_failure": last_failure}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except CarnetError as error:
        sys.exit(f"orders: {error}")
