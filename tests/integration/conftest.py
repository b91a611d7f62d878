"""A real base model and real text from the installed packages, and the command line in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml


@dataclass(frozen=True)
class Bench:
    """A folder to run in, with a three-task configuration: classifier head, verbalizer, language modelling."""

    root: Path
    raw: dict

    def config(self, name: str, **changes) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.raw | {"name": name} | changes))
        return path

    def start(self, config: Path, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipelines", "run", str(config), "--json", *arguments]
        return subprocess.Popen(
            command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, config: Path, *arguments: str, code: int = 0, timeout: int = 600) -> dict | str:
        """results.json of a run that ends well, stderr of one that does not."""
        process = self.start(config, *arguments)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == code, err
        return json.loads(out) if code == 0 else err

    def metrics(self, results: dict, step: int) -> dict:
        directory = results["steps"][step]["directory"]
        return json.loads((self.root / "runs" / results["run"] / directory / "metrics.json").read_text())

    def adapter_bytes(self, results: dict, step: int) -> bytes:
        folder = self.root / "runs" / results["run"] / results["steps"][step]["directory"]
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def demo_assets(tmp_path_factory):
    from pipelines.demo import prepare_demo

    cache = os.environ.get("CURLORA_TEST_CACHE")
    return prepare_demo(Path(cache) if cache else tmp_path_factory.mktemp("demo"), preset="test")


@pytest.fixture(scope="session")
def bench(demo_assets, tmp_path_factory) -> Bench:
    classification = next(path for path in demo_assets.tasks.values() if (path / "labels.json").exists())
    text = next(path for path in demo_assets.tasks.values() if not (path / "labels.json").exists())
    first = {"name": "part", "kind": "classification", "data": str(classification)}
    raw = {
        "base_model": {"path": str(demo_assets.base_model)},
        "adapter": {"type": "curlora", "r": 8},
        "training": {"max_steps": 24, "max_length": 48, "learning_rate": 1e-2},
        "resources": {"workers": 2},
        "tasks": [
            first,
            first | {"name": "word", "head": "verbalizer", "prompt": "{text}\nPart:"},
            {"name": "text", "kind": "language-modeling", "data": str(text)},
        ],
        "retention": [{"name": "other", "data": str(demo_assets.retention), "window": 48}],
        "tracking": None,
    }
    return Bench(tmp_path_factory.mktemp("bench"), raw)


@pytest.fixture(scope="session")
def reference(bench) -> dict:
    """The undisturbed run: two workers under ZeRO-2, lineage in a SQLite store."""
    store = {"uri": "sqlite:///mlflow.db", "experiment": "integration"}
    return bench.run(bench.config("reference", tracking=store))
