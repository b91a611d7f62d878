"""A Ray head on loopback with token authentication, as `cluster/README.md` describes one for a single machine."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Head:
    """`ray start --head` in a folder of its own; `stop` ends what lives in that folder, and nothing else."""

    folder: Path
    dashboard: int
    port: int

    @classmethod
    def start(cls, folder: Path) -> Head:
        head = cls(folder, free_port(), free_port())
        head.token.write_text(secrets.token_hex(32))
        head.token.chmod(0o600)
        head.ray(
            "start",
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={head.port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={head.dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--temp-dir={folder / 'ray'}",
            "--num-cpus=2",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        )
        return head

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """For everything that talks to the cluster, and for the cluster itself."""
        kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_API_SERVER_ADDRESS": self.address,
        }
        return kept | own | {"RAY_API_SERVER_ADDRESS": self.address, "PATH": path, "PYTHONPATH": str(REPOSITORY)}

    def ray(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("ray")), *arguments]
        settings = {"env": self.environment, "check": True, "timeout": 300, "capture_output": True, "text": True}
        return subprocess.run(command, **(settings | options))

    def curlora(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pipelines", *arguments]
        settings = {"env": self.environment, "cwd": self.folder, "timeout": 300, "capture_output": True, "text": True}
        return subprocess.run(command, **(settings | options))

    def processes(self, text: str) -> list[psutil.Process]:
        """Processes of the cluster whose command line has `text` in it."""
        return [process for process in _of_folder(self.folder) if text in " ".join(_command(process))]

    def stop(self) -> None:
        found = _of_folder(self.folder)
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=20)


def _of_folder(folder: Path) -> list[psutil.Process]:
    """Processes that were started with something of this folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("RAY_AUTH_TOKEN_PATH", "").startswith(str(folder)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
