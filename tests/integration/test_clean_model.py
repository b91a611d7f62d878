"""A logged model where this project is not installed: a Python that sees every package but ours."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from pipelines.inference.predict import input_columns, predict
from pipelines.lineage.logged_models import REQUIREMENTS
from tests.unit.test_predict import ROWS, served, trained  # noqa: F401  fixtures

OURS = ("curlora", "pipelines", "cluster", "tests", "__editable__")
CODE = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("curlora", "pipelines"))
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[2])
answers = {task: model.predict(pandas.DataFrame(rows), params={"task": task}).to_dict("records")
           for task, rows in json.loads(sys.argv[3]).items()}
import curlora, pipelines
imported = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"answers": answers, "from": [curlora.__file__, pipelines.__file__], "imported": imported}))
"""


@pytest.fixture
def packages(tmp_path) -> Path:
    """The installed packages without this project."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def test_the_model_says_what_predict_says_where_nothing_of_this_project_is(trained, served, packages, tmp_path):  # noqa: F811
    run, _ = trained
    rows = {
        name: [{column: row[column] for column in input_columns(run, name)} for row in ROWS[:3]]
        for name in ("head", "words", "write", "choose", "read")
    }
    command = [sys.executable, "-I", "-S", "-c", CODE, str(packages), str(tmp_path / "model"), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answers"] == {name: predict(run, name, given) for name, given in rows.items()}
    for path in map(Path, found["from"]):
        assert path.parents[1].name.startswith("curlora-") and path.parents[1].parent == Path(tempfile.gettempdir())
        assert not path.exists()  # its copy of the wheel ends with the process
    assert not {"ray", "deepspeed"} & set(found["imported"])  # its requirements do not name them
    assert {"torch", "peft", "datasets"} <= set(REQUIREMENTS)
