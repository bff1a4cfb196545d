"""The first look at the keyring, before anything is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from carnet.errors import CarnetError, ConfigError
from carnet_broker.config import BrokerConfig, VaultConfig
from carnet_broker.core.keyring import KeyringRegressionError
from carnet_broker.edges.vault import VaultForbiddenError, VaultLoginError, VaultNotTrustedError
from carnet_broker.kept_keyring import KeyringFile
from carnet_broker.keyring_loop import KeyringLoop
from carnet_broker.ports import Clock, KeyStoreUnavailableError
from carnet_broker.telemetry import Telemetry

__all__ = ["first_round", "keyring_file"]


def keyring_file(config: BrokerConfig, *, failed: Callable[[OSError], None]) -> KeyringFile:
    """Return the file in which the keyring is kept for the next start; `failed` is told of writes that fail."""
    return KeyringFile(config.audit.directory, issuer=config.issuer, store_name=config.keys.store, failed=failed)


async def first_round(
    loop: KeyringLoop, config: BrokerConfig, clock: Clock, telemetry: Telemetry, *, is_loaded: Callable[[], bool]
) -> None:
    """Load the keyring before anything is served. Raises `ConfigError` if Vault cannot be used.

    A Vault that does not answer may be starting too, so it is asked again for a while. After that a broker that has the
    keyring from the shared store (`is_loaded`), because the one that it kept vouches for that, serves verifiers without
    Vault, and issues nothing. So does, at once, one that meets a Vault which was restored from a backup: the store
    knows a later keyring. A Vault that refuses this broker goes on refusing it.
    """
    vault = config.vault
    deadline = clock.mono() + vault.start_within.total_seconds()
    while True:
        try:
            await asyncio.to_thread(loop.round)
        except (VaultLoginError, VaultNotTrustedError, VaultForbiddenError) as error:
            msg = f"{_to_blame(error, vault)}: {error}"
            raise ConfigError(msg) from error
        except KeyStoreUnavailableError as error:
            if clock.mono() > deadline and is_loaded():
                telemetry.vault_failed(error)
                return
            if clock.mono() > deadline:
                msg = f"vault.address: {error}"
                raise ConfigError(msg) from error
            await asyncio.sleep(0.25)
        except KeyringRegressionError as error:
            if not is_loaded():
                raise ConfigError(str(error)) from error
            telemetry.vault_failed(error)
            return
        except CarnetError as error:
            raise ConfigError(str(error)) from error
        else:
            telemetry.vault_answered()
            return


def _to_blame(error: VaultLoginError | VaultNotTrustedError | VaultForbiddenError, vault: VaultConfig) -> str:
    """Name the settings that Vault refuses, or is refused by."""
    if isinstance(error, VaultLoginError):
        return f"vault.role_id_file {vault.role_id_file} or vault.secret_id_file {vault.secret_id_file}"
    if isinstance(error, VaultNotTrustedError):
        return f"vault.ca_file {vault.ca_file or '(not set: the CAs of this system)'}"
    return f"vault.environment {vault.environment}"
