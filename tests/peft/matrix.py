"""PEFT's own test matrix, run on CURLoRA: `python tests/peft/matrix.py [--quick] [--download-only] [pytest options]`.

Fetches the sdist of the installed version of PEFT from the package index, adds CURLoRA to the lists in which its tests
keep LoRA and VeRA, replaces hub models by tiny local ones (`tiny_hub`), and runs all cases of CURLoRA. A failure that
`by_design` does not explain is an error, and so is an explained one that passes. `--quick` is the part of `make test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import by_design
import cases
import tiny_hub

import curlora

ROOT = Path(__file__).resolve().parents[2]
VERSION = version("peft")
CACHE = Path(os.environ.get("CURLORA_TEST_CACHE") or ROOT / "build") / f"peft-{VERSION}"


class NoIndex(Exception):
    """The sdist cannot be fetched."""


def fetch(folder: Path) -> Path:
    """The `tests` folder of the installed version's sdist, fetched once.

    Raises NoIndex if pip cannot get it.
    """
    tests = folder / f"peft-{VERSION}" / "tests"
    if tests.is_dir():
        return tests
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--no-binary", "peft", "--no-build-isolation", "--dest", str(folder), f"peft=={VERSION}"]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=300)
    archive = folder / f"peft-{VERSION}.tar.gz"
    if done.returncode or not archive.exists():
        raise NoIndex(f"pip download peft=={VERSION}: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.name.startswith(f"peft-{VERSION}/tests/")]
        opened.extractall(folder, members, filter="data")
    return tests


def prepare(source: Path, folder: Path) -> Path:
    """A folder whose `tests` are PEFT's with CURLoRA among the cases."""
    target = folder / "matrix" / "tests"
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.py"):
        (target / file.name).write_text(cases.patched(file.name, file.read_text()))
    (target / "__init__.py").touch()
    return target.parent


@dataclass(frozen=True)
class Outcome:
    """One test of the matrix: `name` is module::test[parameters]."""

    name: str
    status: str
    message: str


def run(files: Iterable[str], expression: str = "curlora", options: Iterable[str] = ()) -> list[Outcome]:
    """Outcomes of all CURLoRA cases in these files of PEFT's tests."""
    root = prepare(fetch(CACHE), CACHE)
    tiny_hub.build(CACHE / "hub")
    report = CACHE / f"report-{os.getpid()}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={root}", "-k", expression]
    command += [f"--junitxml={report}", *options, *(f"tests/{file}" for file in files)]
    environment = os.environ | {"HF_HOME": str(CACHE / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(curlora.__file__).parents[1])  # the one that is imported here
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not report.exists() or done.returncode not in (0, 1):
        raise RuntimeError(f"pytest failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    found = [_outcome(case) for case in ElementTree.parse(report).getroot().iter("testcase")]
    report.unlink()
    return found


def _outcome(case: ElementTree.Element) -> Outcome:
    bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    status = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
    module = case.get("classname", "").split(".")[1]
    return Outcome(f"{module}::{case.get('name')}", status, "" if bad is None else bad.get("message", ""))


def judge(outcomes: list[Outcome]) -> tuple[list[Outcome], Counter[str], list[str]]:
    """Failures without a reason, failures by reason, and reasons that nothing fails for any more."""
    reasons = {outcome: by_design.reason(outcome.name) for outcome in outcomes}
    unexplained = [o for o, reason in reasons.items() if o.status == "failed" and reason is None]
    explained = Counter(reason for o, reason in reasons.items() if o.status == "failed" and reason)
    met = {reason for reason in reasons.values() if reason}
    return unexplained, explained, sorted(met - explained.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the part that `make test` runs")
    parser.add_argument("--files", nargs="+", default=cases.FILES, help="files of PEFT's tests")
    parser.add_argument("--download-only", action="store_true", help="only fetch the sdist and build the models")
    arguments, options = parser.parse_known_args()
    if arguments.download_only:
        print(prepare(fetch(CACHE), CACHE))
        tiny_hub.build(CACHE / "hub")
        return 0
    outcomes = run(cases.QUICK if arguments.quick else arguments.files, options=options)
    for file in sorted({o.name.partition("::")[0] for o in outcomes}):
        counts = Counter(o.status for o in outcomes if o.name.startswith(f"{file}::"))
        print(f"{file}: {sum(counts.values())} cases,", ", ".join(f"{counts[s]} {s}" for s in sorted(counts)))
    unexplained, explained, unmet = judge(outcomes)
    for reason, count in sorted(explained.items()):
        print(f"{count} failures by design: {reason}")
    for reason in unmet:
        print(f"nothing fails any more: {reason}")
    for outcome in unexplained:
        print(f"FAILED {outcome.name}: {' '.join(outcome.message.split())[:300]}")
    return 1 if unexplained or unmet else 0


if __name__ == "__main__":
    sys.exit(main())
