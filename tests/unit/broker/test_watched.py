"""Values that come from files: the newest good one is in force, whatever becomes of the files (T23, B12)."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from carnet.errors import CarnetError, ConfigError
from carnet_broker.watched import Watched


@dataclass
class Told:
    """What was told of reloads, in order."""

    events: list[str] = field(default_factory=list)

    def reloaded(self, what: str) -> None:
        """Keep it."""
        self.events.append(f"{what}: good")

    def reload_failed(self, what: str, error: CarnetError) -> None:
        """Keep it."""
        self.events.append(f"{what}: {error}")


@dataclass
class Pair:
    """Two files that belong together, as certificate and key do, and the value that is made of them."""

    directory: Path
    told: Told = field(default_factory=Told)
    loads: int = 0

    @property
    def files(self) -> list[Path]:
        """The two files."""
        return [self.directory / "left", self.directory / "right"]

    def write(self, left: str, right: str | None = None) -> None:
        """Write the left file, and the right one to match, or as told."""
        self.files[0].write_text(left)
        self.files[1].write_text(left if right is None else right)

    def load(self) -> str:
        """Read both; they must be equal and not empty."""
        self.loads += 1
        try:
            left, right = (file.read_text() for file in self.files)
        except OSError as error:
            msg = f"{error.filename}: {error.strerror}"
            raise ConfigError(msg) from error
        if not left or left != right:
            msg = f"{left!r} and {right!r} do not belong together"
            raise ConfigError(msg)
        return left

    def watched(self) -> Watched[str]:
        """Watch the pair."""
        return Watched("pair", self.files, self.load, self.told)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A pair that is good, and older than the kernel's clock for files is coarse (some milliseconds)."""
    pair = Pair(tmp_path)
    pair.write("old")
    time.sleep(0.02)
    return pair


def test_the_first_value_is_loaded_and_nothing_more_while_the_files_stay(pair):
    """A look costs no load."""
    watched = pair.watched()
    for _ in range(3):
        watched.refresh()
    assert ("old", True, 1, []) == (watched.value, watched.is_current, pair.loads, pair.told.events)


@pytest.mark.parametrize("left", ["", "wrong"])
def test_b12_at_the_start_a_bad_file_is_refused(pair, left):
    """There is no last good one to serve."""
    pair.write(left, "right")
    with pytest.raises(ConfigError):
        pair.watched()


def test_b12_a_file_that_is_not_there_at_the_start_is_refused(pair):
    """The same, by the error that names the file."""
    pair.files[1].unlink()
    with pytest.raises(ConfigError, match="right: No such file"):
        pair.watched()


def rename(pair: Pair) -> None:
    """Write beside, and rename over."""
    for file in pair.files:
        beside = file.with_suffix(".new")
        beside.write_text("new")
        beside.replace(file)


def in_place(pair: Pair) -> None:
    """Write into the files that are there: same inode, same size."""
    pair.write("new")


def in_place_with_the_old_time(pair: Pair) -> None:
    """Copy over with the time of modification kept (cp -p, rsync -t)."""
    kept = [file.stat().st_mtime_ns for file in pair.files]
    pair.write("new")
    for file, at in zip(pair.files, kept, strict=True):
        os.utime(file, ns=(at, at))


def remove_and_make(pair: Pair) -> None:
    """Remove, and make anew."""
    for file in pair.files:
        file.unlink()
    pair.write("new")


@pytest.mark.parametrize("renew", [rename, in_place, in_place_with_the_old_time, remove_and_make])
def test_t23_a_renewed_pair_is_taken_up_however_it_is_written(pair, renew):
    """At the next look, once, and told."""
    watched = pair.watched()
    renew(pair)
    watched.refresh()
    watched.refresh()
    assert ("new", True, ["pair: good"], 2) == (watched.value, watched.is_current, pair.told.events, pair.loads)


def test_t23_a_swapped_symbolic_link_is_followed(tmp_path):
    """As Kubernetes renews a mounted secret: the link to the directory moves, the paths stay."""
    for version in ("old", "new"):
        (tmp_path / version).mkdir()
        Pair(tmp_path / version).write(version)
    (tmp_path / "data").symlink_to("old")
    pair = Pair(tmp_path / "data")
    watched = pair.watched()
    (tmp_path / "data.new").symlink_to("new")
    (tmp_path / "data.new").replace(tmp_path / "data")
    watched.refresh()
    assert ("new", ["pair: good"]) == (watched.value, pair.told.events)


def test_t23_a_pair_that_is_half_replaced_is_not_taken_up_before_the_other_half_comes(pair):
    """The last good one stays in force and degraded is said, until the pair is whole."""
    watched = pair.watched()
    pair.files[0].write_text("new")
    watched.refresh()
    assert ("old", False) == (watched.value, watched.is_current)
    pair.files[1].write_text("new")
    watched.refresh()
    assert ("new", True) == (watched.value, watched.is_current)
    assert ["pair: 'new' and 'old' do not belong together", "pair: good"] == pair.told.events


