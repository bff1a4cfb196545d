"""Strict YAML that remembers its lines, so that every complaint can say where.

`read_yaml` turns text into plain data (dict with text keys, list, str, int, float, bool, None), and `validate` turns
that into a pydantic model. All that is wrong is collected into one `DocumentError`, in the order of the lines.

What it reads is the part of YAML that has one meaning:

- Aliases, anchors, merge keys, tags, directives and second documents are refused: a reader should not have to expand a
  file in the head to know what it grants.
- A key that occurs twice is refused. YAML libraries take the last one and say nothing.
- A plain word that YAML 1.1 and 1.2 read differently (``no``, ``on``, ``010``, ``1:30``, ``2026-01-01``) is refused; it
  can be quoted. Keys are text: ``12:`` or ``true:`` must be quoted too.
- Sizes and depth are capped.

The parser's events are read directly: no YAML object is ever constructed, and 10 MB take 3 seconds where a tree of
nodes takes 9.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import UnionType
from typing import Annotated, Any, Final, TypeAlias, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic_core import ErrorDetails
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

from carnet.durations import format_duration, parse_duration
from carnet.errors import ConfigError

__all__ = [
    "MAX_PROBLEMS",
    "DocumentError",
    "Duration",
    "MarkedDocument",
    "Path",
    "Problem",
    "Section",
    "between",
    "format_path",
    "read_yaml",
    "validate",
]

MAX_PROBLEMS: Final = 100
"""At most so many problems are collected from one file; more help nobody."""
_MAX_DEPTH: Final = 32
_MAX_BYTES: Final = 1024 * 1024
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
_TRUE: Final = frozenset({"true", "True", "TRUE"})
_FALSE: Final = frozenset({"false", "False", "FALSE"})
_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_INT: Final = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FLOAT: Final = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
_YAML_1_1: Final[dict[str, Any]] = yaml.CSafeLoader.yaml_implicit_resolvers
# The numbers that only YAML 1.2 knows (section 10.3.2): octal with an o, and exponents without a point or a sign.
_YAML_1_2: Final = re.compile(r"0o[0-7]+|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TYPES: Final = {
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping (key: value)",
    "string_type": "text (in quotes where it looks like a number)",
    "tuple_type": "a list",
}
"""What pydantic calls by the names of its own types, by the type of its error."""
_EMPTY: Final = "the file is empty; write what it should hold, an empty file never means a default"

Path: TypeAlias = tuple[str | int, ...]
"""Where something is in a document: keys and positions, from the top."""

# What a type annotation may hold: classes, generic aliases, and what stands beside the type in Annotated.
_Kind: TypeAlias = Any
# The stubs know each event by a class of its own; which one comes is what is being found out.
_Event: TypeAlias = Any
# The marks of a mapping or of a list, by key or position: the line of each entry and the marks below it.
_Marks: TypeAlias = "Mapping[str | int, tuple[int, _Marks | None]]"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong in a file. `line` counts from 1; `path` is empty for the file as a whole."""

    line: int
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.line}: {self.path}: {self.text}" if self.path else f"{self.line}: {self.text}"


class DocumentError(ConfigError):
    """A file cannot be used. The message is the first problem; `problems` holds all, in the order of lines."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.name = name
        self.problems = tuple(sorted(set(problems)))[:MAX_PROBLEMS]
        more = len(self.problems) - 1
        super().__init__(f"{name}:{self.problems[0]}" + (f" (and {more} more)" if more else ""))

    @property
    def lines(self) -> tuple[str, ...]:
        """Every problem as one line that names file and line."""
        return tuple(f"{self.name}:{problem}" for problem in self.problems)


@dataclass(frozen=True, slots=True)
class MarkedDocument:
    """The plain data of a YAML file, and the line on which each part of it stands."""

    name: str
    data: Any
    _marks: _Marks | None

    def line_of(self, path: Sequence[str | int]) -> int:
        """Return the line, from 1, of the entry at `path`; where the file has none, that of the nearest above it."""
        return self.resolve(path)[1]

    def resolve(self, path: Sequence[str | int]) -> tuple[Path, int]:
        """Return the longest beginning of `path` that the file has, and its line."""
        marks, line, known = self._marks, 1, 0
        for step in path:
            if marks is None or step not in marks:
                break
            line, marks = marks[step]
            known += 1
        return tuple(path[:known]), line

    def problem(self, path: Sequence[str | int], text: str) -> Problem:
        """Return the problem `text` of the entry at `path`."""
        return Problem(self.line_of(path), format_path(path), text)


def format_path(path: Sequence[str | int]) -> str:
    """Return `path` as people write it: ``grants[3].scopes``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            # A key from the file may hold line breaks and worse; as JSON it stays on one line.
            name = step if _PLAIN_KEY.fullmatch(step) else json.dumps(step[:80])
            text += f".{name}" if text else name
    return text


