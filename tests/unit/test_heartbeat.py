"""Signs of life: progress.json follows what is said, and a worker that hangs ends itself."""

import json
import subprocess
import sys
import time

from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.workers.heartbeat import EXIT_CODE, Heartbeat


def read_until(run: RunDirectory, kind: str) -> Event:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        progress = run.progress()
        if progress and progress.kind == kind:
            return progress
        time.sleep(0.05)
    raise AssertionError(f"never said {kind}")


def test_progress_follows_what_is_said_with_rising_serials(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    heartbeat = Heartbeat(run, writes=True, hang_timeout=60)
    first = read_until(run, "loading")
    heartbeat.report("training", step=3)
    second = read_until(run, "training")
    heartbeat.close()
    assert second.step == 3
    assert second.serial > first.serial
    assert second.worker == first.worker


def test_only_one_rank_writes(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    heartbeat = Heartbeat(run, writes=False, hang_timeout=60)
    heartbeat.report("training")
    time.sleep(1.5)
    heartbeat.close()
    assert run.list("") == []


def test_a_worker_without_beats_ends_itself_and_says_where_it_hung(tmp_path):
    code = (
        "import sys, time\n"
        "from pipelines.workers.heartbeat import Heartbeat\n"
        "from pipelines.runs.directory import RunDirectory\n"
        "heartbeat = Heartbeat(RunDirectory(sys.argv[1]), False, 0.5)\n"
        "time.sleep(1.5)  # outside of guard: nothing happens\n"
        "def wait_for_a_lost_peer(): time.sleep(60)\n"
        "with heartbeat.guard():\n"
        "    for _ in range(10):\n"
        "        heartbeat.beat(); time.sleep(0.2)\n"
        "    wait_for_a_lost_peer()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, timeout=60)
    assert done.returncode == EXIT_CODE
    (_, event), *_ = RunDirectory(str(tmp_path / "run")).events()
    assert event.kind == "hang"
    assert "wait_for_a_lost_peer" in event.other["stacks"]
    assert json.dumps(event.to_json())
