"""What a user is told while a chain runs, and of a run that nobody drives any more."""

import io
import threading
import time

import pytest
from rich.console import Console

from pipelines.preflight.machine import examine
from pipelines.reporting.progress import ChainProgress
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.lease import acquire_lease
from pipelines.runs.results import StepSummary
from pipelines.runs.status import SILENT_SECONDS, cancel_run, run_status
from pipelines.runs.step_record import Seconds
from tests.unit.sample_records import cell, results


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(str(tmp_path / "chain"))
    steps = (StepSummary("mrpc", "1", "steps/1", seconds=Seconds(train=1.0)), StepSummary("sst2", "2", "steps/2"))
    run.write_json("results.json", results("running", steps=steps))
    run.event("step_started", task="mrpc")
    progress = {"kind": "training", "task": "mrpc", "step": 3, "steps": 10, "loss": 0.5, "time": time.time()}
    run.write_json("progress.json", progress)
    return run


def test_running_means_that_somebody_drives_it(run):
    with acquire_lease(run):
        found = run_status(run)
    assert (found["status"], found["steps_done"], found["steps"]) == ("running", 1, 2)
    assert found["last"].startswith("training mrpc, step 3/10, loss 0.500")
    assert run_status(run)["status"] == "interrupted"


def test_a_silent_driver_is_no_driver(run):
    holder = {"token": "t", "host": "h", "pid": 1, "started": 0, "beats": 3}
    run.write_json("lease.json", holder | {"time": time.time()})
    assert run_status(run)["status"] == "running"
    run.write_json("lease.json", holder | {"time": time.time() - 2 * SILENT_SECONDS})
    assert run_status(run)["status"] == "interrupted"


def test_cancelling_waits_for_the_end_of_the_driver(run):
    assert cancel_run(run, 0.1) is None
    lease = acquire_lease(run)
    assert cancel_run(run, 0.3) is False
    assert run.stop_requested() == "curlora cancel"
    threading.Timer(0.5, lease.release).start()
    assert cancel_run(run, 10) is True


def test_new_run_has_no_history(tmp_path):
    assert run_status(RunDirectory(str(tmp_path / "new")))["last"] == "nothing has happened yet"


def test_progress_without_a_terminal_is_plain_lines():
    out = io.StringIO()
    with ChainProgress(Console(file=out, width=200), 2, "chain") as progress:
        progress(Event("started", done=0))
        progress(Event("step_started", position=1, task="mrpc"))
        progress.last_line = 0.0
        fields = {"step": 5, "steps": 10, "loss": 0.7, "seconds_left": 2.0, "tokens_per_second": 1234.5}
        progress(Event("training", task="mrpc", **fields))
        progress(Event("published", position=1, task="mrpc", cells=(cell("mrpc", value=0.71),)))
        progress(Event("something new"))
    lines = out.getvalue().splitlines()
    assert "mrpc: step 5/10 · loss 0.700 · 1,234 tokens/s · 2 s left" in lines
    assert "task 1/2 mrpc done: mrpc 0.710" in lines
    assert "\x1b" not in out.getvalue()


def test_evaluation_says_how_much_is_scored_and_how_long_it_takes():
    out = io.StringIO()
    with ChainProgress(Console(file=out, width=200), 2, "chain") as progress:
        for done in (16, 16, 32):  # the second one only says that the worker is alive
            progress.last_line = 0.0
            progress(Event("evaluating", name="mrpc", done=done, count=1725, seconds_left=61.6))
        progress(Event("evaluating", name="mrpc", done=48, count=1725, seconds_left=60.0))  # too soon for a line
        progress.last_line = 0.0
        progress(Event("loading"))
    assert out.getvalue().splitlines()[1:] == [
        "evaluating mrpc: 16 of 1,725 · 62 s left",
        "evaluating mrpc: 32 of 1,725 · 62 s left",
        "loading the base model",
    ]


def test_a_terminal_shows_evaluation_as_a_bar():
    out = io.StringIO()
    with ChainProgress(Console(file=out, width=200, force_terminal=True), 2, "chain") as progress:
        progress(Event("evaluating", name="mrpc", done=16, count=64, seconds_left=3.0))
        bar = progress.bars.tasks[progress.task]
        assert (bar.completed, bar.total, bar.visible) == (16, 64, True)
        assert bar.fields["text"] == "16 of 64 · 3 s left"


def test_status_says_how_much_is_scored(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    run.write_json("progress.json", {"kind": "evaluating", "name": "mrpc", "time": time.time()})
    assert run_status(run)["last"].startswith("evaluating mrpc (")
    progress = {"kind": "evaluating", "name": "mrpc", "done": 16, "count": 64, "time": time.time()}
    run.write_json("progress.json", progress)
    assert run_status(run)["last"].startswith("evaluating mrpc, 16 of 64 (")


def test_doctor_finds_this_environment_fit():
    findings = {finding.subject: finding for finding in examine()}
    assert not [f for f in findings.values() if f.level == "error"]
    assert findings["CURLoRA in PEFT"].text == "registered"
