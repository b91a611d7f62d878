"""What a step records of where it was computed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runs import environment

ROOT = Path(environment.__file__).resolve().parents[2]


def test_versions_hardware_and_stage_are_there():
    found = environment.describe(2, 3, "cpu")
    assert found["torch"] and found["world_size"] == 2 and found["deepspeed_stage"] == 3
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_gib"] > 0
    assert environment.versions(["no-such-package"]) == {}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_commit_is_that_of_this_checkout():
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    environment.git.cache_clear()
    assert environment.git()["git_commit"] == head


def test_installed_in_another_repository_it_has_no_commit(tmp_path):
    """A virtual environment may lie in somebody's repository; that one's commit says nothing of this code."""
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    package = tmp_path / "site-packages"
    package.mkdir()
    shutil.copy(environment.__file__, package / "environment.py")
    code = "import environment; print(environment.git())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=package, text=True).strip() == "{}"
