"""The way to Vault: one login by AppRole that is kept alive, and every failure as one kind of error.

The token of the login is renewed when two thirds of its life are over, by whichever call comes next. It is replaced by
a new login when it ended, may not be renewed any more, or is refused. A refusal (403) may also mean that the policy
says no, so one new login is tried and then no more for a while.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NoReturn

import hvac
import requests

from carnet.errors import ConfigError
from carnet_broker.edges.vault.connections import AnswerTooLargeError, ExchangeError, NotTrustedError
from carnet_broker.edges.vault.failures import describe
from carnet_broker.edges.vault.settings import VaultSettings
from carnet_broker.edges.vault.transport import bounded_session, client, exchange
from carnet_broker.ports import KeyStoreUnavailableError

__all__ = [
    "Reply",
    "VaultForbiddenError",
    "VaultLoginError",
    "VaultNotTrustedError",
    "VaultSession",
    "VaultTooLargeError",
]

_MAX_BYTES: Final = 1024 * 1024
_SEGMENT: Final = r"(?:[A-Za-z0-9._-]|%(?!2[EF])[0-9A-F]{2})+"
"""One part of a path. A quoted full stop or slash might be taken for one that is not."""
_PATH: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_TOKEN: Final = re.compile(r"[!-~]{1,4096}")
_OK: Final = frozenset({200, 204})
_BAD_LOGIN: Final = frozenset({400, 401, 403, 404})
_FORBIDDEN: Final = 403

_RENEW_AT: Final = 2 / 3
_LOGIN_PAUSE: Final = 0.5
"""Seconds between two tries to log in that fail: a broker that signs in Transit must not flood Vault with them."""
_FORBIDDEN_PAUSE: Final = 10.0
"""Seconds after a new login did not help against a 403, in which no other is tried: each leaves a lease in Vault."""


class VaultForbiddenError(KeyStoreUnavailableError):
    """The policy of the AppRole does not allow this operation; a new login did not help."""


class VaultLoginError(KeyStoreUnavailableError):
    """Vault does not accept the AppRole, or there is no role id or secret id to show."""


class VaultNotTrustedError(KeyStoreUnavailableError):
    """Whoever answers at the address has no certificate that the CA file vouches for."""


class VaultTooLargeError(KeyStoreUnavailableError):
    """The answer is longer than this operation allows."""

    def __init__(self, message: str, beginning: bytes) -> None:
        """`beginning`: what came of the answer; for the caller, and not for a message."""
        super().__init__(message)
        self.beginning = beginning


@dataclass(frozen=True, slots=True)
class Reply:
    """What Vault said: the status, and the JSON object (empty where there is no content)."""

    status: int
    body: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Login:
    """A token of Vault, and the client that shows it. The times are of the session's clock, in seconds."""

    client: hvac.Client = field(repr=False)
    token: str = field(repr=False)
    life: float
    renewable: bool
    renew_at: float
    ends_at: float

    @classmethod
    def of(
        cls, auth: object, *, client_with: Callable[[str], hvac.Client], at: float, first_life: float | None
    ) -> _Login:
        """Read the `auth` part of an answer, or raise `ValueError`. `at` is when it was asked for."""
        if not isinstance(auth, dict):
            msg = "it has no auth part"
            raise ValueError(msg)  # noqa: TRY004 - one error for one kind of fault
        token, life, renewable = auth.get("client_token"), auth.get("lease_duration"), auth.get("renewable")
        if not (isinstance(token, str) and _TOKEN.fullmatch(token)) or type(life) is not int or life < 0:
            msg = "its auth part has no token, or no duration"
            raise ValueError(msg)
        client = client_with(token)
        if life == 0:  # A token without an end.
            return cls(client, token, math.inf, renewable=False, renew_at=math.inf, ends_at=math.inf)
        # Close to its longest life a token is renewed for less and less: then a new login comes next.
        near_its_end = first_life is not None and life < first_life * _RENEW_AT
        return cls(
            client,
            token,
            life=life if first_life is None else first_life,
            renewable=renewable is True and not near_its_end,
            renew_at=at + life * _RENEW_AT,
            ends_at=at + life,
        )


