"""The keyring as the JSON document in Vault. It holds no secret: public keys, states and times.

Reading is strict: a document that breaks a rule is refused whole, and the keyring in use stays.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from carnet.errors import CarnetError, InvalidKeySetError
from carnet.jwk import PublicJWK
from carnet_broker.core.keyring import KeyRecord, Keyring, KeyState

__all__ = ["InvalidKeyringError", "keyring_of_content", "keyring_to_content"]

_FORM: Final = 1
_TIMES: Final = (
    "created_at",
    "published_at",
    "activated_at",
    "sign_until",
    "retired_at",
    "keep_until",
    "ended_at",
    "destroyed_at",
)
_REQUIRED_TIMES: Final = {
    KeyState.PENDING: ("created_at",),
    KeyState.STANDBY: ("created_at", "published_at"),
    KeyState.ACTIVE: ("created_at", "published_at", "activated_at", "sign_until"),
    KeyState.RETIRED: ("created_at", "published_at", "activated_at", "retired_at", "keep_until"),
    KeyState.REMOVED: ("created_at", "ended_at"),
    KeyState.REVOKED: ("created_at", "ended_at"),
}


class InvalidKeyringError(CarnetError):
    """The document in Vault is not a keyring of this broker."""

    code = "INVALID_KEYRING"


def keyring_to_content(keyring: Keyring, *, store: str) -> dict[str, Any]:
    """Return the document of `keyring`. `store` names the kind of key store that holds the private keys."""
    keys = []
    for key in keyring.keys:
        entry: dict[str, Any] = {"state": str(key.state), "jwk": key.jwk.to_dict()}
        if key.version is not None:
            entry["version"] = key.version
        if key.answers:
            entry["answers"] = list(key.answers)
        entry |= {name: at.isoformat() for name in _TIMES if (at := getattr(key, name)) is not None}
        keys.append(entry)
    return {
        "form": _FORM,
        "issuer": keyring.issuer,
        "store": store,
        "generation": keyring.generation,
        "keys": keys,
    }


def keyring_of_content(content: dict[str, Any], *, issuer: str, store: str) -> Keyring:
    """Return the keyring that `content` is.

    Raises `InvalidKeyringError` for another issuer or key store, or a document that breaks a rule.
    """
    expected = {"form": _FORM, "issuer": issuer, "store": store}
    for name, value in expected.items():
        if content.get(name) != value:
            msg = (
                f"the keyring document has {name} {content.get(name)!r:.80}, where this broker is set up for {value!r}"
            )
            raise InvalidKeyringError(msg)
    if unknown := set(content) - {*expected, "generation", "keys"}:
        msg = f"the keyring document has unknown members {sorted(unknown)!r:.80}: was it written by a newer broker?"
        raise InvalidKeyringError(msg)
    generation, entries = content.get("generation"), content.get("keys")
    if type(generation) is not int or generation < 1 or not isinstance(entries, list):
        msg = "the keyring document has no generation of 1 or more, or no list of keys"
        raise InvalidKeyringError(msg)
    keys = tuple(_key_of_entry(entry, position) for position, entry in enumerate(entries))
    keyring = Keyring(issuer=issuer, generation=generation, keys=keys)
    if len({key.kid for key in keys}) != len(keys) or len(keyring.in_state(KeyState.ACTIVE)) > 1:
        msg = "the keyring document names a key twice, or has more than one ACTIVE key"
        raise InvalidKeyringError(msg)
    return keyring


def _key_of_entry(entry: object, position: int) -> KeyRecord:
    """Return one key of the document."""
    where = f"keys[{position}] of the keyring document"
    known = {"state", "jwk", "version", "answers", *_TIMES}
    if not isinstance(entry, dict) or set(entry) - known or not isinstance(entry.get("jwk"), dict):
        msg = f"{where} is not an object of the known members"
        raise InvalidKeyringError(msg)
    try:
        state = KeyState(entry.get("state", ""))
        jwk = PublicJWK.parse(entry["jwk"])
        times = {name: _time_of(entry[name]) for name in _TIMES if name in entry}
    except (ValueError, TypeError, InvalidKeySetError) as error:
        msg = f"{where} cannot be read: {error}"
        raise InvalidKeyringError(msg) from error
    version, answers = entry.get("version"), entry.get("answers", [])
    if (version is not None and (type(version) is not int or version < 1)) or not (
        isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    ):
        msg = f"{where} has a version that is not a whole number, or answers that are not texts"
        raise InvalidKeyringError(msg)
    if missing := [name for name in _REQUIRED_TIMES[state] if name not in times]:
        msg = f"{where} is {state} but has no {missing[0]}"
        raise InvalidKeyringError(msg)
    return KeyRecord(jwk=jwk, state=state, version=version, answers=tuple(answers), **times)


def _time_of(text: object) -> datetime:
    """Return an aware UTC time, or raise `ValueError` or `TypeError`."""
    if not isinstance(text, str):
        msg = "a time is not a text"
        raise TypeError(msg)
    at = datetime.fromisoformat(text)
    if at.utcoffset() != timedelta(0):
        msg = f"the time {text[:40]!r} is not in UTC"
        raise ValueError(msg)
    return at
