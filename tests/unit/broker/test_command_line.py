from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from carnet.testing.ca import CertificateAuthority
from carnet_broker.cli import run
from support.broker_stub import BrokerStub

COMMANDS = {
    "serve": "serve:serve",
    "check-config": "serve:check_config",
    "keys": "keys:keys",
    "policy": "policy:policy",
    "demo": "demo:demo",
}
# What the extra `broker` brings and the SDK alone does not.
EXTRA = (
    "grpc_health",
    "hvac",
    "prometheus_client",
    "pydantic",
    "requests",
    "starlette",
    "structlog",
    "uvicorn",
    "yaml",
)


def run_without_the_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``carnet-broker`` in a process that finds none of the packages of the extra."""
    text = (
        f"import sys; sys.modules |= dict.fromkeys({EXTRA})\n"
        f"from carnet_broker.cli import run; sys.exit(run({list(arguments)}))"
    )
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--config", "broker.yaml"],
        ["check-config", "broker.yaml"],
        ["keys", "status"],
        ["policy", "check", "x"],
        ["demo"],
    ],
)
def test_a_command_without_its_packages_is_one_line_that_says_what_to_install(arguments: list[str]) -> None:
    """The SDK alone brings the command too; it says what is missing, without a traceback."""
    done = run_without_the_extra(*arguments)
    expected = "error: this command needs the broker's packages: pip install 'carnet[broker]'\n"
    assert (2, expected) == (done.returncode, done.stderr)


def test_b10_serve_silences_the_log_of_grpc_before_it_is_imported() -> None:
    """gRPC reads GRPC_VERBOSITY at its import, so that the module of the command may not import it: its lines tell of
    each failed handshake, are no JSON and know no limit.
    """
    text = "import sys, carnet_broker.cli.serve; print([name for name in sys.modules if name.startswith('grpc')])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert "[]\n" == done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["revoke", "--jti", "token-0123456789012345"],
        ["keys", "revoke", "A" * 43],
    ],
    ids=["revoke", "keys revoke"],
)
def test_a_handshake_that_fails_is_one_line_of_an_admin_command(arguments: list[str], tmp_path: Path) -> None:
    """The server's certificate is from somebody else. What gRPC itself says of it is not for people."""
    ours, others = CertificateAuthority.create("prod.example"), CertificateAuthority.create("prod.example")
    issued = ours.issue("spiffe://prod.example/ns/ops/sa/admin")
    certificate, key = issued.write(tmp_path, "admin")
    (tmp_path / "ca.pem").write_bytes(ours.root_pem)
    with BrokerStub.start(others) as stub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRPC_", "CARNET_"))}
        environment |= {
            "CARNET_ADMIN": stub.target,
            "CARNET_BROKER_NAME": stub.server_name,
            "CARNET_CERT_FILE": str(certificate),
            "CARNET_KEY_FILE": str(key),
            "CARNET_CA_FILE": str(tmp_path / "ca.pem"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "carnet_broker", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
    (line,) = done.stderr.splitlines()
    assert (1, "error: ") == (done.returncode, line[:7])


def test_help_needs_no_package_of_the_extra() -> None:
    """The list of commands is there, whatever is installed."""
    done = run_without_the_extra("--help")
    assert (0, "") == (done.returncode, done.stderr)
    assert set(COMMANDS) < set(done.stdout.split())


def test_help_says_of_each_command_what_its_own_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The list is a table of its own: it must not say something else than the commands."""
    assert 0 == run(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, place in COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(f"carnet_broker.cli.{module}"), attribute)
        assert f" {name} {command.get_short_help_str(1000)}" in shown


def test_a_module_of_our_own_that_is_missing_is_a_fault_and_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged installation is not talked away: installing the extra would not help."""
    monkeypatch.setitem(sys.modules, "carnet_broker.cli.policy", None)
    with pytest.raises(ModuleNotFoundError, match=r"carnet_broker\.cli\.policy"):
        run(["policy", "check", "x"])
