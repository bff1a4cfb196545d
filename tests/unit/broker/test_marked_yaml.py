"""Strict YAML: what is read, what is refused, and that every refusal names its line."""

from __future__ import annotations

import pathlib
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal

import pydantic
import pytest
from yaml.error import MarkedYAMLError

from carnet.errors import ConfigError
from carnet_broker.core.marked_yaml import (
    MAX_PROBLEMS,
    DocumentError,
    Duration,
    Problem,
    Section,
    between,
    format_path,
    read_yaml,
    validate,
)


def refusal(text: str | bytes, **options: Any) -> tuple[str, ...]:  # noqa: ANN401 - whatever read_yaml takes
    """The problems for which `text` is refused."""
    with pytest.raises(DocumentError) as refused:
        read_yaml(text, "f.yaml", **options)
    return refused.value.lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b", {"a": "b"}),
        ("{a: [1, -2, 0], b: {}}", {"a": [1, -2, 0], "b": {}}),
        ("- 1.5\n- -0.25\n", [1.5, -0.25]),
        ("a: true\nb: False\nc: TRUE", {"a": True, "b": False, "c": True}),
        ("a:\nb: ~\nc: null", {"a": None, "b": None, "c": None}),
        ("a: 'no'\n\"12\": '010'", {"a": "no", "12": "010"}),
        ("a: |\n  no\n", {"a": "no\n"}),
        ("a: orders\nb: nobody\nc: 10m\nd: 127.0.0.1:8443\ne: 10.0.0.0/8", None),
        ("a: spiffe://prod.example/ns/shop/*", {"a": "spiffe://prod.example/ns/shop/*"}),
        ("--- # one document\na: 1\n...\n", {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: \u00e9", {"a": "\u00e9"}),
        (b"a: \xc3\xa9", {"a": "\u00e9"}),
    ],
)
def test_plain_yaml_is_read_as_plain_data(text: str | bytes, expected: object) -> None:
    """Text is text, and what looks like a number, a truth or nothing is that only in its one plain spelling."""
    data = read_yaml(text, "f.yaml").data
    if expected is None:
        assert all(isinstance(value, str) for value in data.values())
    else:
        assert expected == data
        assert repr(expected) == repr(data)


@pytest.mark.parametrize(
    "word",
    [
        *(
            "no",
            "Yes",
            "ON",
            "off",
            "010",
            "0x1F",
            "0b1",
            "1_000",
            "+5",
            "1:30",
            "2026-01-01",
            ".5",
            "5.",
            "1e3",
            "0o17",
        ),
        *(".inf", "-.INF", ".nan", "=", "12345678901234567890"),
    ],
)
def test_a_word_that_readers_disagree_about_is_refused(word: str) -> None:
    """YAML 1.1 and 1.2 give it different types; quotes give it one."""
    assert (
        f"f.yaml:2: a[0]: '{word}' is not read the same everywhere; quote it (or write true, false, or plain digits)",
    ) == refusal(f"a:\n  - {word}\n")
    assert {"a": [word]} == read_yaml(f"a:\n  - '{word}'\n", "f.yaml").data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: the key 'a' stands twice (first on line 1); remove one"),
        ("x:\n  a: {b: 1, b: 2}", "f.yaml:2: x.a: the key 'b' stands twice (first on line 2); remove one"),
        ("a: &x 1", "f.yaml:1: a: anchors (&x) are not read; remove it"),
        ("a: &x {b: 1}", "f.yaml:1: a: anchors (&x) are not read; remove it"),
        ("a: *x", "f.yaml:1: a: aliases (*x) are not read; write the value out"),
        ("<<: {a: 1}", "f.yaml:1: merge keys (<<) are not read; write the keys out"),
        ("a: !!str 1", "f.yaml:1: a: tags ('tag:yaml.org,2002:str') are not read; remove it, and quote what is text"),
        ("a: ! 1", "f.yaml:1: a: tags ('!') are not read; remove it, and quote what is text"),
        (
            "a: !!python/object/apply:os.system ['true']",
            (
                "f.yaml:1: a: tags ('tag:yaml.org,2002:python/object/apply:os.system') are not read; remove it, and"
                " quote what is text"
            ),
        ),
        ("12: a", "f.yaml:1: a key must be text; quote it"),
        ("true: a", "f.yaml:1: a key must be text; quote it"),
        ("~: a", "f.yaml:1: a key must be text; quote it"),
        ("[a, b]: c", "f.yaml:1: a key must be text; quote it"),
        ("? {a: 1}\n: c", "f.yaml:1: a key must be text; quote it"),
        ("%YAML 1.1\n---\na: 1", "f.yaml:1: directives (%) are not read; remove them"),
        ("%TAG ! tag:x,1:\n---\na: 1", "f.yaml:1: directives (%) are not read; remove them"),
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document starts here; keep one to a file"),
    ],
)
def test_yaml_that_hides_what_it_says_is_refused(text: str, expected: str) -> None:
    """Duplicate keys, aliases, anchors, merge keys, tags, keys that are not text, directives, second documents."""
    assert (expected,) == refusal(text)


