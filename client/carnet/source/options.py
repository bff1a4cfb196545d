"""What `Client` and `AsyncClient` are made of: both take the same arguments and read the same environment."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

from carnet import settings
from carnet.cache import CacheSettings, TokenCache, TokenKey
from carnet.claims import is_name, is_scope_token
from carnet.endpoints import Failover, Target
from carnet.errors import ConfigError
from carnet.identity import Identity, StrPath

__all__ = ["ClientOptions", "token_key"]


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The checked settings of one client."""

    brokers: tuple[Target, ...]
    broker_name: str
    identity: Identity
    ca_pem: bytes = field(repr=False)
    timeout: timedelta
    attempt_timeout: timedelta
    cache: CacheSettings

    @classmethod
    def read(
        cls,
        *,
        brokers: str | Iterable[str] | None,
        broker_name: str | None,
        identity: Identity | None,
        cert_file: StrPath | None,
        key_file: StrPath | None,
        ca_file: StrPath | None,
        timeout: timedelta,
        attempt_timeout: timedelta,
        cache: CacheSettings | None,
    ) -> ClientOptions:
        """Fill in what is not given from the environment, read the files, and check it all. Raises `ConfigError`."""
        targets = settings.targets(settings.BROKER, brokers)
        if identity is None:
            identity = settings.identity(cert_file, key_file)
        elif cert_file is not None or key_file is not None:
            msg = "identity=... is given together with cert_file=... or key_file=...: give the one or the others"
            raise ConfigError(msg)
        if timeout <= timedelta() or attempt_timeout <= timedelta():
            msg = "timeout and attempt_timeout must be more than zero"
            raise ConfigError(msg)
        return cls(
            brokers=targets,
            broker_name=settings.broker_name(broker_name, workload=identity.spiffe_id),
            identity=identity,
            ca_pem=settings.ca_pem(ca_file),
            timeout=timeout,
            attempt_timeout=attempt_timeout,
            cache=cache or CacheSettings(),
        )

    def new_cache(self) -> TokenCache:
        """Return an empty cache."""
        return TokenCache(self.cache, new_rng())

    def new_failover(self) -> Failover:
        """Return the brokers in an order that starts anywhere, so that clients spread over them."""
        return Failover(self.brokers, first=new_rng().randrange(len(self.brokers)))


def new_rng() -> random.Random:
    """Return a source of jitter that no other process shares."""
    return random.Random()  # noqa: S311 - jitter, not a secret


def token_key(identity: Identity, audience: str, scopes: Iterable[str], ttl: timedelta | None) -> TokenKey:
    """Return the key of one request. Raises `TypeError` for a single text as `scopes`."""
    if isinstance(scopes, str):
        msg = f"scopes is the text {scopes!r}: give a list, for instance [{scopes!r}]"
        raise TypeError(msg)
    return TokenKey.of(identity.thumbprint, audience, scopes, ttl)


def check_key(key: TokenKey) -> None:
    """Raise `ConfigError` for a request that no broker can grant, before it goes out."""
    if not is_name(key.audience):
        msg = f"audience {key.audience[:80]!r} cannot be in a token: name it as the policy does"
        raise ConfigError(msg)
    for scope in key.scopes:
        if not is_scope_token(scope):
            msg = f"scope {scope[:80]!r} cannot be in a token: name it as the policy does, one scope for each entry"
            raise ConfigError(msg)
    if key.ttl is not None and key.ttl <= timedelta():
        msg = f"ttl is {key.ttl}: ask for more than zero, or leave it out"
        raise ConfigError(msg)
