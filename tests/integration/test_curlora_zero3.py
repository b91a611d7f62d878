"""Two real processes under DeepSpeed ZeRO-3 train what one process trains without DeepSpeed."""

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.zero import launch, tiny_base

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path, worker = tmp_path_factory.mktemp("zero3"), "curlora_zero3_worker.py"
    base = tiny_base(path / "base", layers=2, random_biases=True)  # a bias is partitioned too, and z must subtract it
    one = launch(worker, 1, "0", base, path / "one", torchrun=False)
    return {"one": one, "two": launch(worker, 2, "3", base, path / "two"), "path": path}


def test_the_base_is_partitioned(runs):
    whole = runs["one"][0]["before"]
    for rank in runs["two"]:
        assert rank["before"] == 0, "from_pretrained leaves nothing but shards"
        assert 0.4 * whole < rank["local"] < 0.6 * whole


def test_both_ranks_agree_on_u_rows_and_columns(runs):
    first, second = runs["two"]
    assert first["layers"] == second["layers"]
    assert len(first["layers"]) == 14


def test_zero3_trains_what_one_process_trains(runs):
    one, two = runs["one"][0], runs["two"][0]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    assert one["losses"][0] != pytest.approx(one["losses"][-1], rel=1e-4)
    for name, layer in one["layers"].items():
        assert layer["rows"] == two["layers"][name]["rows"]
        assert layer["columns"] == two["layers"][name]["columns"]
        assert layer["U"] == pytest.approx(two["layers"][name]["U"], abs=1e-3)
        assert any(abs(value) > 1e-4 for value in layer["U"])


def test_the_norm_bound_holds_under_zero3_and_is_reached(runs):
    for rank in (*runs["one"], *runs["two"]):
        shares = [layer["share"] for layer in rank["layers"].values()]
        assert max(shares) <= rank["bound"] * (1 + 1e-5)
        assert max(shares) == pytest.approx(rank["bound"], rel=1e-3)


def test_the_saved_adapter_holds_whole_u(runs):
    one = load_file(runs["path"] / "one" / "adapter" / "adapter_model.safetensors")
    two = load_file(runs["path"] / "two" / "adapter" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.shape == two[key].shape
        if key.endswith(".U"):
            assert torch.allclose(tensor, two[key], atol=1e-3)
