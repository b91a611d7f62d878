"""What a schedule tells the outside (`notify:`): its own decisions, and what its runs could not deliver.

A run delivers its messages itself. Those that it could not deliver, because its job was lost or the receiver was
away, are tried again by every tick:

    notify/             messages on domains (pipelines/notify/outbox.py)
    undelivered/<run>.json   runs that still hold messages
"""

from __future__ import annotations

from pipelines.config.pipeline import PipelineConfig
from pipelines.notify.outbox import post, waiting
from pipelines.notify.sender import Sender
from pipelines.runs.directory import RunDirectory

STATES = {"failed": "failure", "refused": "refusal"}  # of a decision → the event that it is


def tell_decision(folder: RunDirectory, config: PipelineConfig, domain: str, key: list, state: str, **facts) -> None:
    """Post a message on a decision about a domain.

    Args:
        key: tells this decision from an earlier one on the same domain.
    """
    if state in STATES:
        text = f"{config.name}: domain {domain} {state}: {'; '.join(facts['reasons'])}"
        post(
            folder,
            config.notify,
            STATES[state],
            [domain, state, *key],
            text,
            schedule=config.name,
            domain=domain,
            **facts,
        )


def take_over(folder: RunDirectory, config: PipelineConfig, run_uri: str) -> None:
    """Remember that a run which no job works on may hold undelivered messages."""
    run = RunDirectory(run_uri)
    if config.notify and waiting(run):
        folder.write_json(f"undelivered/{run.name}.json", {"run_uri": run_uri})


def deliver(folder: RunDirectory, config: PipelineConfig) -> list[str]:
    """Deliver what waits; why the rest was not delivered."""
    if config.notify is None:
        return []
    problems = Sender(folder, config.notify).finish() if waiting(folder) else []
    for name in folder.list("undelivered"):
        run = RunDirectory(folder.read_json(f"undelivered/{name}")["run_uri"])
        problems += Sender(run, config.notify).finish()
        if not waiting(run):
            folder.remove(f"undelivered/{name}")
    return problems
