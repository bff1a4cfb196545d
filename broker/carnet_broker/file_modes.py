"""Who else may use the broker's secret files and its audit directory, by their modes.

What is dangerous and has no good reason is refused: a private key that everybody may replace, an audit directory out of
which everybody may take records. The rest is told as a warning, because platforms do it: Kubernetes mounts secrets with
mode 0644, and `fsGroup` gives the group of a volume the right to write, again at each start of the pod.

Links are followed: a Kubernetes mount is made of them, and what counts is the file behind them.
"""

from __future__ import annotations

import stat
from pathlib import Path

from carnet.errors import ConfigError
from carnet_broker.config import BrokerConfig

__all__ = ["check_audit_directory", "check_key_file", "mode_warnings"]


def check_key_file(file: Path) -> None:
    """Refuse a private key that everybody may replace. Raises `ConfigError`."""
    mode = _mode(file)
    if mode is not None and mode & stat.S_IWOTH:
        msg = (
            f"{file}: every user of this host may write to it (mode {mode:04o}): take that right away (chmod o-w);"
            " tls.key_file in the configuration names it"
        )
        raise ConfigError(msg)


def check_audit_directory(directory: Path) -> None:
    """Refuse a directory out of which everybody may take records. Raises `ConfigError`. One that is missing is fine."""
    mode = _mode(directory)
    if mode is not None and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        msg = (
            f"{directory}: every user of this host may write to it (mode {mode:04o}), and remove records: take that"
            " right away (chmod o-w), or name a directory inside it, which the broker makes for itself alone;"
            " audit.directory in the configuration names it"
        )
        raise ConfigError(msg)


def mode_warnings(config: BrokerConfig) -> list[str]:
    """Return what others may do with these files that they need not be able to; each names its file and the remedy."""
    found = []
    for file in (config.tls.key_file, config.vault.secret_id_file):
        mode = _mode(file)
        if mode is not None and mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            may = "every user of this host may read it" if mode & stat.S_IROTH else "others may write to it"
            found.append(
                f"{file}: {may} (mode {mode:04o}), and it is secret: chmod 0600, or 0640 for a group of its own"
                " (in Kubernetes defaultMode: 0400)"
            )
    mode = _mode(config.audit.directory)
    if mode is not None and mode & stat.S_IWGRP and not mode & stat.S_ISVTX:
        found.append(
            f"{config.audit.directory}: its group may write to it (mode {mode:04o}), and remove records: chmod g-w,"
            " unless the group is that of the broker alone"
        )
    return found


def _mode(path: Path) -> int | None:
    """Return the mode of what `path` leads to, None where nobody can tell: reading or making it says why."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
