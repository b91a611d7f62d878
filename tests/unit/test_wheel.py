"""The wheel: all that the system needs, nothing else; and whether these tests run on an installed one."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import cluster
import curlora
import pipelines

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("curlora", "pipelines", "cluster")
DATA = {
    "pipelines/comparison/methods.yaml",
    *(str(file.relative_to(ROOT)) for file in (ROOT / "pipelines" / "starter").rglob("*.*")),
    *(str(file.relative_to(ROOT)) for file in (ROOT / "pipelines" / "reporting" / "templates").iterdir()),
    *(
        f"pipelines/configs/{name}.yaml"
        for name in ("demo", "demo-smollm2", "llama-70b", "paper-gpt2-large", "paper-mistral-7b")
    ),
    *(f"cluster/deepspeed/{name}.json" for name in ("zero1", "zero2", "zero3", "zero3-offload")),
}


@pytest.mark.skipif(not os.environ.get("CURLORA_WHEEL"), reason="set by `make unit WHEEL=1`")
@pytest.mark.parametrize("package", [curlora, pipelines, cluster], ids=PACKAGES)
def test_the_unit_tests_run_on_the_installed_wheel(package):
    installed = Path(sysconfig.get_path("purelib"))
    assert Path(package.__file__).is_relative_to(installed)
    elsewhere = subprocess.check_output([sys.executable, "-c", f"print(__import__('{package.__name__}').__file__)"])
    assert Path(elsewhere.decode().strip()).is_relative_to(installed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from copies, so that nothing is left in the checkout and nothing there gets in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES, "tests"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True)
    (file,) = target.glob("curlora-*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_the_wheel_holds_every_module_and_what_they_read_and_nothing_else(wheel):
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == modules | DATA


def test_the_command_starts_in_an_empty_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from pipelines.cli.app import main; main()"
    options = {"cwd": tmp_path / "empty", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site"), "--help"], **options)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "submit", "schedule"))
