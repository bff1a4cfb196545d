"""How hvac speaks to Vault: over bounded connections, and with no proxy, redirect, retry or cookie.

hvac and requests take much from the environment of the process: addresses, tokens, certificates, proxies. Everything
is given to them here, so that nothing of it changes where a secret goes, or what is trusted.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final

import hvac
import requests
import urllib3
from hvac.adapters import RawAdapter
from requests.adapters import HTTPAdapter

from carnet_broker.edges.vault.connections import AnswerTooLargeError, ExchangeError, Pool, TlsPool, bounds
from carnet_broker.edges.vault.settings import VaultSettings

__all__ = ["bounded_session", "client", "exchange"]

_MAX_IDLE: Final = 8
_CHUNK: Final = 16 * 1024

# Its warnings quote what it cannot read of an answer, and that may be our own token.
logging.getLogger("urllib3").setLevel(logging.ERROR)


class _Session(requests.Session):
    """Does not even look where a redirect leads: requests would read its body first, whatever its size."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Say that there is none."""


class _Adapter(HTTPAdapter):
    """Trusts what its pools are told to."""

    def cert_verify(self, *_: object, **__: object) -> None:
        """Leave out what requests would add: the CAs of certifi."""

    def close(self) -> None:
        """Close idle connections now, and not with the last reference to them, which a traceback may hold."""
        known = self.poolmanager.pools
        pools = [known.get(key) for key in known.keys()]  # noqa: SIM118 - it cannot be iterated over
        super().close()
        for pool in pools:
            if pool is not None:
                pool.close()


def bounded_session(ca_file: Path | None) -> requests.Session:
    """Return a session that can be used in `exchange` only. Thread-safe.

    `ca_file` is read for each connection; None stands for the places that are built into OpenSSL.
    """
    session = _Session()
    session.trust_env = False
    session.stream = True
    session.headers["Accept-Encoding"] = "identity"
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = _Adapter()
    adapter.init_poolmanager(1, _MAX_IDLE, **_trust(ca_file))
    adapter.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": TlsPool}
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _trust(ca_file: Path | None) -> dict[str, Any]:
    if ca_file is not None:
        return {"ca_certs": str(ca_file)}
    # `load_default_certs` would let SSL_CERT_FILE of the environment decide.
    paths = ssl.get_default_verify_paths()
    file, folder = Path(paths.openssl_cafile), Path(paths.openssl_capath)
    found = {"ca_certs": str(file)} if file.is_file() else {}
    return found | ({"ca_cert_dir": str(folder)} if folder.is_dir() else {})


def client(settings: VaultSettings, session: requests.Session, token: str) -> hvac.Client:
    """Return a client that gives every answer back as it came. An empty `token` stands for none.

    What is not given, or given as None, hvac would take from the environment.
    """
    return hvac.Client(
        url=settings.address,
        token=token,
        cert=("", ""),
        verify=True,
        allow_redirects=False,
        session=session,
        adapter=RawAdapter,
        namespace=settings.namespace,
        ignore_exceptions=True,
    )


def exchange(ask: Callable[[], requests.Response], *, deadline: float, max_bytes: int) -> tuple[int, bytes]:
    """Ask by a `client`, and return status and body. `deadline` is of the monotonic clock.

    `max_bytes` is for the whole answer. Raises `ExchangeError`, after which it is not known whether the call had an
    effect.
    """
    chunks: list[bytes] = []
    with bounds(deadline=deadline, max_bytes=max_bytes):
        try:
            with ask() as response:
                # Not `response.content`: it would undo a compression that nobody asked for, to any size.
                while chunk := response.raw.read(_CHUNK, decode_content=False):
                    chunks.append(chunk)
                return response.status_code, b"".join(chunks)
        except AnswerTooLargeError as error:
            error.beginning = b"".join(chunks)
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError):
            # Their texts quote what the other side sent, and that may be our own token.
            msg = "it hung up, or the answer is not HTTP"
            raise ExchangeError(msg) from None