def read_yaml(text: str | bytes, name: str, *, max_bytes: int = _MAX_BYTES) -> MarkedDocument:
    """Return the document that `text` (UTF-8) is; `name` is the file's name in messages.

    Raises `DocumentError` where it is not YAML of the kind above, is empty, or is larger than `max_bytes` (default
    1 MiB).
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > max_bytes:
        raise DocumentError(name, [Problem(1, "", f"the file is larger than {max_bytes} bytes; make it smaller")])
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DocumentError(name, [Problem(line, "", "this is not UTF-8; save the file as UTF-8")]) from error
    reader = _Reader(decoded)
    data, marks = None, None
    try:
        data, marks = reader.document()
    except _StopReadingError:
        pass  # What was wrong is among the problems.
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        wrong = ": ".join(filter(None, (error.context, error.problem)))
        # What is missing at the end is marked one line behind it.
        line = min(mark.line + 1, len(decoded.splitlines())) if mark else 1
        reader.problems.append(Problem(line, "", f"this is not YAML: {wrong}; correct it here or just above"))
    except ReaderError as error:
        line = raw.count(b"\n", 0, error.position) + 1
        reader.problems.append(Problem(line, "", f"this is not YAML: {error.reason}; remove the character"))
    if reader.problems:
        raise DocumentError(name, reader.problems)
    return MarkedDocument(name, data, marks)


class Section(pydantic.BaseModel):
    """The base of every model of a file: an unknown key is an error, and what was read cannot be changed."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def _duration(value: object) -> timedelta:
    if not isinstance(value, str):
        msg = "a duration is a whole number with a unit; write for instance 500ms, 90s, 10m, 24h or 7d"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError only.
    return parse_duration(value)


Duration: TypeAlias = Annotated[timedelta, pydantic.BeforeValidator(_duration)]
"""A field that holds a duration (`carnet.durations`)."""


def between(shortest: timedelta, longest: timedelta) -> pydantic.AfterValidator:
    """Return limits, both included, to annotate a `Duration` with."""

    def check(value: timedelta) -> timedelta:
        if shortest <= value <= longest:
            return value
        msg = (
            f"{format_duration(value)} is out of bounds; give {format_duration(shortest)} to {format_duration(longest)}"
        )
        raise ValueError(msg)

    return pydantic.AfterValidator(check)


_Model = TypeVar("_Model", bound=pydantic.BaseModel)


def validate(model: type[_Model], document: MarkedDocument) -> _Model:
    """Return the data of `document` as a `model` (made of `Section`), or raise `DocumentError`.

    Types are strict, as in JSON: a number is not taken for a text, nor a text for a number. A validator of the model
    refuses with `ValueError`, in the words "what is wrong; what to do".
    """
    try:
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem(model, document, detail) for detail in details if not _follows(detail, details)]
        raise DocumentError(document.name, problems) from None  # Its text would repeat the values of the file.


def _follows(detail: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Say whether `detail` only counts what another one took away: pydantic calls a list of wrong items empty."""
    place = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in details
    )


def _problem(model: type[pydantic.BaseModel], document: MarkedDocument, detail: ErrorDetails) -> Problem:
    # What the file does not have is pydantic's own: the branch of a union, or the mark of a key.
    path, line = document.resolve(detail["loc"])
    match detail["type"]:
        case "missing":
            path = (*path, detail["loc"][-1])
            text = "this is required and missing; add it"
        case "extra_forbidden":
            text = _unknown_key(str(path[-1]), _known_keys(model, path[:-1]))
        case "value_error":
            text = str(detail["ctx"]["error"])
        case "too_short":
            text = "this must not be empty; name at least one, or leave the key out if it is optional"
        case kind if kind in _TYPES:
            text = f"this must be {_TYPES[kind]}; correct it"
        case _:
            text = f"{detail['msg'].replace('Input should', 'this must')}; correct it"
    return Problem(line, format_path(path), text)


def _unknown_key(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}the keys here are {', '.join(known)}"


def _known_keys(model: type[pydantic.BaseModel], path: Path) -> list[str]:
    """Return the keys that `model` has at `path`, in their own order."""
    kinds: list[_Kind] = [model]
    for step in path:
        kinds = [inner for kind in kinds for inner in _entries(kind, step)]
    return list(dict.fromkeys(name for kind in kinds for name in _fields(kind)))


def _fields(kind: _Kind) -> dict[str, Any]:
    """Return the types of a model's fields by the name that they have in the file."""
    if not (isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)):
        return {}
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


