"""``carnet-broker policy``: what it prints, and the exit codes that a pipeline relies on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from carnet_broker.cli.policy import policy as policy_command
from support.policies import ORDERS, PAYMENTS, POLICY, changed, policy


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    return file


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(policy_command, [str(argument) for argument in arguments], env=env)


FAILING = changed("expect: deny", "expect: allow")
WRONG = changed("max_ttl: 10m", "max_ttl: 25h").replace("scopes: [charge] }", "scope: [charge] }")


def test_check_of_a_good_policy_says_what_is_in_it(file: Path) -> None:
    """Exit code 0, one line."""
    result = run("check", file)
    assert 0 == result.exit_code
    assert "" == result.stderr
    version = policy().version
    assert f"{file}: ok, version {version}: 3 audiences, 4 grants, 1 admin, 2 tests\n" == result.stdout


def test_check_of_a_good_policy_as_json(file: Path) -> None:
    """The same, for machines."""
    result = run("check", file, "--json")
    assert 0 == result.exit_code
    assert {
        "file": str(file),
        "ok": True,
        "version": policy().version,
        "audiences": 3,
        "grants": 4,
        "admins": 1,
        "tests": 2,
        "problems": [],
    } == json.loads(result.stdout)


def test_check_of_a_wrong_policy_names_every_problem(file: Path) -> None:
    """Exit code 2, one line each on standard error, nothing on standard output."""
    file.write_text(WRONG)
    result = run("check", file)
    assert (2, "") == (result.exit_code, result.stdout)
    assert [
        f"error: {file}:7: audiences.payments.max_ttl: 25h is out of bounds; give 1s to 1d",
        (
            f"error: {file}:15: grants[0].scope: unknown key; did you mean scopes? the keys here are workload,"
            " audience, scopes, max_ttl, may_act"
        ),
        f"error: {file}:15: grants[0].scopes: this is required and missing; add it",
    ] == result.stderr.splitlines()


def test_check_of_a_wrong_policy_as_json(file: Path) -> None:
    """The problems by line, path and text."""
    file.write_text(WRONG)
    result = run("check", file, "--json")
    assert 2 == result.exit_code
    told = json.loads(result.stdout)
    assert (False, 3) == (told["ok"], len(told["problems"]))
    assert {
        "line": 7,
        "path": "audiences.payments.max_ttl",
        "text": "25h is out of bounds; give 1s to 1d",
    } == told["problems"][0]


def test_check_of_a_policy_that_fails_its_own_tests_is_a_no(file: Path) -> None:
    """Exit code 1: the file can be read, and it does not do what it says."""
    file.write_text(FAILING)
    result = run("check", file)
    assert (1, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith(f"error: {file}:23: tests[1]: expected allow, and denied: ")


def test_test_shows_every_test_with_its_reason(file: Path) -> None:
    """Exit code 0 where all pass."""
    result = run("test", file)
    assert 0 == result.exit_code
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"ok   {file}:22: tests[0]: expected allow, and allowed: {file}:15: grants[0] gives ")
    assert lines[1].startswith(f"ok   {file}:23: tests[1]: expected deny, and denied: ")
    assert "2 passed, 0 failed" == lines[2]


def test_test_that_fails_is_a_no(file: Path) -> None:
    """Exit code 1, also as JSON, which has the whole explanation."""
    file.write_text(FAILING)
    result = run("test", file)
    assert 1 == result.exit_code
    assert result.stdout.splitlines()[1].startswith(f"FAIL {file}:23: tests[1]: expected allow, and denied: ")
    assert "1 passed, 1 failed" == result.stdout.splitlines()[2]
    told = run("test", file, "--json")
    assert 1 == told.exit_code
    parsed = json.loads(told.stdout)
    assert (1, [True, False]) == (parsed["failed"], [test["passed"] for test in parsed["tests"]])
    assert ("allow", ["refund"], "deny") == (
        parsed["tests"][1]["expect"],
        parsed["tests"][1]["scopes"],
        parsed["tests"][1]["result"]["decision"],
    )


def test_explain_of_a_yes(file: Path) -> None:
    """Exit code 0, and the line that decided."""
    result = run("explain", "--policy", file, "--workload", ORDERS, "--audience", "payments", "--scope", "charge")
    assert 0 == result.exit_code
    assert result.stdout.startswith(f"allowed: {file}:15: grants[0] gives {ORDERS} the scopes charge of payments")


def test_explain_of_a_no(file: Path) -> None:
    """Exit code 1, and what would have allowed it."""
    asked = ("explain", "--policy", file, "--workload", ORDERS, "--audience", "payments")
    result = run(*asked, "--scope", "charge", "--scope", "refund")
    assert 1 == result.exit_code
    assert [
        f"denied: {ORDERS} has a grant of payments, but not with refund",
        f"  {file}:15: grants[0] gives charge",
        f"  {file}:16: grants[1] gives report",
        f"  to allow refund, add it to the scopes of {file}:15: grants[0]",
    ] == result.stdout.splitlines()


def test_explain_as_json_names_the_policy(file: Path) -> None:
    """Decision, rules, and the version that a ledger record would name."""
    asked = ("explain", "--json", "--workload", PAYMENTS, "--audience", "bank")
    result = run(*asked, env={"CARNET_POLICY_FILE": str(file)})
    assert 0 == result.exit_code
    told = json.loads(result.stdout)
    assert ("allow", ["transfer"], [{"file": str(file), "line": 17, "grant": 2}]) == (
        told["decision"],
        told["scopes"],
        told["rules"],
    )
    assert {"file": str(file), "version": policy().version} == told["policy"]


def test_explain_works_on_a_policy_whose_tests_fail(file: Path) -> None:
    """That is when it is needed."""
    file.write_text(FAILING)
    assert 0 == run("explain", "--policy", file, "--workload", PAYMENTS, "--audience", "bank").exit_code


@pytest.mark.parametrize("command", ["check", "test", "explain"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ":1: the file is empty; write what it should hold, an empty file never means a default"),
        ("a: [", ":1: this is not YAML: "),
        (None, ": cannot be read (No such file or directory); give the path of a policy file that this user may read"),
        ("<folder>", ": cannot be read (Is a directory); give the path of a policy file that this user may read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, command: str, content: str | None, expected: str
) -> None:
    """The line names the file, what is wrong and what to do."""
    file = tmp_path / "policy.yaml"
    if content == "<folder>":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    asked = ("--workload", ORDERS, "--audience", "payments", "--policy", file) if command == "explain" else (file,)
    result = run(command, *asked)
    assert (2, "") == (result.exit_code, result.stdout)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {file}{expected}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "error: no policy is named: give --policy FILE or set CARNET_POLICY_FILE"),
        (
            ("--workload", "orders"),
            (
                "error: --workload: SPIFFE ID 'orders' does not start with spiffe://; give the whole name, for instance"
                " spiffe://prod.example/ns/shop/sa/orders"
            ),
        ),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(file: Path, arguments: tuple[str, ...], expected: str) -> None:
    """The line names the option, what is wrong and what to do."""
    policy_file = ("--policy", file) if arguments else ()
    result = run("explain", "--audience", "payments", "--workload", ORDERS, *arguments, *policy_file)
    assert (2, f"{expected}\n") == (result.exit_code, result.stderr)


@pytest.mark.parametrize("command", [(), ("check",), ("test",), ("explain",)])
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    """With its exit codes, so that a pipeline can be written from it."""
    result = run(*command, "--help")
    assert 0 == result.exit_code
    assert not command or "Exit code: 0" in result.stdout


def test_as_a_process_bad_input_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    """What a pipeline sees: the exit code of a real process, one line, no traceback."""
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.replace("prod.example/ns/shop/**", "staging.example/**"))
    program = Path(sys.executable).with_name("carnet-broker")
    ended = subprocess.run([program, "policy", "check", file], capture_output=True, text=True, check=False, timeout=60)
    assert (2, "") == (ended.returncode, ended.stdout)
    assert (
        f"error: {file}:18: grants[3].workload: staging.example is not the trust domain of this policy; name a workload"
        " of prod.example\n"
    ) == ended.stderr
