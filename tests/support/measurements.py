"""Figures of the long proofs: printed in every run, and kept in the folder that CARNET_MEASUREMENTS names."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.counts import form

__all__ = ["record"]


def record(name: str, figures: dict[str, Any]) -> None:
    """Print `figures`, and write ``NAME.json`` (commit, count, machine, figures) into the folder that is asked for."""
    print(f"\n{name}: {json.dumps(figures)}")
    folder = os.environ.get("CARNET_MEASUREMENTS")
    if not folder:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - git, wherever it is
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    content = {
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": form(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "figures": figures,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
