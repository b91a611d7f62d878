"""Messages between driver and workers: assignments, and verdicts at the rungs of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.record import Record
from pipelines.runs.samples import Question
from pipelines.runs.step_record import Cell


def rung_file(rung: float) -> str:
    """Path, in a trial's run directory, of its scores at a rung (a fraction of its training)."""
    return f"rungs/{rung:.4f}.json"


def verdict_file(rung: float) -> str:
    """Path, in a trial's run directory, of the driver's verdict on whether it continues after a rung."""
    return f"verdicts/{rung:.4f}.json"


@dataclass(frozen=True)
class RungScores(Record):
    """Scores of a trial at a rung.

    Attributes:
        step, steps: optimizer steps done, and in total.
        train_loss: mean training loss of the second half of the steps so far.
    """

    rung: float
    cells: tuple[Cell, ...]
    time: float
    step: int
    steps: int
    train_loss: float | None = None

    @classmethod
    def read(cls, run: RunDirectory, rung: float) -> RungScores | None:
        """The scores at a rung; None if the trial has not reached it."""
        raw = run.read_json(rung_file(rung))
        return None if raw is None else cls.from_json(raw)


class Queue:
    """Numbered assignments and their results: `<number>.json`, `<number>.done.json`; `end.json` ends the queue."""

    def __init__(self, uri: str):
        self.uri = uri
        self._files = RunDirectory(uri)

    def put(self, number: int, assignment: dict) -> None:
        self._files.write_json(f"{number:06d}.json", assignment)

    def get(self, number: int) -> dict | None:
        return self._files.read_json(f"{number:06d}.json")

    def finish(self, number: int, result: dict) -> None:
        self._files.write_json(f"{number:06d}.done.json", result)

    def result(self, number: int) -> dict | None:
        return self._files.read_json(f"{number:06d}.done.json")

    def place(self, placement_group: str) -> None:
        """Record the placement group of the workers, so that the driver can release it."""
        self._files.write_json("place.json", {"placement_group": placement_group})

    @property
    def placement_group(self) -> str | None:
        return (self._files.read_json("place.json") or {}).get("placement_group")

    def end(self) -> None:
        self._files.write_json("end.json", {})

    @property
    def ended(self) -> bool:
        return self._files.exists("end.json")


@dataclass(frozen=True)
class Assignment:
    """One segment of the chain, sent by the driver to the workers as JSON."""

    run_uri: str
    config: dict
    steps: tuple[StepPlan, ...]
    base_directory: str
    base_fingerprint: str
    missing: dict[str, list[str]]  # step directory → names of the cells to evaluate
    cell_keys: dict[str, str]
    start: dict | None = None  # the step of another run that the chain continues from (`runs.start.Start`)
    lease: str = ""  # token of the driver that sent this; the workers stop once another driver holds the lease
    lease_uri: str = ""  # the run whose lease counts; default: this one
    rungs: tuple[float, ...] = ()  # for a trial: fractions of the step at which it is scored and awaits a verdict
    trial: bool = False  # if it cannot succeed, the workers report that and stay alive
    verbose: bool = False
    questions: tuple[Question, ...] = ()  # of `evaluation.samples`
    unanswered: dict[str, list[str]] = field(default_factory=dict)  # step directory → keys of questions to answer

    def questions_for(self, directory: str) -> list[Question]:
        """The questions that a step has yet to answer."""
        wanted = set(self.unanswered.get(directory, ()))
        return [question for question in self.questions if question.key in wanted]

    def to_json(self) -> dict:
        lists = {"steps": self.steps, "questions": self.questions}
        return self.__dict__ | {name: [item.to_json() for item in items] for name, items in lists.items()}

    @classmethod
    def from_json(cls, raw: dict) -> Assignment:
        steps = tuple(StepPlan.from_json(step) for step in raw["steps"])
        questions = tuple(Question.from_json(question) for question in raw["questions"])
        return cls(**(raw | {"steps": steps, "questions": questions}))
