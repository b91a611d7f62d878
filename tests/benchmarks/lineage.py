"""How lineage grows with the length of a chain: sending, asking and drawing 200 steps against 20.

    python tests/benchmarks/lineage.py [--server]      over a sqlite file, or over an MLflow server on loopback

Over a file everything happens in this process, and its processor time is measured, which other work on the machine
does not change; over a server, the time on the wall.
Run directories are synthesised (tests/unit/sample_run.py), each with a score matrix of its full size, so row k has k
scores: what is sent grows with the square of the steps, whatever the system does.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from sample_run import make_run  # noqa: E402

from pipelines.lineage.ancestry import as_text, from_mlflow, from_run  # noqa: E402
from pipelines.lineage.projection import Projection, project  # noqa: E402
from pipelines.lineage.registry import register  # noqa: E402
from pipelines.lineage.store import initialize, ui_command, ui_environment  # noqa: E402
from pipelines.reporting.ancestry_figure import write_ancestry  # noqa: E402
from pipelines.reporting.page import write_figures, write_report  # noqa: E402

SHORT, LONG = 20, 200


def measure(uri: str, folder: Path, steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each thing that a user waits for."""
    tasks = [f"t{k}" for k in range(steps)]
    run = make_run(folder, name=f"chain{steps}", tasks=tasks, finished=steps - 2)
    projection = Projection(run, uri, "benchmark")
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable):
        begun = clock()
        result = work()
        seconds[name] = clock() - begun
        print(f"{steps} steps, {name}: {seconds[name]:.2f} s", file=sys.stderr)
        return result

    timed("send the whole chain", projection.send)
    make_run(folder, name=f"chain{steps}", tasks=tasks, finished=steps - 1)
    timed("send one step more, by the driver", projection.send)
    run = make_run(folder, name=f"chain{steps}", tasks=tasks)
    ids = timed("send one step more, by another process", lambda: project(run, uri, "benchmark"))
    timed("send again, nothing new", lambda: project(run, uri, "benchmark"))
    ancestry = timed("ancestry from the run directory", lambda: from_run(run, run.results().steps[-1].directory))
    version, _ = timed("register", lambda: register(uri, "benchmark", ids[ancestry.links[-1].fingerprint], ancestry))
    assert timed("ancestry from MLflow", lambda: from_mlflow(uri, version.uri)) == ancestry
    timed("ancestry as text", lambda: as_text(ancestry))
    timed("ancestry as a figure", lambda: write_ancestry(ancestry, folder / "ancestry.png"))
    timed("figures of the report", lambda: write_figures(run))
    timed("the report", lambda: write_report(run))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="store_true", help="over HTTP instead of a sqlite file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = f"sqlite:///{folder}/mlflow.db"
        initialize(store)
        server, uri = None, store
        if arguments.server:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            server = subprocess.Popen(ui_command(store, port), env=ui_environment(), stderr=subprocess.DEVNULL)
            uri = f"http://127.0.0.1:{port}"
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.2)
        try:
            clock = time.perf_counter if arguments.server else time.process_time
            measure(uri, folder, 3, clock)  # slow imports belong to nobody
            short, long = (measure(uri, folder, steps, clock) for steps in (SHORT, LONG))
        finally:
            if server:
                server.terminate()
    print(f"| seconds | {SHORT} steps | {LONG} steps | ratio |\n|---|---|---|---|")
    for name, value in short.items():
        print(f"| {name} | {value:.2f} | {long[name]:.2f} | {long[name] / value:.1f} |")


if __name__ == "__main__":
    main()
