"""The first look at the keyring: which troubles stop a broker that starts, and with which it serves all the same."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from carnet.errors import CarnetError, ConfigError
from carnet_broker.config import BrokerConfig, load_config
from carnet_broker.core.keyring import KeyringRegressionError
from carnet_broker.core.keyring_document import InvalidKeyringError
from carnet_broker.edges.vault import VaultForbiddenError, VaultLoginError, VaultNotTrustedError
from carnet_broker.first_keyring import first_round
from carnet_broker.ports import KeyStoreUnavailableError
from carnet_broker.telemetry import Telemetry

CONFIG = """\
issuer: https://tokens.prod.example
policy_file: policy.yaml
tls: { certificate_file: broker.pem, key_file: broker-key.pem, client_ca_file: ca.pem }
vault:
  address: https://vault.example:8200
  role_id_file: role-id
  secret_id_file: secret-id
  environment: prod
  start_within: 1s
store: { url: "sqlite:////var/lib/carnet/store.db" }
audit: { directory: audit }
"""


class Rounds:
    """Stands for the loop and for the clock: each round takes half a second, and ends as it is told."""

    def __init__(self, *ends: CarnetError | None) -> None:
        self.ends = list(ends)
        self.seconds = 0.0
        self.done = 0

    def round(self) -> float:
        """Do a round; the last end goes on."""
        self.seconds += 0.5
        end = self.ends[min(self.done, len(self.ends) - 1)]
        self.done += 1
        if end is not None:
            raise end
        return 1.0

    def now(self) -> datetime:
        """Return the wall time."""
        return datetime(2026, 11, 24, tzinfo=UTC)

    def mono(self) -> float:
        """Return monotonic seconds."""
        return self.seconds


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> BrokerConfig:
    file = tmp_path / "broker.yaml"
    file.write_text(CONFIG)
    return load_config(file)


async def look(config: BrokerConfig, rounds: Rounds, *, loaded: bool) -> float:
    """Look for the first time; return what the broker then says of Vault: 1.0 that it answers."""
    telemetry = Telemetry()
    await first_round(rounds, config, rounds, telemetry, is_loaded=lambda: loaded)
    return telemetry.registry.get_sample_value("carnet_vault_reachable")


@pytest.mark.parametrize("loaded", [False, True])
async def test_a_vault_that_answers_in_time_is_waited_for(config, loaded):
    """The second round goes well."""
    rounds = Rounds(KeyStoreUnavailableError("away"), None)
    assert (1.0, 2) == (await look(config, rounds, loaded=loaded), rounds.done)


async def test_with_a_keyring_from_the_store_a_broker_goes_on_without_vault_when_it_had_its_time(config):
    """Not before: Vault may be starting too."""
    rounds = Rounds(KeyStoreUnavailableError("away"))
    assert (0.0, 3) == (await look(config, rounds, loaded=True), rounds.done)


async def test_without_any_keyring_a_vault_that_is_away_stops_the_start(config):
    """There is nothing to serve."""
    with pytest.raises(ConfigError, match=r"^vault\.address: away"):
        await look(config, Rounds(KeyStoreUnavailableError("away")), loaded=False)


async def test_k07_with_a_keyring_from_the_store_a_broker_goes_on_with_a_restored_vault_at_once(config):
    """Waiting does not make it any newer."""
    rounds = Rounds(KeyringRegressionError("restored"))
    assert (0.0, 1) == (await look(config, rounds, loaded=True), rounds.done)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("error", "names"),
    [
        (VaultLoginError("no"), "vault.role_id_file"),
        (VaultNotTrustedError("no"), "vault.ca_file (not set"),
        (VaultForbiddenError("no"), "vault.environment prod"),
        (InvalidKeyringError("no"), "no"),
    ],
    ids=["login", "not trusted", "forbidden", "no keyring"],
)
async def test_a_vault_that_refuses_this_broker_stops_the_start(config, error, names, loaded):
    """It goes on refusing, so somebody has to put the named setting right."""
    with pytest.raises(ConfigError) as raised:
        await look(config, Rounds(error), loaded=loaded)
    assert str(raised.value).startswith(names)


async def test_k07_a_document_that_went_back_stops_the_start_where_there_is_no_keyring_to_serve(config):
    """The message says what was found."""
    with pytest.raises(ConfigError, match=r"^restored$"):
        await look(config, Rounds(KeyringRegressionError("restored")), loaded=False)
