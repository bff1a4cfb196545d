"""``carnet-broker serve`` and ``check-config``."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import click

from carnet_broker.cli.output import NO, cli_errors, json_option, show
from carnet_broker.config import load_config

__all__ = ["check_config", "serve"]

_config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    required=True,
    envvar="CARNET_BROKER_CONFIG",
    show_envvar=True,
    help="The broker's YAML configuration.",
)


@click.command()
@_config_option
@cli_errors
def serve(config_file: Path) -> None:
    """Run the broker until SIGTERM or SIGINT. SIGHUP reloads the policy and the certificates.

    Exit code: 0 it was told to stop, 1 a part of it ended by itself (the log says which), 2 it cannot start (one line
    says why).
    """
    # gRPC's C++ part writes a line for each failed handshake, past all formats and limits of ours. It reads this at its
    # import, so nothing that this module imports above may import it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    import uvloop

    from carnet.log_lines import LineLimit
    from carnet_broker.app import Broker
    from carnet_broker.telemetry import configure_logging

    # Private keys are in this process's memory: a core file would put them on a disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The usual soft limit of 1,024 descriptors is what select(2) can take. We do not use it, and connections need more.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    config = load_config(config_file)
    lines = LineLimit(config.log.lines_per_second)
    configure_logging(level=config.log.level, json=config.log.format == "json", lines=lines)

    async def run() -> bool:
        return await Broker(config, lines=lines).serve()

    if not uvloop.run(run()):
        raise SystemExit(NO)


@click.command("check-config")
@_config_option
@json_option
@cli_errors
def check_config(config_file: Path, *, as_json: bool) -> None:
    """Check the configuration and every file that it names, without serving and without asking Vault.

    Warnings tell of files that more users may read or write than need to.

    Exit code: 0 all is well, also with warnings, 2 something is wrong (one line says what).
    """
    from datetime import UTC, datetime

    from carnet_broker.file_modes import mode_warnings
    from carnet_broker.loading import check_files

    config = load_config(config_file)
    check_files(config, datetime.now(UTC))
    warnings = mode_warnings(config)
    result = {
        "file": str(config_file),
        "ok": True,
        "issuer": config.issuer,
        "key_store": config.keys.store,
        "warnings": warnings,
    }
    lines = [f"{config_file}: ok, issuer {config.issuer}, keys in {config.keys.store}"]
    show(result, lines + [f"warning: {warning}" for warning in warnings], as_json=as_json)
