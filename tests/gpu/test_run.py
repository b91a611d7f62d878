"""The GPU run rehearsed on a CPU: every part ends, and its tables hold what they must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run.py"
PARTS = ("layers", "model7b", "faults", "cost")


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "4", "--out", str(out), *arguments]
    return subprocess.run(
        line, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = command(out, "--parts", ",".join(PARTS))
    assert done.returncode == 0, done.stderr
    return out


def table(out: Path, part: str, start: str) -> list[dict]:
    """The rows of the table whose title starts so."""
    raw = json.loads((out / f"{part}.json").read_text())
    found = next(each for each in raw["tables"] if each["title"].startswith(start))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def test_every_part_ends_well_and_is_in_the_markdown(rehearsal):
    assert {part: json.loads((rehearsal / f"{part}.json").read_text())["status"] for part in PARTS} == dict.fromkeys(
        PARTS, "done"
    )
    text = (rehearsal / "results.md").read_text()
    for part in PARTS:
        for each in json.loads((rehearsal / f"{part}.json").read_text())["tables"]:
            assert each["rows"], each["title"]
            assert f"### {each['title']}" in text


def test_curlora_keeps_fewer_bytes_than_lora_and_the_frozen_base_none(rehearsal):
    for kind in ("One layer, ", "A stack"):
        rows = table(rehearsal, "layers", kind)
        bytes_of = {
            name: [r["bytes kept"] for r in rows if r["variant"].startswith(name)] for name in ("CURLoRA", "LoRA")
        }
        assert max(bytes_of["CURLoRA"]) < max(bytes_of["LoRA"])
    assert {r["bytes kept"] for r in table(rehearsal, "layers", "One layer, ") if r["variant"] == "frozen base"} == {0}


def test_the_layer_compiles_without_a_graph_break(rehearsal):
    rows = table(rehearsal, "layers", "One layer under torch.compile")
    assert {row["variant"]: row["says"] for row in rows}["CURLoRA r 16"] == "compiles"


def test_the_kernels_of_the_update_are_listed(rehearsal):
    rows = {row["kernel"]: row for row in table(rehearsal, "layers", "Kernels of a step: one")}
    assert rows["aten::index_select"]["frozen, µs"] == 0 < rows["aten::index_select"]["CURLoRA, µs"]


def test_curlora_trains_fewer_numbers_than_lora_on_the_same_layers(rehearsal):
    rows = table(rehearsal, "model7b", "A training pass")
    trained = {(row["adapted"], row["variant"]): row["trained"] for row in rows}
    for targets, layers in (("q/k/v", 3), ("all linear", 7)):
        assert trained[targets, "CURLoRA r 16"] == 2 * layers * 16**2  # two decoder layers
        assert trained[targets, "LoRA r 16, factors as the base"] > trained[targets, "CURLoRA r 16"]
    assert trained["–", "frozen base"] == 0


def test_a_user_out_of_memory_reads_what_to_change(rehearsal):
    (row,) = table(rehearsal, "faults", "What a user reads")
    assert row["says what to do"] is True
    assert "training.gradient_checkpointing" in row["message"]


def test_predicted_flops_stand_beside_every_measured_pass_that_can_be_predicted(rehearsal):
    measured = {
        (r["adapted"], r["variant"]): r["/ frozen base"] for r in table(rehearsal, "model7b", "A training pass")
    }
    rows = table(rehearsal, "cost", "Predicted")
    assert {(row["adapted"], row["variant"]): row["measured"] for row in rows}.items() <= measured.items()
    assert len(rows) == 5
    ratios = {(row["adapted"], row["variant"]): row["/ frozen base, predicted"] for row in rows}
    assert 1 < ratios["q/k/v", "CURLoRA r 16"] < ratios["q/k/v", "LoRA r 16, factors as the base"]


def test_a_part_that_lacks_something_is_skipped_with_the_reason(tmp_path):
    done = command(tmp_path, "--parts", "domains")
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "domains.json").read_text())
    assert raw["status"] == "skipped"
    assert "--domains" in raw["reason"]


def test_a_part_whose_time_is_up_keeps_its_rows_and_does_not_stop_the_next(tmp_path):
    done = command(tmp_path, "--parts", "layers,domains", "--minutes", "0.05")
    assert done.returncode == 1
    assert "failed: layers" in done.stderr
    assert json.loads((tmp_path / "layers.json").read_text())["status"] == "failed"
    assert "its time was up" in (tmp_path / "results.md").read_text()