def _entries(kind: _Kind, step: str | int) -> Iterable[_Kind]:
    """Return the types that the entry `step` of something of type `kind` may have."""
    fields = _fields(kind)
    return _options([fields[step]] if step in fields else get_args(kind))


def _options(kinds: Iterable[_Kind]) -> Iterable[_Kind]:
    for kind in kinds:
        origin: object = get_origin(kind)
        if origin in (Annotated, Union, UnionType):
            yield from _options(get_args(kind))
        else:
            yield kind


class _StopReadingError(Exception):
    """Going on makes no sense."""


class _Reader:
    """Turns the parser's events into plain data and marks, and collects what is refused."""

    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self._next: Any = yaml.CSafeLoader(text).get_event
        self._path: list[str | int] = []

    def document(self) -> tuple[Any, _Marks | None]:
        self._next()  # The start of the stream says nothing.
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            self.problems.append(Problem(1, "", _EMPTY))
            return None, None
        if start.version or start.tags:
            self._complain(start, "directives (%) are not read; remove them")
        data, marks = self._node(self._next())
        if data is None:
            self._complain(start, _EMPTY)
        self._next()  # The end of the document.
        after = self._next()
        if not isinstance(after, yaml.StreamEndEvent):
            self._complain(after, "a second document starts here; keep one to a file")
        return data, marks

    def _complain(self, event: _Event, text: str) -> None:
        self.problems.append(Problem(event.start_mark.line + 1, format_path(self._path), text))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _StopReadingError

    def _node(self, event: _Event) -> tuple[Any, _Marks | None]:
        if isinstance(event, yaml.AliasEvent):
            self._complain(event, f"aliases (*{event.anchor!s:.80}) are not read; write the value out")
            return None, None
        if event.anchor is not None:
            self._complain(event, f"anchors (&{event.anchor!s:.80}) are not read; remove it")
        if event.tag is not None:
            self._complain(event, f"tags ({event.tag[:80]!r}) are not read; remove it, and quote what is text")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event), None
        if len(self._path) >= _MAX_DEPTH:
            self._complain(event, f"nested deeper than {_MAX_DEPTH} levels; make it flatter")
            raise _StopReadingError
        return self._mapping() if isinstance(event, yaml.MappingStartEvent) else self._list()

    def _list(self) -> tuple[list[Any], _Marks]:
        data: list[Any] = []
        marks: dict[str | int, tuple[int, _Marks | None]] = {}
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            position = len(data)
            self._path.append(position)
            item, inner = self._node(event)
            self._path.pop()
            data.append(item)
            marks[position] = (event.start_mark.line + 1, inner)
        return data, marks

    def _mapping(self) -> tuple[dict[str, Any], _Marks]:
        data: dict[str, Any] = {}
        marks: dict[str | int, tuple[int, _Marks | None]] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event)[0]
            if not isinstance(key, str):
                self._complain(event, "a key must be text; quote it")
                key = str(key)
            elif key in data:
                self._complain(event, f"the key {key[:80]!r} stands twice (first on line {marks[key][0]}); remove one")
            self._path.append(key)
            data[key], inner = self._node(self._next())
            self._path.pop()
            marks[key] = (event.start_mark.line + 1, inner)
        return data, marks

    def _scalar(self, event: _Event) -> str | int | float | bool | None:
        value: str = event.value
        # The table of YAML 1.1 is by first sign; what starts with another one is text for every reader.
        readings = _YAML_1_1.get(value[:1])
        if readings is None or not event.implicit[0]:
            return value
        if value in _TRUE or value in _FALSE:
            return value in _TRUE
        if value in _NULL:
            return None
        if _INT.fullmatch(value):
            return int(value)
        if _FLOAT.fullmatch(value):
            return float(value)
        if value == "<<":
            self._complain(event, "merge keys (<<) are not read; write the keys out")
        elif _YAML_1_2.fullmatch(value) or any(form.match(value) for _, form in readings):
            self._complain(
                event,
                f"{value[:80]!r} is not read the same everywhere; quote it (or write true, false, or plain digits)",
            )
        return value
