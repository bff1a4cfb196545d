from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from carnet_broker.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "client/carnet/v1"
SOURCE_FOLDERS = ("client", "broker", "certs")
MAX_LINES = 450


def sources(*folders: str) -> Iterator[Path]:
    """The hand-written Python files in `folders`."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if GENERATED not in path.parents:
                yield path


def documents() -> Iterator[Path]:
    """The Markdown files of the project."""
    yield from ROOT.glob("*.md")
    for folder in ("docs", "requirements"):
        yield from (ROOT / folder).rglob("*.md")


def name(path: Path) -> str:
    """`path` as it is written in the project."""
    return str(path.relative_to(ROOT))


def pins(file: str) -> dict[str, str]:
    """The pinned versions in a file of requirements/."""
    text = (ROOT / "requirements" / file).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def project() -> dict[str, object]:
    """The content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root of the project."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", [p for p in sources("tests") if p.name.startswith("test_")], ids=name)
def test_every_test_states_its_behaviour_in_a_docstring(path: Path) -> None:
    """A test function without a docstring is refused: its name says what, the docstring says what must hold."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    mute = [
        f"{node.name}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions) and node.name.startswith("test_") and ast.get_docstring(node) is None
    ]
    assert [] == mute


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    """A missing part is a failure that says what to install; nothing passes by not running."""
    forbidden = re.compile(r"pytest\.(skip|importorskip|xfail)\b|mark\.(skip|skipif|xfail)\b")
    found = [
        f"{name(path)}:{number}"
        for path in sources("tests")
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert [] == found


def test_source_files_stay_short() -> None:
    """One subject for each file: none but tests and generated code is over the limit."""
    long = {name(p): lines for p in sources(*SOURCE_FOLDERS) if (lines := len(p.read_text().splitlines())) > MAX_LINES}
    assert {} == long


def test_no_module_is_named_after_nothing() -> None:
    """utils, helpers and managers collect what has no home."""
    forbidden = re.compile(r"(?:.*_)?(?:utils?|helpers?|managers?|common|misc)")
    assert [] == [name(p) for p in sources(*SOURCE_FOLDERS, "tests") if forbidden.fullmatch(p.stem)]


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    """`make proto` changes nothing: client/carnet/v1 is byte for byte what protos/ generates."""
    generated = run("protos/generate.sh", str(tmp_path))
    assert 0 == generated.returncode, f"{generated.stderr} (run 'make setup')"
    expected = {p.name: p.read_bytes() for p in (tmp_path / "carnet/v1").iterdir()}
    committed = {
        p.name: p.read_bytes() for p in GENERATED.iterdir() if p.suffix in {".py", ".pyi"} and p.stem != "__init__"
    }
    assert sorted(expected) == sorted(committed), "run 'make proto'"
    assert [] == [file for file in expected if expected[file] != committed[file]], "run 'make proto'"


def test_protos_are_lint_clean() -> None:
    """buf finds nothing to say about the protos."""
    linted = run(".venv/bin/buf", "lint", "protos")
    assert (0, "") == (linted.returncode, linted.stdout)


def test_image_installs_the_versions_that_were_tested() -> None:
    """Each pin of the image is a pin of the test environment."""
    tested = pins("dev.txt")
    installed = pins("broker.txt") | pins("build.txt")
    assert {} == {package: version for package, version in installed.items() if tested.get(package) != version}


@pytest.mark.parametrize("file", ["broker.txt", "build.txt", "dev.txt", "proto.txt"])
def test_pins_have_hashes_and_name_no_address(file: str) -> None:
    """Requirements come from whatever registry pip is set to, and only with the content that was pinned."""
    text = (ROOT / "requirements" / file).read_text()
    assert [] == re.findall(r"\w+://\S+|^-.*", text, re.MULTILINE)
    blocks = re.findall(r"^[a-z0-9-]+==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
    assert len(pins(file)) == len(blocks)


def test_coverage_gate_names_files_that_exist() -> None:
    """A renamed file cannot slip out of the 100 % gate unseen."""
    patterns = project()["tool"]["coverage"]["report"]["include"]
    assert [] == [pattern for pattern in patterns if not list(ROOT.glob(pattern))]


def test_every_module_of_the_sdk_has_its_place_in_the_contracts() -> None:
    """A module of `carnet` is either shared with the broker, or for the SDK and the demo only; import-linter knows."""
    contracts = {contract["id"]: contract for contract in project()["tool"]["importlinter"]["contracts"]}
    placed = (
        set(contracts["sdk-core-pure"]["source_modules"])
        | set(contracts["sdk-for-the-demo-only"]["protected_modules"])
        | set(contracts["wire-at-the-edge"]["protected_modules"])
        | set(contracts["identity-files"]["protected_modules"])
        | set(contracts["log-within-bounds"]["protected_modules"])
    )
    present = {
        f"carnet.{path.stem}"
        for path in (ROOT / "client/carnet").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists() or path == GENERATED
    }
    assert sorted(present) == sorted(placed)


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link in the documents names a file of the project."""
    broken = [
        f"{name(document)}: {target}"
        for document in documents()
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert [] == broken


@pytest.mark.parametrize("target", ["setup", "demo", "test", "bench", "lint", "proto", "prove", "interop"])
def test_make_help_lists_every_target(target: str) -> None:
    """`make` alone says what there is to run."""
    shown = run("make", "--no-print-directory")
    assert re.search(rf"^  make {target} +\S", shown.stdout, re.MULTILINE)


def test_every_metric_is_documented() -> None:
    """docs/operations.md says of each metric what it means."""
    document = (ROOT / "docs/operations.md").read_text()
    metrics = [metric.name + "_total" * (metric.type == "counter") for metric in Telemetry().registry.collect()]
    assert [] == [metric for metric in metrics if f"`{metric}" not in document]
