"""A broker whose disk hangs for good can still be told to end (B14)."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import grpc
import pytest

from support.running_broker import start_broker
from support.vault import VaultPlace

# What hangs is the system call, as with a network file system whose server is gone; all else is the broker.
HANGS_WHEN_TOLD = """
import os, pathlib, runpy, sys, time
told, sync = pathlib.Path(sys.argv.pop(1)), os.fdatasync
def fdatasync(descriptor):
    while told.exists():
        time.sleep(0.05)
    sync(descriptor)
os.fdatasync = fdatasync
runpy.run_module("carnet_broker", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("hangs", [True, False])
def test_b14_a_broker_ends_in_time_though_its_disk_hangs(hangs, vault_place: VaultPlace, tmp_path: Path):
    """Within the time to drain and a little; the log says how many records are in doubt. The twin has none."""
    told = tmp_path / "told"
    command = ("-c", HANGS_WHEN_TOLD, str(told))
    settings = {"limits": {"drain": "2s"}}
    with start_broker(vault_place, tmp_path / "broker", settings=settings, command=command) as broker:
        broker.issue()
        if hangs:
            told.touch()
            with pytest.raises(grpc.RpcError):
                broker.issue(timeout=1)
        began = time.monotonic()
        broker.process.send_signal(signal.SIGTERM)
        code = broker.process.wait(20)
        seconds = time.monotonic() - began
        doubts = [entry["records_in_doubt"] for entry in broker.log() if entry["event"] == "audit_disk_hangs"]
    assert (0, [1] if hangs else []) == (code, doubts)
    assert seconds < 2 + 5
