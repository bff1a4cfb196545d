"""What a scene of the demo is, and what scenes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from carnet import Client
from carnet_broker.demo.stage import Stage

__all__ = ["Scene", "SceneFailedError", "Tell", "client_of", "require"]

Tell = Callable[[str], None]


class SceneFailedError(Exception):
    """Something in a scene did not go as it must."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene: a title, and what happens. `play` raises `SceneFailedError`."""

    title: str
    play: Callable[[Stage, Tell], None]


def require(condition: bool, what: str) -> None:  # noqa: FBT001 - reads like an assertion
    """Raise `SceneFailedError` unless `condition` holds."""
    if not condition:
        raise SceneFailedError(what)


@contextmanager
def client_of(stage: Stage, workload: str) -> Iterator[Client]:
    """Make a client of `workload`, closed with the block."""
    with Client(brokers=stage.tokens, identity=stage.identity(workload), ca_file=stage.ca_file) as client:
        yield client
