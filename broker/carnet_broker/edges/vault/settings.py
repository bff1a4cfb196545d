"""Where Vault is, and who we are there. All of it is given: nothing comes from the environment of the process."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from carnet.errors import ConfigError

__all__ = ["SecretFile", "SecretValue", "VaultSettingError", "VaultSettings"]

_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*|[0-9A-Fa-f:.]+")
_SEGMENTS: Final = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+")
_SECRET: Final = re.compile(r"[!-~]{1,1024}")
_SCHEMES: Final = frozenset({"http", "https"})


class VaultSettingError(ConfigError):
    """One of the settings cannot be right. `field` says which, by its name in `VaultSettings`."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A secret in a file of its own, read each time that it is needed: a rotated one is picked up."""

    path: Path

    def __call__(self) -> str:
        """Return the secret, without white space around it. Raises `ConfigError` that names the file."""
        try:
            with self.path.open("rb") as file:
                raw = file.read(4096)
        except OSError as error:
            msg = f"{self.path} cannot be read ({error.strerror}): it must hold what Vault's AppRole gave out"
            raise ConfigError(msg) from error
        text = raw.decode("ascii", errors="replace").strip()
        if not _SECRET.fullmatch(text):
            msg = f"{self.path} is empty, or holds more than one line of printable ASCII: write the bare value into it"
            raise ConfigError(msg)
        return text


@dataclass(frozen=True, slots=True)
class SecretValue:
    """A secret that was given as such. `name` is said in errors and `repr`, the value never."""

    name: str
    value: str = field(repr=False)

    def __call__(self) -> str:
        """Return the secret, without white space around it. Raises `ConfigError` that gives the name."""
        text = self.value.strip()
        if not _SECRET.fullmatch(text):
            msg = f"{self.name} is empty, or not one line of printable ASCII: set it to what Vault's AppRole gave out"
            raise ConfigError(msg)
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultSettings:
    """One Vault (or OpenBao), and the AppRole to log in with. Raises `VaultSettingError`."""

    address: str
    """``https://HOST[:PORT]``. ``http`` only to this machine, unless `plaintext` says otherwise."""
    environment: str
    """The first part of every path under `kv_mount`, for instance ``prod``."""
    role_id: Callable[[], str]
    """Called at each login, as is `secret_id`; raises `ConfigError` where there is none."""
    secret_id: Callable[[], str]
    ca_file: Path | None = None
    """The PEM file that vouches for Vault's certificate, read for each connection. None: the system's own."""
    namespace: str | None = None
    kv_mount: str = "carnet"
    transit_mount: str = "transit"
    transit_key: str = ""
    """Empty: ``carnet-`` and the environment."""
    approle_mount: str = "approle"
    timeout: timedelta = timedelta(seconds=5)
    """For one operation as a whole: connecting, a login that it may need, and the answer to the last byte."""
    plaintext: bool = False
    """Allow ``http`` to another machine. Private keys and tokens then cross the network in the clear."""

    def __post_init__(self) -> None:
        """Check every field, and fill in `transit_key`."""
        self._check_address()
        if not self.transit_key:
            object.__setattr__(self, "transit_key", f"carnet-{self.environment}")
        for name in ("environment", "transit_key"):
            _check_path(name, getattr(self, name), _SEGMENT)
        for name in ("kv_mount", "transit_mount", "approle_mount"):
            _check_path(name, getattr(self, name), _SEGMENTS)
        if self.namespace is not None:
            _check_path("namespace", self.namespace, _SEGMENTS)
        if self.timeout <= timedelta(0):
            msg = "the timeout for Vault must be longer than nothing, for instance 5s"
            raise VaultSettingError(msg, field="timeout")

    def check_files(self) -> None:
        """Read the CA file and the secrets once. Raises `ConfigError` that names what cannot be used.

        Each is read again when it is needed; this is for those who would rather know at the start.
        """
        self.role_id()
        self.secret_id()
        if self.ca_file is None:
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=self.ca_file)
        except ssl.SSLError as error:
            msg = f"{self.ca_file} holds no certificate that can be read: give the PEM file of the CA of Vault"
            raise ConfigError(msg) from error
        except OSError as error:
            msg = f"{self.ca_file} cannot be read ({error.strerror}): give the PEM file of the CA of Vault"
            raise ConfigError(msg) from error

    def _check_address(self) -> None:
        shown = "the address of Vault" if "@" in self.address else f"the address of Vault {self.address[:80]!r}"
        try:
            url = urlsplit(self.address)
            host, port = url.hostname or "", url.port
        except ValueError as error:
            msg = f"{shown} is not a URL ({error}): give https://HOST:PORT"
            raise VaultSettingError(msg, field="address") from None
        bare = {url.scheme: "", f"{url.scheme}://{url.netloc}": "", f"{url.scheme}://{url.netloc}/": ""}
        if (
            url.scheme not in _SCHEMES
            or self.address not in bare
            or "@" in url.netloc
            or port == 0
            or not _HOST.fullmatch(host)
        ):
            msg = f"{shown} is not of the form https://HOST:PORT: it has no path, and holds no password"
            raise VaultSettingError(msg, field="address")
        if url.scheme == "http" and not self.plaintext and not _is_this_machine(host):
            msg = f"{shown} would send keys and tokens in the clear: give an https address"
            raise VaultSettingError(msg, field="address")


def _check_path(name: str, value: str, form: re.Pattern[str]) -> None:
    """Refuse what would name another path than it seems to."""
    if not form.fullmatch(value) or {".", ".."} & set(value.split("/")):
        msg = f"the {name} of Vault {value[:80]!r} is not letters, digits and '._-' (mounts and namespaces: also '/')"
        raise VaultSettingError(msg, field=name)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
