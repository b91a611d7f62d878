"""Domains appear while `curlora schedule` runs: jobs, candidates, a champion; a killed loop costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.bench import wait_for
from tests.cluster.head import Head


@pytest.fixture
def schedule(bench, head, tmp_path):
    """A loop over the inbox of `tmp_path`, and what it has decided so far."""
    (tmp_path / "inbox").mkdir()
    raw = {
        "name": "desk",
        "base_model": bench.raw["base_model"],
        "adapter": bench.raw["adapter"],
        "training": bench.raw["training"],
        "storage": str(tmp_path / "runs"),
        "resources": {"workers": 1},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "register_as": "desk"},
        "gate": {"max_forgetting": 1, "max_nll_increase": 10, "max_perplexity_ratio": 100},
        "domains": {
            "inbox": str(tmp_path / "inbox"),
            "template": {"kind": "language-modeling", "documents": "joined"},
            "cron": "* * * * *",
            "follow_up": "2s",
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    schedule = Schedule(head, tmp_path)
    schedule.start()
    yield schedule
    schedule.kill()


class Schedule:
    def __init__(self, head: Head, folder: Path):
        self.head, self.folder = head, folder

    def start(self) -> None:
        command = [sys.executable, "-m", "pipelines", "schedule", str(self.folder / "c.yaml")]
        log = (self.folder / "schedule.log").open("a")
        options = {"env": self.head.environment, "stdout": log, "stderr": log, "start_new_session": True}
        self.process = subprocess.Popen(command, **options)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def add(self, name: str, source: Path) -> None:
        folder = self.folder / "inbox" / name
        folder.mkdir()
        for split in ("train", "test"):
            shutil.copy(source / f"{split}.jsonl", folder / f"{split}.jsonl")
        (folder / "_SUCCESS").touch()

    def decisions(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("runs/desk.domains/decisions/*"))]

    def wait_for(self, domain: str, kind: str) -> dict:
        def found():
            return [d for d in self.decisions() if (d["domain"], d["kind"]) == (domain, kind)]

        return wait_for(found, self.process)[0]


def test_two_domains_make_two_candidates_and_a_champion_whatever_happens_to_the_loop(schedule, demo_assets):
    sources = list(demo_assets.tasks.values())
    schedule.add("first", sources[0])
    schedule.wait_for("first", "accepted")
    schedule.kill()  # between the decision and the job, or just after
    schedule.add("second", sources[1])
    (schedule.folder / "inbox" / "broken").mkdir()
    (schedule.folder / "inbox" / "broken" / "train.jsonl").write_text('{"text": "whole"}\n{"text": "cut o')
    (schedule.folder / "inbox" / "broken" / "_SUCCESS").touch()
    schedule.start()
    first = schedule.wait_for("first", "finished")
    assert (first["verdict"], first["version"], first["promoted"]) == ("passed", "models:/desk/1", True)
    second = schedule.wait_for("second", "finished")
    assert (second["verdict"], second["version"], second["promoted"]) == ("passed", "models:/desk/2", True)
    (reason, *_) = schedule.wait_for("broken", "refused")["reasons"]
    assert f"{schedule.folder}/inbox/broken/train.jsonl:2" in reason

    told = schedule.head.curlora("tick", str(schedule.folder / "c.yaml")).stdout
    assert told.strip() == "nothing new among 3 domains"
    accepted = {d["domain"]: d for d in schedule.decisions() if d["kind"] == "accepted"}
    assert accepted["first"]["start_from"] is None
    assert accepted["second"]["start_from"].startswith(first["run_uri"])
    results = json.loads((Path(second["run_uri"]) / "results.json").read_text())
    assert results["learned_at"] == {"first": 0, "second": 1}
    events = [json.loads(path.read_text()) for path in schedule.folder.glob("runs/desk-*/events/*.json")]
    assert [event["task"] for event in sorted(events, key=lambda e: e["time"]) if event["kind"] == "step_started"] == [
        "first",
        "second",
    ]
