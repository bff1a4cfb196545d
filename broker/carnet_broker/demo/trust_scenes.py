"""The scenes of revocation and of acknowledged rotation."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import grpc

from carnet.claims import claims_of_payload
from carnet.tls import secure_channel
from carnet.verify import parse_unverified
from carnet_broker.demo.laggard import INSTANCE, Laggard
from carnet_broker.demo.scene import Scene, Tell, client_of, require
from carnet_broker.demo.shop import AUDIENCE, CHARGE, SERVER_NAME, decode, encode
from carnet_broker.demo.stage import Stage

__all__ = ["TRUST_SCENES"]

_BOUND: Final = 0.25
"""Seconds from durable to refused that are aimed at."""
_WORST: Final = 2.5
"""Seconds after which the scene has failed: the machine of a demo may be busy."""
_WITHIN: Final = 20.0
_SKEW: Final = 1.2
"""Seconds after a rotation in which whoever asks for one has just had it (keys.skew of the demo's broker)."""


@dataclass
class _Caller:
    """Shows one token to payments again and again, until it is refused."""

    stage: Stage
    token: str
    accepted: int = 0
    refused_at: datetime | None = None
    code: grpc.StatusCode | None = None
    text: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Call until refused, or told to stop."""
        stage = self.stage
        channel = secure_channel(
            stage.payments,
            identity=stage.identity("orders"),
            ca_pem=stage.ca_file.read_bytes(),
            server_name=SERVER_NAME,
        )
        with channel:
            call = channel.unary_unary(CHARGE, request_serializer=encode, response_deserializer=decode)
            while not self.stop.wait(0.005):
                try:
                    call({"amount": 1}, timeout=5, metadata=(("authorization", f"Bearer {self.token}"),))
                except grpc.RpcError as error:
                    self.refused_at = datetime.now(UTC)
                    failed: Any = error  # What a stub raises is a call as well, which its stubs do not say.
                    self.code, self.text = failed.code(), failed.details()
                    return
                self.accepted += 1


def _revoked(stage: Stage, tell: Tell) -> None:
    with client_of(stage, "orders") as client:
        token = client.get_token(AUDIENCE).value
    jti = claims_of_payload(parse_unverified(token).unverified_payload).token_id
    caller = _Caller(stage, token)
    worker = threading.Thread(target=caller.run)
    worker.start()
    try:
        done = stage.run(
            ["carnet_broker", "revoke", "--jti", jti, "--reason", "stolen", "--wait", "--json"],
            stage.environment("admin"),
        )
        require(done.returncode == 0, f"revoke ended with {done.returncode}: {done.stderr.strip()}")
        worker.join(_WORST)
    finally:
        caller.stop.set()
        worker.join()
    told: dict[str, Any] = json.loads(done.stdout)
    spread = told["spread"]
    tell(f"admin: carnet-broker revoke --jti {jti} --wait: version {told['revocation_version']}")
    slowest = spread["slowest_seconds"]
    measured = "" if slowest is None else f", the slowest after {slowest * 1000:.0f} ms"
    tell(f"{spread['acknowledged']} of {spread['live']} live verifiers have it{measured}")
    require(caller.accepted > 0, f"the token was not good before it was revoked: {caller.text}")
    require(caller.refused_at is not None and caller.code is not None, f"payments accepts it {_WORST} s later")
    assert caller.refused_at is not None and caller.code is not None  # noqa: S101, PT018 - required above
    require(caller.code is grpc.StatusCode.UNAUTHENTICATED, f"refused with {caller.code.name}: {caller.text}")
    # The store's clock is this machine's.
    seconds = (caller.refused_at - datetime.fromisoformat(told["created_at"])).total_seconds()
    tell(f"payments: {caller.accepted} calls accepted before, then {caller.code.name}: {caller.text}")
    tell(f"from durable to refused: {seconds * 1000:.0f} ms (aim: {_BOUND * 1000:.0f} ms)")
    require(seconds <= _WORST, f"that took longer than {_WORST} s")


def _laggard(stage: Stage, tell: Tell) -> None:
    watching = stage.vault_environment("ci") | stage.environment("admin")
    with Laggard(stage) as laggard:
        require(laggard.wait_live(_WITHIN), "the broker does not count the new verifier as live")
        tell(f"a second verifier of payments, {INSTANCE}, has loaded all there is; from now on it takes in nothing")
        forced = stage.run(["carnet_broker", "keys", "rotate", "--now"], stage.vault_environment("breakglass"))
        require(forced.returncode == 0, f"keys rotate --now ended with {forced.returncode}: {forced.stderr.strip()}")
        tell("breakglass: carnet-broker keys rotate --now: the standby signs at once, a new standby is published")
        time.sleep(_SKEW)
        rotation = stage.start("rotation", ["carnet_broker", "keys", "rotate", "--wait"], stage.vault_environment("ci"))
        lines = _lines_with_laggard(stage, watching)
        tell("CI: carnet-broker keys rotate --wait; meanwhile carnet-broker keys status:")
        for line in lines:
            tell(f"  {line}")
        require(rotation.poll() is None, "the rotation did not wait for it")
    tell(f"{INSTANCE} says goodbye")
    code = rotation.wait(_WITHIN)
    require(code == 0, f"keys rotate --wait ended with {code}")
    told = (stage.directory / "rotation.out").read_text().strip()
    tell(f"CI: {told}")
    require(any(line.startswith("standby: ") and line.split()[1] in told for line in lines), "another key signs")


def _lines_with_laggard(stage: Stage, environment: dict[str, str]) -> list[str]:
    """Return what ``keys status`` says of the standby and of the verifiers, once it names the laggard."""
    end = time.monotonic() + _WITHIN
    while True:
        done = stage.run(["carnet_broker", "keys", "status"], environment)
        require(done.returncode == 0, f"keys status ended with {done.returncode}: {done.stderr.strip()}")
        lines = done.stdout.splitlines()
        if any("LAGS" in line and INSTANCE in line for line in lines):
            start = next(number for number, line in enumerate(lines) if line.startswith(("standby:", "verifiers:")))
            return lines[start:]
        require(time.monotonic() < end, "keys status does not name the laggard")


TRUST_SCENES: Final = (
    Scene("a token is revoked while it is used, and payments refuses it", _revoked),
    Scene("a verifier stops acknowledging: the rotation waits for it, and names it", _laggard),
)
