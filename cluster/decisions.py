"""What was decided on each domain of a schedule, as files that are never changed.

One decision is `decisions/<time>.<domain>.<stamp>.<state>.<id>.json`. Its name holds everything that the next
tick needs, so a listing of the folder is enough to know what is settled.
"""

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
    """One decision, as read from its file name.

    Attributes:
        stamp: version of the domain that was decided on (`Domain.stamp`).
        state: accepted, submitted, finished, refused, unchanged, failed, or again (withdraws the earlier ones).
    """

    file: str
    domain: str
    stamp: str
    state: str

    @property
    def moment(self) -> float:
        return int(self.file.split(".")[0]) / 1e6


class Ledger:
    """All decisions of one schedule, in order."""

    def __init__(self, folder: RunDirectory):
        self.folder = folder
        self.read()

    def read(self) -> None:
        self.all = [Decision(name, *name.split(".")[1:4]) for name in self.folder.list("decisions")]
        self._last: dict[tuple[str, str], list[Decision]] = {}
        for decision in self.all:
            entries = self._last.setdefault((decision.domain, decision.stamp), [])
            entries.append(decision)
            if decision.state == "again":
                entries.clear()

    def of(self, domain: str, stamp: str) -> list[Decision]:
        """Decisions on this version of a domain since it was last taken up `again`, oldest first."""
        return self._last.get((domain, stamp), [])

    def rounds(self, domain: str, stamp: str) -> int:
        """How often this version of a domain was taken up `again`."""
        return sum((d.domain, d.stamp, d.state) == (domain, stamp, "again") for d in self.all)

    def open(self) -> list[Decision]:
        """The `accepted` decision of every domain that is not settled yet."""
        return [found[0] for found in self._last.values() if found and found[-1].state not in SETTLED]

    def record(self, domain: str, stamp: str, state: str, **fields) -> None:
        # later than all others even if the clock was set back: decisions are ordered by file name
        last = int(self.all[-1].file.split(".")[0]) if self.all else 0
        moment = max(int(time.time() * 1e6), last + 1)
        name = f"{moment:017d}.{domain}.{stamp}.{state}.{uuid.uuid4().hex[:6]}.json"
        self.folder.write_json(f"decisions/{name}", {"domain": domain, "stamp": stamp, "kind": state, **fields})
        self.read()

    def body(self, decision: Decision) -> dict:
        return self.folder.read_json(f"decisions/{decision.file}")


def schedule_folder(config: PipelineConfig) -> RunDirectory:
    """Folder of a schedule's files; no run can have this name, as names contain no dot."""
    return RunDirectory(f"{config.run_uri}.domains")


def again(config: PipelineConfig, domain: str) -> list[str]:
    """Withdraw all decisions on a domain, so that the next tick considers it again; returns their stamps.

    Raises:
        ConfigError: the domain is being trained, or nothing was decided on it.
    """
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
    """Suspend all ticks of a schedule, or resume them."""
    folder = schedule_folder(config)
    if on:
        folder.write_json("pause.json", {"time": time.time()})
    else:
        folder.remove("pause.json")


def history(config: PipelineConfig) -> list[dict]:
    """All decisions, oldest first, each with its time."""
    ledger = Ledger(schedule_folder(config))
    return [{"time": decision.moment, **ledger.body(decision)} for decision in ledger.all]
