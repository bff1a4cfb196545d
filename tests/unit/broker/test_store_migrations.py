"""The migrations of the shared store: what they make is what the software uses, and they ship with it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import create_engine, text

from carnet_broker.core.keyring_document import keyring_of_content, keyring_to_content
from carnet_broker.core.mirror import MirrorCopy, MirrorNotBelievedError, MirrorSignature, mirror_signing_input
from carnet_broker.edges.store import migrate, open_store
from carnet_broker.edges.store.tables import metadata
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.ports import MirroredKeyring
from support.keyrings import ISSUER, jwk, running
from support.store_places import PostgresPlace, SqlitePlace

ROOT = Path(__file__).resolve().parents[3]
MIGRATIONS = ROOT / "broker/carnet_broker/edges/store/migrations"


def test_migrations_make_the_tables_that_the_software_uses(real_store_place: SqlitePlace | PostgresPlace):
    """No column, index or type differs, in either database."""
    store = real_store_place.open()
    with store._database.read() as transaction:
        context = MigrationContext.configure(
            transaction.connection,
            opts={
                "compare_type": True,
                "include_object": lambda _o, name, kind, _r, _c: (kind, name) != ("table", "moved"),
            },
        )
        assert [] == compare_metadata(context, metadata)
        assert f"{migrate.SCHEMA_VERSION:04}" == context.get_current_revision()


def test_version_of_the_tables_is_the_number_of_the_last_migration():
    """Whoever adds a migration raises `SCHEMA_VERSION`, and says what it is compatible with."""
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [f"{migrate.SCHEMA_VERSION:04}"]
    assert 1 <= migrate.COMPATIBLE_FROM <= migrate.SCHEMA_VERSION


def test_migrating_again_changes_nothing(tmp_path: Path):
    """A second start finds its tables, and keeps the epoch and what is there."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with closing(open_store(url)) as store:
        store.rollout.raise_to(7, "k7")
        position = store.revocations.read(None).position
    with closing(open_store(url)) as store:
        assert (7, position) == (store.rollout.state().generation, store.revocations.read(None).position)


def test_a_mirror_of_the_version_before_is_found_and_not_believed(tmp_path: Path):
    """Tables of version 1 with a mirror in them are brought up to date. What the version before writes into those of
    version 2, with its own statement, leaves a signature that is of another text.
    """
    file = tmp_path / "store.db"
    file.touch(0o600)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO schema_state VALUES (1, 1, 1)"))
        written = "INSERT INTO keyring_mirror (id, generation, content, saved_at) VALUES (1, 5, :content, 0)"
        connection.execute(text(written), {"content": json.dumps(keyring_to_content(running(), store="kv"))})
    engine.dispose()
    with closing(open_store(f"sqlite:///{file}")) as store:
        assert "it is not signed" in why_not_believed(store.mirror.load())
        content = keyring_to_content(running(), store="kv")
        key = ec.derive_private_key(1_000_003, ec.SECP256R1())
        signing_input = mirror_signing_input(content, issuer=ISSUER, generation=5)
        store.mirror.save(5, content, MirrorSignature(jwk(0).kid, KvSigner(jwk(0).kid, key).sign(signing_input)))
        signed = store.mirror.load()
        assert signed is not None
        MirrorCopy(running(), signed.generation, signed.content, signed.signature).check(running())
        later = json.dumps(keyring_to_content(replace(running(), generation=6), store="kv"))
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("UPDATE keyring_mirror SET generation = 6, content = ?, saved_at = 1", (later,))
        assert "its signature is not one of key" in why_not_believed(store.mirror.load())


def why_not_believed(found: MirroredKeyring | None) -> str:
    """Return why a mirror is not believed by somebody who trusts `running()`."""
    assert found is not None
    keyring = keyring_of_content(found.content, issuer=ISSUER, store="kv")
    with pytest.raises(MirrorNotBelievedError) as error:
        MirrorCopy(keyring, found.generation, found.content, found.signature).check(running())
    return str(error.value)


def test_wheel_holds_the_migrations(tmp_path: Path):
    """A broker that was installed from the wheel makes its tables."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        ROOT,
    ]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert 0 == built.returncode, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {f"carnet_broker/edges/store/migrations/{p.relative_to(MIGRATIONS)}" for p in MIGRATIONS.rglob("*.py")}
    assert set() == shipped - names
    # And they run from where they are unpacked to.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = f"from carnet_broker.edges.store import open_store; open_store('sqlite:///{tmp_path}/store.db').close()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "installed", env={"PYTHONPATH": "."}, check=True)
    assert (tmp_path / "store.db").exists()