@pytest.mark.parametrize("spoil", ["empty", "gone", "forbidden", "rubbish"])
def test_t23_a_spoiled_file_leaves_the_last_good_value(pair, spoil):
    """Emptied, removed, made unreadable or rubbish: the old value stays, and the good file is found when it returns."""
    watched = pair.watched()
    left = pair.files[0]
    match spoil:
        case "empty":
            left.write_text("")
        case "gone":
            left.rename(left.with_suffix(".away"))
        case "forbidden":
            left.rename(left.with_suffix(".away"))
            left.mkdir()  # Cannot be read as a file by anybody, root included.
        case "rubbish":
            left.write_bytes(b"\xff\xfe")
    for _ in range(3):
        watched.refresh()
        assert ("old", False) == (watched.value, watched.is_current)
    assert 1 == len(pair.told.events)
    if left.is_dir():
        left.rmdir()
    left.unlink(missing_ok=True)
    pair.write("old")
    watched.refresh()
    assert ("old", True, "pair: good") == (watched.value, watched.is_current, pair.told.events[-1])


def test_t23_a_permission_that_is_lost_is_seen_although_the_content_stays(pair):
    """The broker could not load the file at its next start, so it says so now."""
    watched = pair.watched()
    watched.refresh()
    pair.files[0].chmod(0o000)
    watched.refresh()
    # Root may read it all the same: what counts is that the change of its permissions made us look.
    assert 2 == pair.loads


def test_an_error_that_nobody_meant_leaves_the_last_good_value_too(pair):
    """A fault of the loader is reported with the files' names, and does not end the watching."""
    watched = pair.watched()
    pair.files[0].write_bytes(b"\xff\xfe")  # `Pair.load` does not expect this: UnicodeDecodeError.
    watched.refresh()
    (event,) = pair.told.events
    assert event.startswith(f"pair: {pair.files[0]}, {pair.files[1]}: cannot be loaded: UnicodeDecodeError(")
    assert ("old", False) == (watched.value, watched.is_current)
    pair.write("new")
    watched.refresh()
    assert ("new", True) == (watched.value, watched.is_current)


def test_each_distinct_failure_is_told_once(pair):
    """Not at each look; another cause is news; after a good one the same failure is news again."""
    watched = pair.watched()
    for right in ("a", "a", "b", "b", "old", "b"):
        pair.write("old", right)
        watched.refresh()
        watched.refresh()
    assert [
        "pair: 'old' and 'a' do not belong together",
        "pair: 'old' and 'b' do not belong together",
        "pair: good",
        "pair: 'old' and 'b' do not belong together",
    ] == pair.told.events


def test_a_failure_is_tried_again_at_each_look_although_no_file_changes(pair):
    """It may have been the machine's, not the file's."""
    watched = pair.watched()
    pair.write("new")
    whole = watched._load

    def broken() -> str:
        msg = "too many open files"
        raise ConfigError(msg)

    watched._load = broken
    watched.refresh()
    assert ("old", False) == (watched.value, watched.is_current)
    watched._load = whole
    watched.refresh()
    assert ("new", True) == (watched.value, watched.is_current)


def test_b12_a_change_while_the_files_are_being_loaded_is_not_lost(pair):
    """The state of the files is taken before the load, so the next look finds that they are newer."""
    watched = pair.watched()
    pair.write("newer")
    whole = watched._load

    def overtaken() -> str:
        value = whole()
        pair.write("newest")
        return value

    watched._load = overtaken
    watched.refresh()
    assert "newer" == watched.value
    watched._load = whole
    watched.refresh()
    assert ("newest", True) == (watched.value, watched.is_current)


def test_b12_the_first_load_misses_no_change_either(tmp_path):
    """The same at the start."""
    pair = Pair(tmp_path)
    pair.write("old")
    whole = pair.load

    def overtaken() -> str:
        value = whole()
        pair.write("newer")
        return value

    watched = Watched("pair", pair.files, overtaken, pair.told)
    assert "old" == watched.value
    watched._load = whole
    watched.refresh()
    assert "newer" == watched.value


def test_b13_of_two_refreshes_at_once_the_newer_files_win(pair):
    """A slow load of the older files, begun before, does not end up in force over the newer ones."""
    watched = pair.watched()
    whole, began, go_on = watched._load, threading.Event(), threading.Event()

    def slow() -> str:
        value = whole()
        if not began.is_set():
            began.set()
            assert go_on.wait(10)
        return value

    watched._load = slow
    pair.write("older")
    first = threading.Thread(target=watched.refresh)
    first.start()
    assert began.wait(10)
    pair.write("newest")
    second = threading.Thread(target=lambda: watched.refresh(force=True))
    second.start()
    second.join(0.2)  # It waits for the first. If it did not, it would be through by now.
    go_on.set()
    first.join(10)
    second.join(10)
    assert "newest" == watched.value


def test_force_loads_although_nothing_changed(pair):
    """SIGHUP means now."""
    watched = pair.watched()
    watched.refresh(force=True)
    assert (2, ["pair: good"]) == (pair.loads, pair.told.events)
