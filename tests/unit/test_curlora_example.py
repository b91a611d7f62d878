"""The example of curlora/README.md runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "curlora" / "README.md"


@pytest.fixture
def example():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    (code,) = [block for block in blocks if "sys.argv" in block]
    return code


def test_the_readmes_example_trains_saves_and_converts(example, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the film is good and the story was warm , the plot is dull " * 300)
    (tmp_path / "train.py").write_text(example)
    command = [sys.executable, "train.py", "model", "text.txt", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", done.stdout).groups())
    assert after < before - 0.05
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert {"adapter/adapter_model.safetensors", "lora/adapter_model.safetensors", "merged/model.safetensors"} <= files
    assert len(example.splitlines()) <= 33
