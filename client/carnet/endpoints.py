"""Where the servers are, and which of them to ask next.

Rules of `Failover`:

- The one that answered last is asked again (a warm connection is cheap); the first pick is the caller's to choose, so
  that clients spread.
- One that failed is asked after all that did not, until its pause is over; the pauses double up to a limit. No pause
  ever takes a server off the list: when all failed, the one whose pause ends first is asked first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

from carnet.errors import ConfigError

__all__ = ["Failover", "Target", "is_dns_name", "parse_targets"]

_FORM: Final = "host:port, or [IPv6 address]:port"
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_NUMBERS: Final = re.compile(r"[0-9.]+")
_MAX_HOST: Final = 254
_MAX_PORT: Final = 65_535
_MAX_TARGETS: Final = 32

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    """The address of one server. Made by `Target.parse`; `str` gives it back as gRPC takes it."""

    host: str
    """A DNS name or an IP address; an IPv6 address stands without brackets."""
    port: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target that `text` is: ``host:port`` or ``[IPv6]:port``. Raises `ConfigError`.

        There are no schemes and no defaults: a name that gRPC would read as a path or a resolver is refused.
        """
        host, colon, port = text.rpartition(":")
        if not colon or not _PORT.fullmatch(port) or not 0 < int(port) <= _MAX_PORT:
            raise _wrong(text, "has no port from 1 to 65535")
        try:
            if host.startswith("[") and host.endswith("]") and "%" not in host:
                host = str(IPv6Address(host[1:-1]))
            elif _NUMBERS.fullmatch(host):
                host = str(IPv4Address(host))
            elif not is_dns_name(host):
                raise _wrong(text, "has no valid host")
        except AddressValueError:
            raise _wrong(text, "has no valid IP address") from None
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_dns_name(text: str) -> bool:
    """Say whether `text` can be the name of a host, and is no IP address."""
    return len(text) <= _MAX_HOST and _HOST.fullmatch(text) is not None and not _NUMBERS.fullmatch(text)


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(f"{text[:80]!r} {problem}: write {_FORM}")


def parse_targets(text: str) -> tuple[Target, ...]:
    """Return the targets of a comma-separated list, at least one and none twice. Raises `ConfigError`."""
    targets = tuple(Target.parse(part.strip()) for part in text.split(","))
    if len(set(targets)) != len(targets):
        msg = f"{text[:80]!r} names a server twice: name each once"
        raise ConfigError(msg)
    if len(targets) > _MAX_TARGETS:
        msg = f"{len(targets)} servers are named where at most {_MAX_TARGETS} are allowed: put a name in front of them"
        raise ConfigError(msg)
    return targets


class Failover:
    """The order in which to ask servers that can all answer. Times are monotonic seconds. Not thread-safe."""

    def __init__(self, targets: Sequence[Target], *, first: int = 0) -> None:
        """Start at the target with index `first`, modulo their number."""
        first %= len(targets)
        self._order = [*targets[first:], *targets[:first]]
        self._failures = dict.fromkeys(targets, 0)
        self._paused_until = dict.fromkeys(targets, 0.0)

    def order(self, mono: float) -> list[Target]:
        """Return every target, the one to ask first at the front."""
        # sorted() is stable: all that have no pause keep their place.
        return sorted(self._order, key=lambda target: self._pause_end(target, mono))

    def succeeded(self, target: Target) -> None:
        """Note that `target` answered."""
        self._failures[target] = 0
        self._order.remove(target)
        self._order.insert(0, target)

    def failed(self, target: Target, mono: float) -> None:
        """Note that `target` could not be reached, or could not answer."""
        self._failures[target] += 1
        pause = min(_FIRST_PAUSE * 2.0 ** min(self._failures[target] - 1, 16), _LONGEST_PAUSE)
        self._paused_until[target] = mono + pause

    def _pause_end(self, target: Target, mono: float) -> float:
        end = self._paused_until[target]
        return end if self._failures[target] and end > mono else 0.0