@pytest.mark.parametrize("text", ["", " \n", "# a comment\n", "---\n", "~", b""])
def test_an_empty_file_is_refused(text: str | bytes) -> None:
    """Nothing is never read as a default."""
    assert "the file is empty; write what it should hold" in refusal(text)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1,\nc: }", "f.yaml:3: this is not YAML: while parsing a flow node: did not find expected node"),
        ("a:\n\tb: 1", "f.yaml:2: this is not YAML: while scanning for the next token: found character that cannot"),
        ("a: 'x", "f.yaml:1: this is not YAML: while scanning a quoted scalar: found unexpected end of stream"),
        ('a: "\\ud800"', "f.yaml:1: this is not YAML: while parsing a quoted scalar: found invalid Unicode character"),
        ("a: 1\nb: \x07", "f.yaml:2: this is not YAML: control characters are not allowed; remove the character"),
        ("a: 1\nb: \x00", "f.yaml:2: this is not YAML: control characters are not allowed; remove the character"),
        ("a: 1\nb: \ud800", "f.yaml:2: this is not UTF-8; save the file as UTF-8"),
        (b"a: 1\nb: \xff", "f.yaml:2: this is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "f.yaml:1: this is not UTF-8; save the file as UTF-8"),
    ],
)
def test_broken_text_is_refused_with_its_line(text: str | bytes, expected: str) -> None:
    """Syntax, control characters and encodings: one problem that says where."""
    (line,) = refusal(text)
    assert line.startswith(expected)


