"""The file in which a broker keeps the public keyring for its next start."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from carnet_broker.kept_keyring import KeyringFile
from support.keyrings import ISSUER, T0, TIMING, jwk, running

NAME = "keyring.json"


@pytest.fixture(name="failures")
def _failures() -> list[OSError]:
    return []


@pytest.fixture(name="file")
def _file(tmp_path: Path, failures: list[OSError]) -> KeyringFile:
    return KeyringFile(tmp_path, issuer=ISSUER, store_name="kv", failed=failures.append)


def test_what_is_kept_last_is_what_is_found(file, failures, tmp_path):
    """In one file of its own user, replaced whole."""
    assert file.load() is None
    keyring = running()
    file.keep(keyring)
    assert keyring == file.load()
    later = keyring.with_revoked(jwk(0).kid, T0, TIMING)
    file.keep(later)
    again = KeyringFile(tmp_path, issuer=ISSUER, store_name="kv", failed=failures.append)
    assert (later, []) == (again.load(), failures)
    assert [tmp_path / NAME] == list(tmp_path.iterdir())
    assert 0o600 == stat.S_IMODE((tmp_path / NAME).stat().st_mode)


@pytest.mark.parametrize(("issuer", "store"), [("https://other.example", "kv"), (ISSUER, "transit")])
def test_a_keyring_of_another_environment_or_key_store_is_not_found(file, failures, tmp_path, issuer, store):
    """As where two brokers share the directory."""
    file.keep(running())
    assert KeyringFile(tmp_path, issuer=issuer, store_name=store, failed=failures.append).load() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\u00e9\x00", "[" * 100_000], ids=range(7))
def test_what_is_no_keyring_is_as_if_it_were_not_there(file, tmp_path, text):
    """Half a file, say. A start must not fail on it."""
    (tmp_path / NAME).write_text(text)
    assert file.load() is None


def test_bytes_that_are_no_text_are_as_if_they_were_not_there(file, tmp_path):
    """Nor on a broken disk."""
    (tmp_path / NAME).write_bytes(b"\xff\xfe\xfa")
    assert file.load() is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_not_relied_on(file, tmp_path, mode):
    """Whoever writes it chooses which keys are trusted."""
    file.keep(running())
    (tmp_path / NAME).chmod(mode)
    assert file.load() is None
    (tmp_path / NAME).chmod(0o644)
    assert running() == file.load()


def test_a_file_of_another_user_is_not_relied_on(file, tmp_path, monkeypatch):
    """In a directory with the sticky bit everybody may make one."""
    file.keep(running())
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / NAME).stat().st_uid + 1)
    assert file.load() is None


def test_a_link_and_a_pipe_are_not_followed_and_not_waited_for(file, tmp_path):
    """They may lead to what another user has written."""
    file.keep(running())
    (tmp_path / NAME).rename(tmp_path / "elsewhere")
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    assert file.load() is None
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME, 0o600)
    assert file.load() is None


def test_a_directory_that_cannot_be_written_is_told_of_and_stops_nothing(file, failures, tmp_path):
    """What was kept before stays, and no half file is left."""
    file.keep(running())
    before = (tmp_path / NAME).read_bytes()
    assert ISSUER == json.loads(before)["issuer"]
    (tmp_path / "gone").mkdir()
    gone = KeyringFile(tmp_path / "gone" / "deeper", issuer=ISSUER, store_name="kv", failed=failures.append)
    gone.keep(running())
    assert [FileNotFoundError] == [type(error) for error in failures]
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    file.keep(running())
    assert [FileNotFoundError, IsADirectoryError] == [type(error) for error in failures]
    assert {tmp_path / "gone", tmp_path / NAME} == set(tmp_path.iterdir())
