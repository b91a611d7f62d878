"""State of a run according to its run directory; no cluster is asked."""

from __future__ import annotations

import time

from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.lease import driver_of

SILENT_SECONDS = 60.0  # after which a driver that has not written its lease is considered gone


def run_status(run: RunDirectory) -> dict:
    """`{"run", "status", "steps_done", "steps", "last", "last_event"}`; a `running` run without a driver is
    `interrupted`."""
    results = run.results()
    state, steps = (results.status, results.steps) if results else ("new", ())
    driver = driver_of(run)
    if state == "running" and (driver is None or time.time() - driver["time"] > SILENT_SECONDS):
        state = "interrupted"
    last = _last_event(run)
    return {
        "run": run.name,
        "status": state,
        "steps_done": sum(step.is_done for step in steps),
        "steps": len(steps),
        "last": _say(last) if last else "nothing has happened yet",
        "last_event": last.to_json() if last else None,
    }


def cancel_run(run: RunDirectory, wait: float) -> bool | None:
    """Ask a run to stop. True if it ends within `wait` seconds, False if not, None if it had no driver."""
    if driver_of(run) is None:
        return None
    run.request_stop("curlora cancel")
    end = time.monotonic() + wait
    while time.monotonic() < end:
        if driver_of(run) is None:
            return True
        time.sleep(0.25)
    return False


def _last_event(run: RunDirectory) -> Event | None:
    """The later of the last event and the progress record."""
    names = run.list("events")[-1:]
    found = [run.read_event(f"events/{name}") for name in names] + [run.progress()]
    return max((event for event in found if event), key=lambda event: event.time, default=None)


def _say(event: Event) -> str:
    ago = max(0, time.time() - event.time)
    what = {
        "training": "training {task}, step {step}/{steps}, loss {loss:.3f}",
        "published": "{task} published",
        "failed": "failed: {error}",
        "stopped": "stopped: {reason}",
        "evaluating": "evaluating {name}" + (", {done} of {count}" if event.count else ""),
        "sampling": "answering sample prompts",
        "checkpoint": "{task}: checkpoint at step {step}",
        "step_started": "{task} started",
    }.get(event.kind, event.kind.replace("_", " "))
    return f"{what.format(**event.to_json())} ({ago:.0f} s ago)"
