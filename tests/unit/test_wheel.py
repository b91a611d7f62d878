"""The wheel: all that the system needs, nothing else; and whether these tests run on an installed one."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_adapter_type_alone_asks_for_torch_and_peft_and_nothing_else(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {r.name for r in needs if r.marker is None} == {"torch", "peft"}
    system = {r.name for r in needs if r.marker and r.marker.evaluate({"extra": "pipelines"})}
    assert {"ray", "mlflow", "deepspeed", "transformers", "click"} <= system


def required(*names: str) -> dict[str, Distribution]:
    """The installed distributions of these names and of all that they require."""
    found: dict[str, Distribution] = {}
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        with contextlib.suppress(PackageNotFoundError):
            if name not in found:
                found[name] = distribution(name)
                needs = map(Requirement, found[name].requires or ())
                left += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_every_module_of_the_adapter_type_imports_with_torch_and_peft_only(tmp_path):
    """On a path that holds links to what those two require, and nothing else."""
    for package in required("torch", "peft").values():
        tops = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(package.locate_file(top))
    (tmp_path / "curlora").symlink_to(Path(curlora.__file__).parent)
    assert not any((tmp_path / name).exists() for name in ("ray", "mlflow", "deepspeed", "datasets", "pipelines"))
    paths = [path.relative_to(ROOT) for path in (ROOT / "curlora").rglob("*.py")]
    modules = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", code]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_command_says_what_to_install_where_only_the_adapter_type_is(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pipelines.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)  # without site-packages
    assert (
        done.returncode == 1 and "pip install 'curlora[pipelines]'" in done.stderr and "Traceback" not in done.stderr
    )


def test_the_command_starts_in_an_empty_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from pipelines.__main__ import main; main()"
    options = {"cwd": tmp_path / "empty", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site"), "--help"], **options)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "submit", "schedule"))
