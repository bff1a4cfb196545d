"""docs/policy.md says what is true: every example on it is loaded, or refused with the message that it promises."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from carnet_broker.cli.policy import policy as policy_command
from carnet_broker.core.policy import PolicyError, load_policy
from carnet_broker.core.policy.document import (
    AdminSection,
    AudienceSection,
    ExampleSection,
    GrantSection,
    PolicyDocument,
)

PAGE = (Path(__file__).resolve().parents[3] / "docs/policy.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROMISE = "# refused: "


def test_the_page_has_examples_of_both_kinds() -> None:
    """So that the tests below have something to run on."""
    refused = [block for block in BLOCKS if block.startswith(PROMISE)]
    assert (2, 6) == (len(BLOCKS) - len(refused), len(refused))


@pytest.mark.parametrize("text", [block for block in BLOCKS if not block.startswith(PROMISE)])
def test_an_example_is_loaded(text: str) -> None:
    """And its version is what the page says it is."""
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == load_policy(text, "policy.yaml").version


@pytest.mark.parametrize("text", [block for block in BLOCKS if block.startswith(PROMISE)])
def test_a_refused_example_is_refused_as_promised(text: str) -> None:
    """With the one line that its first line promises."""
    with pytest.raises(PolicyError) as refused:
        load_policy(text, "policy.yaml")
    assert (text.splitlines()[0].removeprefix(PROMISE),) == refused.value.lines


def test_the_explanation_on_the_page_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on the page, run on the first policy of the page, prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(BLOCKS[0])
    command = re.findall(r"^carnet-broker policy (explain .*)$", PAGE, re.MULTILINE)[0]
    shown = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    result = CliRunner().invoke(policy_command, command.split())
    assert (1, shown) == (result.exit_code, result.stdout)


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("## Reference", PolicyDocument),
        ("### `audiences.NAME`", AudienceSection),
        ("### `grants[N]`", GrantSection),
        ("### `admins[N]`", AdminSection),
        ("### `tests[N]`", ExampleSection),
    ],
)
def test_the_reference_names_every_key(heading: str, section: type[PolicyDocument]) -> None:
    """A key that is added to the code is missed here."""
    table = PAGE.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(field.alias or name for name, field in section.model_fields.items()) == sorted(documented)
