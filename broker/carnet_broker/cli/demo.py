"""``carnet-broker demo``: the main job, end to end, on a real Vault, with a transcript."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from carnet_broker.cli.output import NO, cli_errors, complain

if TYPE_CHECKING:
    from carnet_broker.demo.stage import Stage

__all__ = ["demo"]

_LOOK_EVERY: Final = 0.2


@dataclass
class _Signals:
    """What SIGINT and SIGTERM do: they break off what goes on, once; while all is up and held, they end the wait."""

    told: bool = False
    holding: bool = False

    def take(self, *_: object) -> None:
        first, self.told = not self.told, True
        if first and not self.holding:  # A second one must not break off the tidying up.
            raise KeyboardInterrupt


@click.command()
@click.option("--hold", is_flag=True, help="Keep everything running, print 'ready', and play no scenes.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Where to put everything; kept. Default: a new one, removed.",
)
@click.option(
    "--key-store", type=click.Choice(["kv", "transit"]), default="kv", show_default=True, help="Where the keys live."
)
@cli_errors
def demo(*, hold: bool, directory: Path | None, key_store: str) -> None:
    """Start OpenBao, a broker and two services on this machine, and show what works and what is refused.

    With --hold it writes DIR/env (shell assignments) and runs until SIGINT or SIGTERM. A process that is killed
    meanwhile is reported and stays away: what the others do without it can be tried. One demo at a time may use DIR.

    Exit code: 0 everything happened as it must, 1 something did not, 2 it could not be started.
    """
    from carnet_broker.demo.place import occupied
    from carnet_broker.demo.stage import Stage, StageError

    if hold and directory is None:
        msg = "--hold needs --dir DIR: the place for DIR/env"
        raise click.UsageError(msg)
    place = directory if directory is not None else Path(tempfile.mkdtemp(prefix="carnet-demo-"))
    signals = _Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signals.take)
    started = time.monotonic()
    click.echo("Setting the stage")
    try:
        with (
            occupied(place.absolute()),
            Stage.build(place.absolute(), key_store=key_store, tell=lambda text: click.echo(f"  - {text}")) as stage,
        ):
            if hold:
                _hold(stage, signals)
                return
            failed = _play(stage)
        click.echo(
            f"\n{'Something did not happen as it must.' if failed else 'All of it happened as it must'}"
            f" ({time.monotonic() - started:.0f} s)."
        )
        if failed:
            raise SystemExit(NO)
    except (StageError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    finally:
        if directory is None:
            shutil.rmtree(place, ignore_errors=True)


def _hold(stage: Stage, signals: _Signals) -> None:
    """Say that all is up, and return when told to. Tell once of each part that ends by itself."""
    stage.write_environment()
    signals.holding = True
    click.echo("ready")
    reported: set[str] = set()
    while not signals.told:
        for ended in stage.ended():
            if ended not in reported:
                complain(ended)
                reported.add(ended)
        time.sleep(_LOOK_EVERY)


def _play(stage: Stage) -> bool:
    """Play every scene, and say whether one failed."""
    from carnet_broker.demo.scene import SceneFailedError
    from carnet_broker.demo.scenes import SCENES

    failed = False
    for number, scene in enumerate(SCENES, 1):
        click.echo(f"\n{number}. {scene.title}")
        try:
            scene.play(stage, lambda text: click.echo(f"   {text}"))
        except SceneFailedError as error:
            failed = True
            click.echo(f"   FAILED: {error}")
        except Exception as error:  # noqa: BLE001 - a scene that breaks is a scene that failed; the others go on
            failed = True
            click.echo(f"   FAILED: {type(error).__name__}: {error}")
        else:
            click.echo("   as it must be")
    return failed
