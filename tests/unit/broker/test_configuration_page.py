"""docs/configuration.md says what is true: its example loads, and its tables are the keys and defaults of the code."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest

from carnet.durations import format_duration
from carnet_broker.config import (
    AuditConfig,
    BrokerConfig,
    KeysConfig,
    LimitsConfig,
    Listeners,
    LogConfig,
    StoreConfig,
    TlsFiles,
    TokensConfig,
    TrustConfig,
    VaultConfig,
    load_config,
)
from carnet_broker.core.marked_yaml import Section

PAGE = (Path(__file__).resolve().parents[3] / "docs/configuration.md").read_text()
SECTIONS: list[tuple[str, type[Section]]] = [
    ("Top level", BrokerConfig),
    ("`listen`", Listeners),
    ("`tls`", TlsFiles),
    ("`vault`", VaultConfig),
    ("`store`", StoreConfig),
    ("`keys`", KeysConfig),
    ("`trust`", TrustConfig),
    ("`tokens`", TokensConfig),
    ("`audit`", AuditConfig),
    ("`limits`", LimitsConfig),
    ("`log`", LogConfig),
]


def rows(heading: str) -> dict[str, str]:
    """The keys in the table under `heading`, with what the page gives as their defaults."""
    table = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))


def shown(value: object) -> str:
    """A default as it is written in a configuration."""
    return format_duration(value) if isinstance(value, timedelta) else str(value)


def test_the_example_is_loaded(tmp_path: Path) -> None:
    """The one complete file on the page is a configuration that the broker takes."""
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / "broker.yaml"
    file.write_text(example)
    assert tmp_path / "policy.yaml" == load_config(file).policy_file


@pytest.mark.parametrize(("heading", "section"), SECTIONS)
def test_every_key_is_on_the_page(heading: str, section: type[Section]) -> None:
    """A key that is added to the code, or taken from it, is missed here."""
    assert sorted(section.model_fields) == sorted(rows(heading))


@pytest.mark.parametrize(("heading", "section"), SECTIONS)
def test_required_keys_are_called_required(heading: str, section: type[Section]) -> None:
    """And no others."""
    required = {name for name, field in section.model_fields.items() if field.is_required()}
    assert required == {name for name, default in rows(heading).items() if default == "required"}


@pytest.mark.parametrize(("heading", "section"), SECTIONS)
def test_defaults_on_the_page_are_those_of_the_code(heading: str, section: type[Section]) -> None:
    """Each default that is a value. One that is nothing (None, an empty list), or a section, is told in words."""
    page = rows(heading)
    for name, field in section.model_fields.items():
        default = field.get_default()
        if not (field.is_required() or default in (None, ()) or isinstance(default, Section)):
            assert f"`{shown(default)}`" == page[name], name
