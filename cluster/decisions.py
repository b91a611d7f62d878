"""cluster.decisions."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem
from pipelines.runs.directory import RunDirectory

SETTLED = ("finished", "refused", "unchanged", "failed")

NAME_LENGTH = 64


@dataclass(frozen=True)
class Decision:
    """A decision as its file name says it."""

    file: str
    domain: str
    stamp: str
    kind: str

    @property
    def moment(self) -> float:
        return int(self.file.split(".")[0]) / 1e6


class Ledger:
    """The decisions of one schedule."""

    def __init__(self, folder: RunDirectory):
        self.folder = folder
        self.read()

    def read(self) -> None:
        self.all = [Decision(name, *name.split(".")[1:4]) for name in self.folder.list("decisions")]
        self._last: dict[tuple[str, str], list[Decision]] = {}
        for decision in self.all:
            entries = self._last.setdefault((decision.domain, decision.stamp), [])
            entries.append(decision)
            if decision.kind == "again":
                entries.clear()

    def of(self, domain: str, stamp: str) -> list[Decision]:
        """The decisions on a domain in the form that has this stamp, oldest first."""
        return self._last.get((domain, stamp), [])

    def open(self) -> list[Decision]:
        """`accepted` of every domain that is not settled yet."""
        return [found[0] for found in self._last.values() if found and found[-1].kind not in SETTLED]

    def record(self, domain: str, stamp: str, kind: str, **fields) -> None:
        # after all others, also if a clock was set back: the order of names is the order of decisions
        last = int(self.all[-1].file.split(".")[0]) if self.all else 0
        moment = max(int(time.time() * 1e6), last + 1)
        name = f"{moment:017d}.{domain}.{stamp}.{kind}.{uuid.uuid4().hex[:6]}.json"
        self.folder.write_json(f"decisions/{name}", {"domain": domain, "stamp": stamp, "kind": kind, **fields})
        self.read()

    def body(self, decision: Decision) -> dict:
        return self.folder.read_json(f"decisions/{decision.file}")


def schedule_folder(config: PipelineConfig) -> RunDirectory:
    """Where a schedule keeps what it knows. No run has a dot in its name."""
    return RunDirectory(f"{config.run_uri}.domains")


# -- by hand
def again(config: PipelineConfig, domain: str) -> list[str]:
    """Take back what was decided on a domain, so that the next tick looks at it anew; the stamps concerned."""
    ledger = Ledger(schedule_folder(config))
    if any(decision.domain == domain for decision in ledger.open()):
        raise ConfigError([Problem("--again", f"'{domain}' is being trained; wait for its job or cancel it")])
    stamps = sorted({d.stamp for d in ledger.all if d.domain == domain and ledger.of(domain, d.stamp)})
    if not stamps:
        raise ConfigError([Problem("--again", f"nothing was decided on a domain '{domain}'; see --history")])
    for stamp in stamps:
        ledger.record(domain, stamp, "again")
    return stamps


def pause(config: PipelineConfig, on: bool) -> None:
    folder = schedule_folder(config)
    if on:
        folder.write_json("pause.json", {"time": time.time()})
    else:
        folder.remove("pause.json")


def history(config: PipelineConfig) -> list[dict]:
    """Every decision, oldest first, with its moment."""
    ledger = Ledger(schedule_folder(config))
    return [{"time": decision.moment, **ledger.body(decision)} for decision in ledger.all]
