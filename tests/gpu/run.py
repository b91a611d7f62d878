"""Everything that only a GPU can show, in one short command: each part in a process of its own, one after the other.

    python tests/gpu/run.py --minutes 8 [--parts layers,model7b] [--out gpu-results] [--model DIR] [--domains CONFIG]
    python tests/gpu/run.py --tiny          the same on any machine in seconds a part; its numbers mean nothing

Parts layers, model7b, quantised, faults and cost need torch, transformers and peft; what is missing for a part skips
it with the reason. A part writes `<part>.json` and `results.md` after each measurement: nothing is lost when it fails
or its time is up. Minutes are shared out by weight, and what a part leaves goes to those after it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from results import PARTS, Result, SkipPart, end_abandoned, read

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"layers": 7, "model7b": 6, "worker": 5, "domains": 3, "quantised": 2, "faults": 2, "cost": 1}
GRACE = 25.0  # seconds after its share that a part has for the measurement under way


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        run_part(arguments)
        return
    end = time.monotonic() + arguments.minutes * 60
    parts = list(arguments.parts)
    while parts:
        left = end - time.monotonic()
        share = (left - GRACE) * WEIGHTS[parts[0]] / sum(WEIGHTS[part] for part in parts)
        part = parts.pop(0)
        start_part(part, arguments, max(share, 1.0), min(share + GRACE, left))
    print((arguments.out / "results.md").read_text())
    failed = [part for part in arguments.parts if (read(arguments.out, part) or {})["status"] == "failed"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds a part")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--model", type=Path, help="base model of the worker part; default: a small random one")
    parser.add_argument("--domains", type=Path, help="configuration of the domains part; default: it is skipped")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    wanted = [part.strip() for part in text.split(",")]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(PARTS)}")
    return [part for part in PARTS if part in wanted]


def start_part(part: str, arguments: argparse.Namespace, seconds: float, limit: float) -> None:
    """Run a part in its own process and process group; end both at the limit."""
    (arguments.out / f"{part}.json").unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", part, "--seconds", f"{seconds:.0f}"]
    command += ["--out", str(arguments.out), *(["--tiny"] if arguments.tiny else [])]
    for name in ("model", "domains"):
        if value := getattr(arguments, name):
            command += [f"--{name}", str(value)]
    paths = [str(ROOT), str(ROOT / "tests" / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if arguments.tiny:
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on a busy machine take seconds
    print(f"{part}: {seconds:.0f} s", flush=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(max(limit, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end_abandoned(arguments.out, part, f"ended after {max(limit, 1.0):.0f} s: its time was up; rows so far stand")
        return
    found = read(arguments.out, part)
    if found is None or found["status"] == "running":
        end_abandoned(arguments.out, part, f"its process ended with code {code}")
    print(f"{part}: {(read(arguments.out, part) or {})['status']}", flush=True)


def run_part(arguments: argparse.Namespace) -> None:
    """In the part's own process: whatever it raises becomes its result."""
    result = Result(arguments.one, arguments.out)
    result.save()
    try:
        from measure import Plan, hardware  # imports torch, which only the parts' processes pay for

        result.hardware = hardware()
        plan = Plan(
            arguments.tiny, time.monotonic() + arguments.seconds, arguments.out, arguments.model, arguments.domains
        )
        importlib.import_module(MODULES.get(arguments.one, arguments.one)).run(plan, result)
    except SkipPart as skipped:
        result.end("skipped", str(skipped))
    except Exception as error:
        traceback.print_exc()
        result.end("failed", f"{type(error).__name__}: {error}")
    else:
        result.end("done")


MODULES = {"worker": "chain", "cost": "costs"}
"""Parts whose module has another name: `cost` and `worker` are modules of the pipelines package."""

if __name__ == "__main__":
    main()
