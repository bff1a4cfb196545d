"""What may be believed of the mirror: the copy of the keyring in the shared store, which more can write to than sign.

Rules
-----
1. A broker that writes the mirror signs it, with the ACTIVE key of that keyring; with its STANDBY where the ACTIVE one
   cannot sign. What is signed is the issuer, the generation and the whole document (`mirror_signing_input`).
2. A reader believes a mirror that is signed by a key that is ACTIVE or STANDBY in a keyring that it trusts already: the
   document in Vault that it has just read, or else the keyring in force. A key is published before it is ACTIVE, so a
   reader that was cut off for one rotation knows the key of the next mirror. After two it does not, and it believes
   nothing until it has read Vault. A RETIRED key signs no later mirror, and one that was REVOKED none at all.
3. A mirror that is not believed, and is no later than what the reader trusts, is as good as none: it is written over.
   One that claims to be later is told of. It changes nothing, and confirms nothing.
4. Signed does not mean newest. `check_succession` holds that no reader goes back, and no revoked key comes back.

5. A broker that starts without Vault trusts the keyring that it kept when it ran last, and until its ACTIVE key was to
   be replaced (`may_vouch`): by then there is a later one, and keys of this one may have been revoked since. A broker
   that has kept none trusts nothing, and does not start.

The keys are those of tokens. Neither signature can be taken for the other: what a token signs (RFC 7515 section 5.1) is
letters, digits, ``-``, ``_`` and dots, and `_PREFIX`, with which every mirror begins, has spaces and a zero byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn

from carnet.errors import CarnetError, InvalidTokenError
from carnet.verify import verify_signature
from carnet_broker.core.keyring import Keyring, KeyState

__all__ = ["MirrorCopy", "MirrorNotBelievedError", "MirrorSignature", "may_vouch", "mirror_signing_input"]

_PREFIX: Final = b"carnet keyring mirror v1\x00"
_LENGTH_BYTES: Final = 8
_SIGNS: Final = frozenset({KeyState.ACTIVE, KeyState.STANDBY})


class MirrorNotBelievedError(CarnetError):
    """The copy of the keyring in the shared store is not signed by a key that this broker trusts for it."""

    code = "MIRROR_NOT_BELIEVED"


@dataclass(frozen=True, slots=True)
class MirrorSignature:
    """Who signed a mirror, and the ES256 signature, 64 bytes."""

    kid: str
    signature: bytes


def mirror_signing_input(content: Mapping[str, Any], *, issuer: str, generation: int) -> bytes:
    """Return what is signed of a mirror: each part with its length before it, so that no two mirrors share it.

    `content` is the whole document, as JSON with sorted members: what is checked is what is then used.
    """
    parts = issuer.encode(), str(generation).encode(), json.dumps(content, sort_keys=True).encode()
    return _PREFIX + b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts)


def may_vouch(kept: Keyring, now: datetime) -> bool:
    """Say whether a keyring that was kept may vouch for a mirror at `now`."""
    active = kept.active
    return active is not None and active.sign_until is not None and now < active.sign_until


@dataclass(frozen=True, slots=True)
class MirrorCopy:
    """A mirror as it was found. Nothing of it is believed yet."""

    keyring: Keyring
    """What `content` says."""
    generation: int
    """Under which number the store has it."""
    content: Mapping[str, Any]
    signature: MirrorSignature | None

    def is_later_than(self, anchor: Keyring | None) -> bool:
        """Say whether it claims to be later than `anchor`; it always does where nothing is trusted yet (None)."""
        return anchor is None or max(self.generation, self.keyring.generation) > anchor.generation

    def check(self, anchor: Keyring | None) -> None:
        """Raise `MirrorNotBelievedError` unless it is signed by a key that may do so in the eyes of `anchor`.

        `anchor` is a keyring that the reader trusts, None where it has none: then nothing is believed.
        """
        if self.generation != self.keyring.generation:
            self._refuse(f"it is entered as generation {self.generation}")
        if self.signature is None:
            self._refuse("it is not signed: a broker of an older version may have written it")
        if anchor is None:
            self._refuse("no keyring is trusted here yet that could vouch for it")
        kid = self.signature.kid
        key = anchor.get(kid)
        if key is None or key.state not in _SIGNS:
            state = "not known" if key is None else key.state
            self._refuse(f"it is signed by key {kid:.80}, which is {state} in generation {anchor.generation}")
        signing_input = mirror_signing_input(self.content, issuer=anchor.issuer, generation=self.generation)
        try:
            verify_signature(key.jwk, signing_input, self.signature.signature)
        except InvalidTokenError:
            self._refuse(f"its signature is not one of key {kid}: a broker of an older version may have written it")

    def _refuse(self, why: str) -> NoReturn:
        msg = f"the keyring in the shared store, generation {self.keyring.generation}, is not believed: {why}"
        raise MirrorNotBelievedError(msg)
