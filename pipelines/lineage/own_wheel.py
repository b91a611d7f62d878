"""This project's code as a wheel: every logged model carries it, so that it loads where nothing of it is installed.

One file rather than a folder of 270, which a server would take one by one for every step.
pipelines/inference/pyfunc_entry.py imports from it, and pip installs it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import zipfile
from pathlib import Path

from pipelines.runs.environment import versions

PACKAGES = ("curlora", "pipelines")
ROOT = Path(__file__).parents[2]
MOMENT = (2020, 1, 1, 0, 0, 0)  # of every file in it: the same code is the same bytes


def write_wheel(folder: Path) -> Path:
    """Write the wheel of the code that runs now to a folder; returns its path."""
    version, content = _wheel()
    target = folder / f"curlora-{version}-py3-none-any.whl"
    target.write_bytes(content)
    return target


@functools.lru_cache(maxsize=1)
def _wheel() -> tuple[str, bytes]:
    """(version, content); the code does not change while it runs."""
    version = versions(PACKAGES[:1]).get("curlora", "0")  # a job runs it from a folder, which has none
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            files[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    info = f"curlora-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: curlora\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: curlora\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, MOMENT)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return version, buffer.getvalue()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
