"""Where a SQLite store may be: what others could change is refused before anything is written there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from carnet.errors import ConfigError
from carnet_broker.edges.store import check_store_url, open_store

FILES = ["", "-wal", "-shm", "-journal"]


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Path:
    """Return the file of a store in a directory of the broker's own."""
    directory = tmp_path / "own"
    directory.mkdir(mode=0o700)
    return directory / "store.db"


def refused(place: Path) -> str:
    """Return what both the start and `check-config` say."""
    url = f"sqlite:///{place}"
    with pytest.raises(ConfigError) as at_start:
        open_store(url).close()
    with pytest.raises(ConfigError) as at_check:
        check_store_url(url)
    assert str(at_start.value) == str(at_check.value)
    return str(at_start.value)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777, 0o2775])
def test_a_directory_that_others_may_write_is_refused(place: Path, mode: int):
    """By group or by everybody, with or without the sticky bit. No file is made in it."""
    place.parent.chmod(mode)
    assert refused(place) == (
        f"store.url: others may write to the directory {place.parent} (mode {mode:04o}): give the store a directory of"
        " its own (mkdir -m 700), or chmod go-w"
    )
    assert [] == list(place.parent.iterdir())


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_a_file_that_others_may_write_is_refused_and_left_as_it_is(place: Path, suffix: str, mode: int):
    """Also those that SQLite keeps beside it. Whoever could write has had the time to."""
    file = place.with_name(place.name + suffix)
    file.touch()
    file.chmod(mode)
    assert refused(place) == (
        f"store.url: others may write to the file {file} (mode {mode:04o}): make sure that nobody else has written to"
        " it, then chmod 600"
    )
    assert mode == file.stat().st_mode & 0o777


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_directory_that_others_may_only_read_is_accepted(place: Path, mode: int):
    """The files in it are for the owner alone."""
    place.parent.chmod(mode)
    open_store(f"sqlite:///{place}").close()
    check_store_url(f"sqlite:///{place}")
    assert 0o600 == place.stat().st_mode & 0o777


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_belongs_to_somebody_else_is_refused(place: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    """They could change its mode at any time. The user of this process is another one here."""
    path, mine, other = place.parent, os.geteuid(), os.geteuid() + 1
    if what == "directory":
        monkeypatch.setattr(os, "geteuid", lambda: other)
    else:
        place.touch(mode=0o600)
        path = place
        answers = iter([mine, other, other] * 2)  # For the directory, then for the file and for what is said of it.
        monkeypatch.setattr(os, "geteuid", lambda: next(answers))
    assert refused(place) == (
        f"store.url: the {what} {path} belongs to user {mine}, and this broker is user {other}:"
        " chown it, or name another"
    )


def _link_to_directory(place: Path, tmp_path: Path) -> Path:
    place.parent.rename(tmp_path / "real")
    place.parent.symlink_to(tmp_path / "real")
    return place.parent


def _link_to_file(place: Path, tmp_path: Path) -> Path:
    (tmp_path / "real").touch(mode=0o600)
    place.symlink_to(tmp_path / "real")
    return place


def _dangling_link(place: Path, tmp_path: Path) -> Path:
    place.symlink_to(tmp_path / "real")
    return place


@pytest.mark.parametrize("make", [_link_to_directory, _link_to_file, _dangling_link])
def test_a_link_is_refused_and_not_followed(place: Path, tmp_path: Path, make: Callable[[Path, Path], Path]):
    """Whoever owns the directory that the link is in can turn it. Nothing is made where it leads to."""
    link = make(place, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    kind = "directory" if link == place.parent else "file"
    assert f"store.url: {link} is a link: name the {kind} that it leads to ({tmp_path / 'real'})" == refused(place)
    assert before == sorted(tmp_path.rglob("*"))


def test_what_is_no_file_or_no_directory_is_refused(place: Path):
    """One line, whatever it is."""
    place.mkdir(mode=0o700)
    assert f"store.url: {place} is no file: name another" == refused(place)
    place.rmdir()
    place.touch(mode=0o600)
    assert f"store.url: {place} is no directory: name another" == refused(place / "store.db")


@pytest.mark.parametrize("name", ["sslpassword", "oauth_client_secret"])
def test_any_password_in_the_url_is_refused_and_not_shown(name: str):
    """The one for the key of a client certificate as well; the message names the file for the user's."""
    url = f"postgresql://broker@db/carnet?{name}=hunter2&sslkey=/key"
    for call in (check_store_url, open_store):
        with pytest.raises(ConfigError) as caught:
            call(url)
        assert f"store.url holds a password ({name}): take it out" in str(caught.value)
        assert "store.password_file" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_url_that_is_good_is_checked_without_a_connection():
    """Nothing listens there, and nobody minds."""
    check_store_url("postgresql://broker@127.0.0.1:1/carnet?sslkey=/key")