def test_a_mark_that_is_missing_means_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML library may raise an error without a place; it is reported all the same."""

    class Unmarked:
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the class that it stands for has it

        def __init__(self, text: str) -> None: ...

        def get_event(self) -> object:
            raise MarkedYAMLError(problem="something")

    monkeypatch.setattr("yaml.CSafeLoader", Unmarked)
    assert ("f.yaml:1: this is not YAML: something; correct it here or just above",) == refusal("a: 1")


def test_a_file_over_its_cap_is_refused_and_one_at_its_cap_is_read() -> None:
    """The cap counts bytes, not characters, and holds before anything is parsed."""
    assert {"a": "\u00e9"} == read_yaml("a: \u00e9", "f.yaml", max_bytes=5).data
    assert ("f.yaml:1: the file is larger than 4 bytes; make it smaller",) == refusal("a: \u00e9", max_bytes=4)
    assert "larger than 1048576 bytes" in refusal("#" * (1024 * 1024 + 1))[0]


def test_depth_is_capped_before_it_costs_anything() -> None:
    """32 levels are read; a file that is nothing but opening brackets is refused at the 33rd."""
    assert isinstance(read_yaml("[" * 32 + "]" * 32, "f.yaml").data, list)
    assert refusal("[" * 33 + "]" * 33)[0].endswith("nested deeper than 32 levels; make it flatter")
    assert "exceeded maximum nesting depth" in refusal("[" * 500_000)[0]  # The scanner runs ahead and has its own.


def test_aliases_that_multiply_are_refused_without_being_expanded() -> None:
    """The "billion laughs" file: every alias is a problem, none is followed."""
    laughs = "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    assert len(refusal(laughs)) == MAX_PROBLEMS


def test_all_problems_are_collected_in_the_order_of_lines() -> None:
    """The message is the first and the count of the others; the rest is at hand."""
    with pytest.raises(DocumentError) as refused:
        read_yaml("a: no\nb: &x 1\na: 1", "f.yaml")
    error = refused.value
    assert isinstance(error, ConfigError)
    assert [1, 2, 3] == [problem.line for problem in error.problems]
    assert f"{error.lines[0]} (and 2 more)" == str(error)


def test_problems_of_one_file_are_capped() -> None:
    """A hundred are enough to see what is wrong."""
    assert len(refusal("\n".join(["a: no"] * 300))) == MAX_PROBLEMS


def test_every_entry_knows_its_line() -> None:
    """An entry of a mapping is where its key is; an item of a list is where it starts."""
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n      z: 3\n", "f.yaml")
    paths = [(), ("a",), ("a", "b"), ("a", "c"), ("a", "c", 0), ("a", "c", 1), ("a", "c", 1, "z")]
    assert [1, 1, 2, 3, 4, 5, 6] == [document.line_of(path) for path in paths]


def test_what_a_file_does_not_have_is_at_the_nearest_line_above() -> None:
    """A key that is missing is reported where its mapping is."""
    document = read_yaml("a:\n  b: 1\n", "f.yaml")
    assert (("a",), 1) == document.resolve(("a", "missing", "deeper"))
    assert (("a", "b"), 2) == document.resolve(("a", "b", 0))
    assert Problem(2, "a.b", "wrong") == document.problem(("a", "b"), "wrong")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((), ""),
        (("grants", 3, "scopes"), "grants[3].scopes"),
        ((0, "a"), "[0].a"),
        (("a b", "c\nd"), '"a b"."c\\nd"'),
        (("x" * 500,), '"' + "x" * 80 + '"'),
    ],
)
def test_paths_stay_on_one_line_and_short(path: tuple[str | int, ...], expected: str) -> None:
    """Keys come from the file, and may hold anything."""
    assert expected == format_path(path)


class Colour(StrEnum):
    """An enum as a config has it."""

    RED = "red"
    BLUE = "blue"


class Listener(Section):
    """A nested model with an alias."""

    port: int
    from_: list[str] = pydantic.Field(default=["x"], alias="from", min_length=1)


class Config(Section):
    """A model with one of everything."""

    name: str
    life: Annotated[Duration, between(timedelta(minutes=1), timedelta(hours=24))]
    colour: Colour = Colour.RED
    file: pathlib.Path | None = None
    named: dict[str, Listener] = pydantic.Field(default_factory=dict)
    main: Listener | None = None
    listeners: tuple[Listener, ...] = ()
    on_stale: Literal["refuse", "accept"] = "refuse"
    debug: bool = False
    ratio: float = 1.0
    even: int = 0

    @pydantic.field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            msg = "this is odd; add one"
            raise ValueError(msg)
        return value


def invalid(text: str) -> tuple[str, ...]:
    """The problems for which `text` is not a Config."""
    with pytest.raises(DocumentError) as refused:
        validate(Config, read_yaml(text, "f.yaml"))
    return refused.value.lines


def test_a_document_becomes_its_model() -> None:
    """Texts become enums, paths, durations and tuples; whole numbers may stand for numbers."""
    text = (
        "name: x\nlife: 90s\ncolour: blue\nfile: /etc/x\nmain: {port: 1, from: [a]}\nlisteners: [{port: 2}]\nratio: 2"
    )
    config = validate(Config, read_yaml(text, "f.yaml"))
    assert ("x", timedelta(seconds=90), Colour.BLUE) == (config.name, config.life, config.colour)
    assert (pathlib.Path("/etc/x"), 2.0) == (config.file, config.ratio)
    assert config.main == Listener.model_validate({"port": 1, "from": ["a"]})
    assert (2,) == tuple(listener.port for listener in config.listeners)


def test_what_was_read_cannot_be_changed() -> None:
    """A setting is what the file says, for as long as the process lives."""
    config = validate(Config, read_yaml("name: x\nlife: 90s", "f.yaml"))
    with pytest.raises(pydantic.ValidationError):
        config.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("main: {port: 1, form: [a]}", "main.form: unknown key; did you mean from? the keys here are port, from"),
        ("main: {Port: 1}", "main.Port: unknown key; did you mean port? the keys here are port, from"),
        ("named: {x: {prt: 1}}", "named.x.prt: unknown key; did you mean port? the keys here are port, from"),
        ("listeners: [{prt: 1}]", "listeners[0].prt: unknown key; did you mean port? the keys here are port, from"),
        (
            '"a\\nb": 1',
            (
                '"a\\nb": unknown key; the keys here are name, life, colour, file, named, main, listeners, on_stale,'
                " debug, ratio, even"
            ),
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(line: str, expected: str) -> None:
    """Inside mappings, lists and optional models, by the names that the file uses."""
    assert f"f.yaml:3: {expected}" in invalid(f"name: x\nlife: 90s\n{line}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("colour: green", "colour: this must be 'red' or 'blue'; correct it"),
        ("file: 5", "file: this must be text (in quotes where it looks like a number); correct it"),
        ("named: []", "named: this must be a mapping (key: value); correct it"),
        ("main: []", "main: this must be a mapping (key: value); correct it"),
        ("main: {}", "main.port: this is required and missing; add it"),
        ("main: {port: '1'}", "main.port: this must be a whole number; correct it"),
        ("main: {port: 1, from: a}", "main.from: this must be a list; correct it"),
        (
            "main: {port: 1, from: []}",
            "main.from: this must not be empty; name at least one, or leave the key out if it is optional",
        ),
        (
            "main: {port: 1, from: [5]}",
            "main.from[0]: this must be text (in quotes where it looks like a number); correct it",
        ),
        ("listeners: {}", "listeners: this must be a list; correct it"),
        ("on_stale: maybe", "on_stale: this must be 'refuse' or 'accept'; correct it"),
        ("debug: 'yes'", "debug: this must be true or false; correct it"),
        ("debug: 1", "debug: this must be true or false; correct it"),
        ("ratio: '1'", "ratio: this must be a number; correct it"),
        ("even: 3", "even: this is odd; add one"),
        ("even: 999999999999999999", "even: this is odd; add one"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_what_it_must_be(line: str, expected: str) -> None:
    """No type is taken for another, as a lenient reader would."""
    assert (f"f.yaml:3: {expected}",) == invalid(f"name: x\nlife: 90s\n{line}")


@pytest.mark.parametrize(
    ("life", "expected"),
    [
        ("5", "a duration is a whole number with a unit; write for instance 500ms, 90s, 10m, 24h or 7d"),
        ("59s", "59s is out of bounds; give 1m to 1d"),
        ("0s", "'0s' is no time at all; give a duration longer than zero"),
        ("25h", "25h is out of bounds; give 1m to 1d"),
    ],
)
def test_a_wrong_duration_is_refused_in_the_words_of_durations(life: str, expected: str) -> None:
    """Limits of a field are written as a duration too."""
    assert (f"f.yaml:2: life: {expected}",) == invalid(f"name: x\nlife: {life}")


def test_all_that_is_wrong_is_named_in_the_order_of_lines() -> None:
    """Also what a whole file lacks."""
    assert (
        "f.yaml:1: life: this is required and missing; add it",
        "f.yaml:1: name: this is required and missing; add it",
        "f.yaml:2: debug: this must be true or false; correct it",
    ) == invalid("even: 2\ndebug: maybe")


def test_a_list_is_not_a_model() -> None:
    """The top of the file has no path."""
    assert ("f.yaml:1: this must be a mapping (key: value); correct it",) == invalid("[a]")


def test_the_values_of_a_file_are_not_in_the_error() -> None:
    """A config may hold what nobody should read in a log."""
    with pytest.raises(DocumentError) as refused:
        validate(Config, read_yaml("name: [canary]\nlife: 90s\ndebug: canary", "f.yaml"))
    assert "canary" not in str(refused.value.lines)
    assert refused.value.__cause__ is None
