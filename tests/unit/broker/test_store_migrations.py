"""The migrations of the shared store: what they make is what the software uses, and they ship with it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from carnet_broker.edges.store import migrate, open_store
from carnet_broker.edges.store.tables import metadata
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


def test_wheel_holds_the_migrations(tmp_path: Path):
    """A broker that was installed from the wheel makes its tables."""
    command = [
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
    built = subprocess.run(command, capture_output=True, text=True, check=False)
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
