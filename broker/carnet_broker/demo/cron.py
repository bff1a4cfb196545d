"""The cron worker of the demo: a process of seconds that charges once, and ends.

``python -m carnet_broker.demo.cron``
"""

from __future__ import annotations

import json
import os
import sys

import grpc

from carnet import Client
from carnet.errors import CarnetError
from carnet.grpc import secure_channel
from carnet_broker.demo.shop import AUDIENCE, SERVER_NAME, charge


def main() -> None:
    """Charge once."""
    with (
        Client() as client,
        secure_channel(
            os.environ["PAYMENTS_TARGET"], client=client, audience=AUDIENCE, scopes=["charge"], server_name=SERVER_NAME
        ) as channel,
    ):
        print(json.dumps(charge(channel, amount=1)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (CarnetError, grpc.RpcError) as error:
        sys.exit(f"cron: {error}")
