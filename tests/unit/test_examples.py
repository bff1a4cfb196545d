from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from carnet_broker.config import load_config
from carnet_broker.core.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/examples/compose"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = sorted(COMPOSE["services"])


def service(name: str) -> dict[str, Any]:
    """One service of the compose file, with its anchors resolved."""
    found: dict[str, Any] = COMPOSE["services"][name]
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_locked_down(name: str) -> None:
    """No service runs as root, writes to its image, has a capability, or can gain one."""
    expected = {
        "user": "65532:65532",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    assert expected == {key: service(name).get(key) for key in expected}
    assert "ports" not in service(name)


@pytest.mark.parametrize("name", SERVICES)
def test_services_wait_for_health_and_never_for_time(name: str) -> None:
    """A service starts when what it needs is healthy or has ended well; each such need can be met."""
    for needed, how in service(name).get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert "test" in service(needed)["healthcheck"], f"{needed} has no health check of its own"
        else:
            assert ("service_completed_successfully", "no") == (how["condition"], service(needed).get("restart"))
    assert "sleep" not in json.dumps(service(name))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_sees_its_own_identity_only(name: str) -> None:
    """The folder with all keys is mounted where certificates are made; everybody else gets one folder, read-only."""
    for mount in service(name).get("volumes", []):
        if mount["source"] == "identities" and name not in {"bootstrap", "openbao-certificate"}:
            folder = "ci" if name == "rotate" else name
            assert (True, {"subpath": folder}) == (mount.get("read_only"), mount.get("volume"))


def test_only_the_broker_and_the_set_up_reach_the_vault() -> None:
    """Workloads are neither on OpenBao's network nor on that of the store."""
    reach = {name for name in SERVICES if "vault" in service(name).get("networks", [])}
    assert {"openbao", "bootstrap", "broker", "broker-2", "rotate"} == reach
    assert {"store", "broker", "broker-2"} == {
        name for name in SERVICES if "store" in service(name).get("networks", [])
    }


def test_the_image_is_built_from_all_that_the_wheel_takes() -> None:
    """What `pyproject.toml` puts into the wheel is copied into the build stage before the wheel is made there."""
    build_stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1].partition("pip wheel")[0]
    copied = [line.split()[1:-1] for line in build_stage.splitlines() if line.startswith("COPY ")]
    sources = [source for sources in copied for source in sources]
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    missing = [
        path
        for path in [*wheel["packages"], *wheel["force-include"], "pyproject.toml", "README.md", "LICENSE"]
        if not any(path == source or path.startswith(f"{source}/") for source in sources)
    ]
    assert [] == missing


def test_mounted_files_exist() -> None:
    """Every file that the compose file mounts is in the project."""
    assert [] == [config["file"] for config in COMPOSE["configs"].values() if not (ROOT / config["file"]).is_file()]


def test_broker_configuration_of_the_example_is_valid() -> None:
    """The broker of the compose file accepts its configuration, and finds the issuer that the workloads expect."""
    config = load_config(EXAMPLES / "broker.yaml")
    assert service("orders")["environment"]["CARNET_ISSUER"] == config.issuer
    assert EXAMPLES / "policy.yaml" == config.policy_file


def test_policy_of_the_example_is_valid() -> None:
    """The policy of the compose file loads, and is for the same issuer as the broker's configuration."""
    path = EXAMPLES / "policy.yaml"
    policy = load_policy(path.read_text(), str(path))
    assert load_config(EXAMPLES / "broker.yaml").issuer == policy.issuer


def readme_blocks() -> list[str]:
    """The Python examples of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", readme_blocks())
def test_examples_of_the_readme_use_names_that_exist(block: str) -> None:
    """Each example is Python; what it imports is there, and takes the arguments that it is given."""
    tree = ast.parse(block)
    imported: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(imported.get(node.func.id)):
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)
    assert imported
