"""``carnet-broker policy``: check a policy, run its tests, and explain what it decides. Nothing here needs a broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from carnet.errors import ConfigError, InvalidIdentityError
from carnet.spiffe import SpiffeID
from carnet_broker.cli.output import BAD_INPUT, NO, cli_errors, json_option, show
from carnet_broker.core.policy import (
    PolicyError,
    PolicyTestError,
    PolicyTestResult,
    compile_policy,
    explain,
    load_policy,
    run_tests,
)

__all__ = ["policy"]

_POLICY_VARIABLE = "CARNET_POLICY_FILE"


@click.group(no_args_is_help=False)
def policy() -> None:
    """Check a policy, run its tests, and explain what it decides.

    A policy is a YAML file that says which workloads may call which audiences with which scopes.
    """


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@cli_errors
def check(file: Path, *, as_json: bool) -> None:
    """Check that the broker would load the policy in FILE.

    Every problem is one line with file, line, what is wrong and what to do. The policy's own tests are run too.

    Exit code: 0 the broker would load it, 1 one of its own tests fails, 2 it is wrong or cannot be read.
    """
    text = _read(file)
    try:
        loaded = load_policy(text, str(file))
    except PolicyError as error:
        problems = [{"line": problem.line, "path": problem.path, "text": problem.text} for problem in error.problems]
        show({"file": str(file), "ok": False, "problems": problems}, (), as_json=as_json)
        for line in error.lines:
            click.echo(f"error: {line}", err=True)
        raise SystemExit(NO if isinstance(error, PolicyTestError) else BAD_INPUT) from None
    counts = {
        "audiences": len(loaded.audiences),
        "grants": len(loaded.grants),
        "admins": len(loaded.admins),
        "tests": len(loaded.tests),
    }
    summary = ", ".join(f"{number} {name if number != 1 else name[:-1]}" for name, number in counts.items())
    show(
        {"file": str(file), "ok": True, "version": loaded.version, **counts, "problems": []},
        (f"{file}: ok, version {loaded.version}: {summary}",),
        as_json=as_json,
    )


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@cli_errors
def test(file: Path, *, as_json: bool) -> None:
    """Run the tests that the policy in FILE carries.

    Exit code: 0 all pass, 1 one fails, 2 the policy is wrong or cannot be read.
    """
    results = run_tests(compile_policy(_read(file), str(file)))
    failed = sum(not result.passed for result in results)
    told = [_told(result) for result in results]
    lines = [
        f"{'ok  ' if result.passed else 'FAIL'} {file}:{result.test.line}: tests[{result.test.position}]: {result}"
        for result in results
    ]
    summary = f"{len(results) - failed} passed, {failed} failed"
    show({"file": str(file), "failed": failed, "tests": told}, [*lines, summary], as_json=as_json)
    if failed:
        raise SystemExit(NO)


@policy.command(name="explain")
@click.option("--workload", required=True, help="The SPIFFE ID of the workload that asks.")
@click.option("--audience", required=True, help="The audience that it asks for.")
@click.option("--scope", "scopes", multiple=True, help="A scope that it asks for; may be repeated. None asks for all.")
@click.option(
    "--policy",
    "file",
    type=click.Path(path_type=Path),
    envvar=_POLICY_VARIABLE,
    show_envvar=True,
    help="The policy to ask.",
)
@json_option
@cli_errors
def explain_(workload: str, audience: str, scopes: tuple[str, ...], file: Path | None, *, as_json: bool) -> None:
    """Say what the policy decides for a request, by which rule, and what would have allowed it.

    Exit code: 0 allowed, 1 denied, 2 the policy is wrong or cannot be read.
    """
    if file is None:
        msg = f"no policy is named: give --policy FILE or set {_POLICY_VARIABLE}"
        raise ConfigError(msg)
    try:
        spiffe_id = SpiffeID.parse(workload)
    except InvalidIdentityError as error:
        msg = f"--workload: {error}; give the whole name, for instance spiffe://prod.example/ns/shop/sa/orders"
        raise ConfigError(msg) from None
    asked = compile_policy(_read(file), str(file))
    explanation = explain(asked, spiffe_id, audience, scopes)
    lines = [f"{'allowed' if explanation.allowed else 'denied'}: {explanation.summary}"]
    lines += [f"  {hint}" for hint in explanation.hints]
    origin = {"file": str(file), "version": asked.version}
    show({**explanation.to_dict(), "policy": origin}, lines, as_json=as_json)
    if not explanation.allowed:
        raise SystemExit(NO)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        msg = f"{file}: cannot be read ({error.strerror}); give the path of a policy file that this user may read"
        raise ConfigError(msg) from None


def _told(result: PolicyTestResult) -> dict[str, Any]:
    test = result.test
    return {
        "line": test.line,
        "workload": str(test.workload),
        "audience": test.audience,
        "scopes": list(test.scopes),
        "expect": "allow" if test.allow else "deny",
        "passed": result.passed,
        "result": result.explain().to_dict(),
    }