class VaultSession:
    """Calls to one Vault as one AppRole. Thread-safe. Nothing is sent before the first call."""

    def __init__(self, settings: VaultSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` (seconds, never set back) decides when the token is renewed; timeouts are real ones."""
        self.settings = settings
        self._clock = clock
        self._timeout = settings.timeout.total_seconds()
        self._http = bounded_session(settings.ca_file)
        self._client_with = partial(client, settings, self._http)
        self._login: _Login | None = None
        self._login_lock = threading.Lock()
        self._failed_login: tuple[float, type[KeyStoreUnavailableError], str] | None = None
        self._no_login_on_403_before = -math.inf

    def __repr__(self) -> str:
        return f"VaultSession({self.settings.address!r})"

    def call(
        self,
        operation: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        accept: Collection[int] = (),
        max_bytes: int = _MAX_BYTES,
    ) -> Reply:
        """Do one operation of Vault's API as the AppRole, and return the answer to it.

        `operation` says in words what cannot be done if it fails, `path` is what follows ``/v1/``. Statuses in `accept`
        are answers like 200 and 204. Every other one, no answer within the timeout, and an answer that is no JSON
        object raise `KeyStoreUnavailableError`, or `VaultForbiddenError`, `VaultLoginError`, `VaultNotTrustedError`
        or `VaultTooLargeError`, which are kinds of it. No message holds a token, a secret id, or text that Vault sent.
        """
        deadline = time.monotonic() + self._timeout

        def ask(login: _Login) -> Reply:
            request = partial(login.client.adapter.request, method, f"v1/{path}", json=body)
            return self._send(operation, path, request, deadline, max_bytes)

        login = self._current_login(deadline)
        reply = ask(login)
        if reply.status == _FORBIDDEN and _FORBIDDEN not in accept:
            again = self._login_after_refusal(login, deadline)
            if again is not None:
                reply = ask(again)
                if reply.status == _FORBIDDEN:
                    self._no_login_on_403_before = self._clock() + _FORBIDDEN_PAUSE
        if reply.status not in _OK and reply.status not in accept:
            self.refused(operation, path, reply)
        return reply

    def check(self) -> None:
        """Log in if that was not done yet. Raises as `call` does."""
        self._current_login(time.monotonic() + self._timeout)

    def close(self) -> None:
        """Close the idle connections. The token is left to end by itself; the session can still be used."""
        self._http.close()

    def refused(self, operation: str, path: str, reply: Reply) -> NoReturn:
        """Raise the error for an answer that is a refusal."""
        kind = VaultForbiddenError if reply.status == _FORBIDDEN else KeyStoreUnavailableError
        raise kind(self._message(f"{operation} ({path})", describe(reply.status, reply.body)))

    def senseless(self, operation: str, what: str) -> NoReturn:
        """Raise the error for an answer that is JSON but not what the operation answers with."""
        msg = self._message(operation, f"the answer makes no sense ({what}): check that the address is Vault's own")
        raise KeyStoreUnavailableError(msg) from None

    # -- the token -------------------------------------------------------------------------------------------------

    def _current_login(self, deadline: float) -> _Login:
        """Return a login whose token is not over, as far as we know."""
        login, now = self._login, self._clock()
        if login is not None and now < login.renew_at:
            return login
        if login is None or now >= login.ends_at:
            with self._holding_login(deadline):
                if self._login is not None and self._clock() < self._login.ends_at:
                    return self._login  # Somebody else was faster.
                return self._log_in(deadline)
        # Still good: one call renews it, the others go on with it meanwhile.
        if self._login_lock.acquire(blocking=False):
            try:
                if self._login is login:
                    self._renew(login, deadline)
            finally:
                self._login_lock.release()
        return self._login or login

    def _login_after_refusal(self, refused: _Login, deadline: float) -> _Login | None:
        """Return another login than the one that was refused, None where another would not help."""
        with self._holding_login(deadline):
            if self._login is not None and self._login.token != refused.token:
                return self._login
            if self._clock() < self._no_login_on_403_before:
                return None
            self._login = None
            return self._log_in(deadline)

    def _holding_login(self, deadline: float) -> _Held:
        return _Held(self._login_lock, deadline, self._message("log in", "another call waits for Vault to do so"))

    def _renew(self, login: _Login, deadline: float) -> None:
        """Renew `login` or replace it. If neither can be done it is used to its end, and tried again before."""
        at = self._clock()
        try:
            if not login.renewable:
                self._log_in(deadline)
                return
            renew = login.client.auth.token.renew_self
            reply = self._send("renew the login", "auth/token/renew-self", renew, deadline)
            if reply.status in _OK:
                auth = reply.body.get("auth")
                self._login = _Login.of(auth, client_with=self._client_with, at=at, first_life=login.life)
            else:
                self._log_in(deadline)
        except (KeyStoreUnavailableError, ValueError):
            pause = max((login.ends_at - at) / 4, _LOGIN_PAUSE)
            self._login = replace(login, renew_at=at + pause)

    def _log_in(self, deadline: float) -> _Login:
        """Log in by AppRole. The caller holds the lock."""
        at = self._clock()
        if self._failed_login is not None and at < self._failed_login[0] + _LOGIN_PAUSE:
            raise self._failed_login[1](self._failed_login[2])
        try:
            self._login = self._try_login(at, deadline)
        except KeyStoreUnavailableError as error:
            self._failed_login = (at, type(error), str(error))
            raise
        self._failed_login = None
        return self._login

    def _try_login(self, at: float, deadline: float) -> _Login:
        mount = self.settings.approle_mount
        try:
            role_id, secret_id = self.settings.role_id(), self.settings.secret_id()
        except ConfigError as error:
            raise VaultLoginError(self._message("log in", str(error))) from error
        approle = self._client_with("").auth.approle
        log_in = partial(approle.login, role_id, secret_id, use_token=False, mount_point=mount)
        reply = self._send("log in", f"auth/{mount}/login", log_in, deadline)
        if reply.status in _BAD_LOGIN:
            what = (
                f"{describe(reply.status, reply.body).partition(':')[0]}: check the role id and the secret id (is it"
                f" over, or of another environment?), and that AppRole is mounted at {mount}"
            )
            raise VaultLoginError(self._message("log in", what))
        if reply.status not in _OK:
            raise KeyStoreUnavailableError(self._message("log in", describe(reply.status, reply.body)))
        try:
            return _Login.of(reply.body.get("auth"), client_with=self._client_with, at=at, first_life=None)
        except ValueError as error:
            self.senseless("log in", str(error))

    # -- one exchange ----------------------------------------------------------------------------------------------

    def _send(
        self,
        operation: str,
        path: str,
        ask: Callable[[], requests.Response],
        deadline: float,
        max_bytes: int = _MAX_BYTES,
    ) -> Reply:
        if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
            self.senseless(operation, "a name in the path is not of Carnet's form")
        where = f"{operation} ({path})"
        try:
            status, body = exchange(ask, deadline=deadline, max_bytes=max_bytes)
        except AnswerTooLargeError as error:
            raise VaultTooLargeError(self._message(where, str(error)), error.beginning) from None
        except NotTrustedError as error:
            what = f"{error}: is this the CA of Vault, and is this Vault's address?"
            raise VaultNotTrustedError(self._message(where, what)) from None
        except ExchangeError as error:
            what = f"{error}: is Vault up, and is this its address?"
            raise KeyStoreUnavailableError(self._message(where, what)) from None
        return self._read(operation, status, body)

    def _read(self, operation: str, status: int, answer: bytes) -> Reply:
        """Return the JSON object of an answer. That of a refusal may be anything: it is only looked at for phrases."""
        body: Any = {}
        if answer.strip():
            try:
                body = json.loads(answer)
            except (ValueError, RecursionError):
                body = None
        if not isinstance(body, dict):
            if status in _OK:
                self.senseless(operation, f"HTTP {status} without a JSON object")
            body = {}
        return Reply(status, body)

    def _message(self, operation: str, what: str) -> str:
        return f"Vault at {self.settings.address}: cannot {operation}: {what}"


class _Held:
    """The lock on the login, waited for no longer than a call may take."""

    def __init__(self, lock: threading.Lock, deadline: float, message: str) -> None:
        self._lock = lock
        self._deadline = deadline
        self._message = message

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            raise KeyStoreUnavailableError(self._message)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
