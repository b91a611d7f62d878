"""The recorded step of another run that a chain continues from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipelines.runs.directory import RunDirectory

RECORD = "start.json"


@dataclass(frozen=True)
class Start:
    """A finished step of another run.

    Attributes:
        named: `start_from` as written in the configuration.
        depth: steps from the base to this one, inclusive.
        digests: task → digest of its latest training data in the lineage; oldest first.
        base: `path`, `dtype` and `quantization` of its base model.
        adapter: its `adapter:` section.
        strategy: name of the strategy whose state it holds; None if there is none.
        source: folder of a plain PEFT adapter, which is imported as that step; None for the step of a run.
    """

    named: str
    run_uri: str
    directory: str
    fingerprint: str
    base_fingerprint: str
    depth: int
    digests: dict[str, str]
    base: dict[str, str]
    adapter: dict
    strategy: str | None
    source: str | None = None

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.run_uri)

    def to_json(self) -> dict:
        return asdict(self)

    def knows(self, task: str, digest: str) -> bool:
        """Whether this step or an ancestor was trained on exactly this data under this task name."""
        return self.digests.get(task) == digest


def record_start(run: RunDirectory, start: Start | None) -> None:
    """Record in the run what its `start_from` resolved to."""
    if start is not None and run.read_json(RECORD) != start.to_json():
        run.write_json(RECORD, start.to_json())
