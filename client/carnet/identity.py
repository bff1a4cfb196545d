"""The identity of a workload: one snapshot of its certificate and key; and the CA file that its peers are checked by.

gRPC takes any bytes as certificate, key and CA, and a bad one shows only as a connection that fails. So all three are
parsed here first, and what is wrong with a file is said with its name and the remedy.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from carnet.claims import certificate_thumbprint
from carnet.errors import ConfigError, InvalidIdentityError
from carnet.spiffe import SpiffeID, spiffe_id_of_certificate

__all__ = ["Identity", "StrPath", "load_ca_file"]

StrPath: TypeAlias = str | os.PathLike[str]
"""A file name, as the standard library takes it."""

_log: Final = logging.getLogger("carnet")

_MAX_FILE_BYTES: Final = 1024 * 1024
"""A CA bundle of some hundred certificates; more is a wrong file."""

_MIN_RSA_BITS: Final = 2048
_CERTIFICATE: Final = "certificate"
_KEY: Final = "key"
_CA: Final = "CA"
_ISSUE_ANOTHER: Final = "have it issued with a P-256 key"


class _ProblemError(Exception):
    """What is wrong with one part of an identity, and what to do; the caller knows the part's name."""

    def __init__(self, part: str, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.part = part
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Identity:
    """One certificate and its private key, as they belong together. Made by `Identity.parse` and `Identity.load`.

    Two identities are equal when their certificates are. Whether the certificate is still valid is not checked when
    it is made: `not_after` says until when it is.
    """

    certificate_chain_pem: bytes = field(repr=False, compare=False)
    """The certificate and the intermediates above it, in the order in which TLS sends them."""
    private_key_pem: bytes = field(repr=False, compare=False)
    """The private key, PKCS 8 without a password."""
    certificate: x509.Certificate = field(repr=False, compare=False)
    """The workload's own certificate, the first of the chain."""
    spiffe_id: SpiffeID = field(compare=False)
    """The name of the workload."""
    thumbprint: str
    """What a token is bound to: ``x5t#S256`` of the certificate (RFC 8705 section 3.1)."""

    @classmethod
    def parse(cls, certificate_pem: bytes, private_key_pem: bytes) -> Identity:
        """Return the identity of a PEM chain (leaf first) and its PEM key. Raises `ConfigError`.

        The leaf carries exactly one SPIFFE ID, the key is its own, and is of a kind that gRPC can use: P-256, P-384,
        or RSA of at least 2,048 bits.
        """
        try:
            return _parse(certificate_pem, private_key_pem)
        except _ProblemError as error:
            msg = f"the {error.part} {error.problem}: {error.remedy}"
            raise ConfigError(msg) from error.__cause__

    @classmethod
    def load(
        cls,
        cert_file: StrPath,
        key_file: StrPath,
        *,
        cert_variable: str | None = None,
        key_variable: str | None = None,
    ) -> Identity:
        """Read both files and return the identity in them. Raises `ConfigError`, which names the file.

        A key file that every user of the host may write to is told of in the log ``carnet``, and used: file systems
        that know no modes show all files so (those of Windows in WSL and Docker). Kubernetes mounts keys readable by
        every user of the container, which is said nothing about.

        `cert_variable` and `key_variable` are the environment variables that named the files, if any did: an error
        names them too.
        """
        files = {
            _CERTIFICATE: _described("certificate file", cert_file, cert_variable),
            _KEY: _described("key file", key_file, key_variable),
        }
        certificate_pem = _read(cert_file, files[_CERTIFICATE])
        private_key_pem = _read(key_file, files[_KEY])
        _warn_of_mode(key_file, files[_KEY])
        try:
            return _parse(certificate_pem, private_key_pem)
        except _ProblemError as error:
            msg = f"{files[error.part]} {error.problem}: {error.remedy}"
            raise ConfigError(msg) from error.__cause__

    @property
    def not_before(self) -> datetime:
        """From when the certificate is valid, aware UTC."""
        return self.certificate.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        """Until when the certificate is valid, aware UTC."""
        return self.certificate.not_valid_after_utc


def load_ca_file(ca_file: StrPath, *, variable: str | None = None) -> bytes:
    """Read the PEM file of certificate authorities that peers are checked by. Raises `ConfigError`, which names it.

    `variable` is the environment variable that named the file, if one did.
    """
    name = _described("CA file", ca_file, variable)
    pem = _read(ca_file, name)
    try:
        _certificates(pem, _CA)
    except _ProblemError as error:
        msg = f"{name} {error.problem}: {error.remedy}"
        raise ConfigError(msg) from error.__cause__
    return pem


def _described(what: str, path: StrPath, variable: str | None) -> str:
    return f"{what} {os.fspath(path)}" if variable is None else f"{what} {os.fspath(path)} ({variable})"


def _read(path: StrPath, name: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        msg = f"{name} does not exist: correct the path, or have the file written there"
        raise ConfigError(msg) from error
    except PermissionError as error:
        msg = f"{name} may not be read by this process: give its user read access"
        raise ConfigError(msg) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
        msg = f"{name} cannot be read ({getattr(error, 'strerror', None) or error}): name a PEM file"
        raise ConfigError(msg) from error
    if len(content) > _MAX_FILE_BYTES:
        msg = f"{name} is larger than {_MAX_FILE_BYTES} bytes: name a PEM file"
        raise ConfigError(msg)
    return content


def _warn_of_mode(path: StrPath, name: str) -> None:
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError:  # It was there a moment ago: it is being renewed.
        return
    if mode & stat.S_IWOTH:
        _log.warning(
            "every user of this host may write to %s (mode %04o): take that right away (chmod o-w)", name, mode
        )


def _certificates(pem: bytes, part: str) -> list[x509.Certificate]:
    if not pem.strip():
        raise _ProblemError(part, "is empty", "have it written again")
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise _ProblemError(part, "holds no PEM certificate", "name the file that has -----BEGIN CERTIFICATE-----")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise _ProblemError(part, "holds a certificate that cannot be parsed", "have it written again") from error


def _private_key(pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        problem, remedy = "has a password", "store the key without one, readable by this user alone"
        raise _ProblemError(_KEY, problem, remedy) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _ProblemError(
            _KEY, "holds no PEM private key", "name the file that has -----BEGIN PRIVATE KEY-----"
        ) from error


def _parse(certificate_pem: bytes, private_key_pem: bytes) -> Identity:
    leaf = _certificates(certificate_pem, _CERTIFICATE)[0]
    try:
        spiffe_id = spiffe_id_of_certificate(leaf)
    except InvalidIdentityError as error:
        problem, remedy = f"is not that of a workload ({error})", "have it issued with one spiffe:// URI name"
        raise _ProblemError(_CERTIFICATE, problem, remedy) from error
    private_key = _private_key(private_key_pem)
    match private_key:
        case ec.EllipticCurvePrivateKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            pass
        case rsa.RSAPrivateKey(key_size=size) if size >= _MIN_RSA_BITS:
            pass
        case _:
            # Tried: with P-521, secp256k1, Ed25519 and Ed448 gRPC's handshake fails, and does not say why.
            raise _ProblemError(_KEY, "is not P-256, P-384 or RSA of 2048 bits or more", _ISSUE_ANOTHER)
    if private_key.public_key() != leaf.public_key():
        problem = "is not the key of the certificate"
        raise _ProblemError(_KEY, problem, "name a pair that belongs together; in a chain the own certificate is first")
    return Identity(
        certificate_chain_pem=certificate_pem,
        # As one PKCS 8 block: what stands around it in the file (EC PARAMETERS, certificates) is not for gRPC.
        private_key_pem=private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        certificate=leaf,
        spiffe_id=spiffe_id,
        thumbprint=certificate_thumbprint(leaf),
    )
