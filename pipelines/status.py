"""What a run directory says of its state, without looking at any cluster."""

from __future__ import annotations

import time

from pipelines.runs import LEASE_SECONDS, RunDirectory


def run_status(run: RunDirectory) -> dict:
    """`{"run", "status", "steps_done", "steps", "last", "last_event"}`; a `running` run without a heartbeat is
    `interrupted`."""
    results = run.results() or {"status": "new", "steps": []}
    state = results["status"]
    lease = run.read_json("lease.json")
    if state == "running" and (lease is None or time.time() - lease["heartbeat"] > LEASE_SECONDS):
        state = "interrupted"
    events = run.list("events")
    last = run.read_json(f"events/{events[-1]}") if events else None
    return {
        "run": run.name,
        "status": state,
        "steps_done": sum(bool(step["seconds"]) for step in results["steps"]),
        "steps": len(results["steps"]),
        "last": _say(last) if last else "nothing has happened yet",
        "last_event": last,
    }


def _say(event: dict) -> str:
    ago = max(0, time.time() - event["time"])
    what = {
        "training": "training {task}, step {step}/{steps}, loss {loss:.3f}",
        "published": "{task} published",
        "failed": "failed: {error}",
        "evaluating": "evaluating {name}",
        "step_started": "{task} started",
    }.get(event["kind"], event["kind"].replace("_", " "))
    return f"{what.format(**event)} ({ago:.0f} s ago)"
