"""`base_model.dtype: auto`: what it becomes, and that it stays so."""

import pytest
import torch

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.plan import make_plan
from pipelines.config.loading import parse_config
from pipelines.models import dtypes
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import base_fingerprint
from pipelines.workers.device import dtype_of_workers, local_device, slow_dtype
from tests.conftest import minimal


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return {"path": str(tmp_path / "base")}


@pytest.fixture
def config(tmp_path, reviews, base):
    def make(**changes):
        return parse_config(minimal(tmp_path, reviews, base_model=base, **changes))

    return make


def processor(monkeypatch, **instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_is_bfloat16_where_the_processor_computes_in_it(monkeypatch, config, instruction):
    processor(monkeypatch, **{instruction: True}, avx512_f=True)
    assert with_dtype(config()).base_model.dtype == "bfloat16"
    assert slow_dtype(with_dtype(config()), "cpu") is None


def test_auto_is_float32_elsewhere(monkeypatch, config):
    processor(monkeypatch, avx512_f=True, avx512_bf16=False)
    assert with_dtype(config()).base_model.dtype == "float32"


def test_this_machine_is_asked(config):
    found = with_dtype(config()).base_model.dtype
    assert found == dtypes.best_dtype(local_device(config()))


def test_an_explicit_dtype_is_kept_and_warned_of_where_it_is_emulated(monkeypatch, config, base):
    processor(monkeypatch, avx512_f=True)
    base["dtype"] = "bfloat16"
    assert with_dtype(config()) == config()
    assert "6.5 times" in slow_dtype(config(), "cpu") and "set float32 or auto" in slow_dtype(config(), "cpu")


def test_a_run_keeps_what_it_was_begun_with(monkeypatch, config, base):
    run = RunDirectory(config().run_uri)
    processor(monkeypatch, avx512_bf16=True)
    begun = with_dtype(config(), run)
    run.open_for_writing(begun)
    processor(monkeypatch)
    again = with_dtype(config(), run)
    assert again == begun
    assert [s.fingerprint for s in make_plan(again).steps] == [s.fingerprint for s in make_plan(begun).steps]
    base["path"] += "-other"  # another base: asked anew
    assert with_dtype(config(), run).base_model.dtype == "float32"


def test_auto_that_is_not_resolved_has_no_identity(config):
    with pytest.raises(ValueError, match="auto has no identity"):
        base_fingerprint(config().base_model)


def test_workers_without_a_gpu_are_asked_for_their_processor(monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    processor(monkeypatch)
    assert dtype_of_workers(config(resources={"gpus_per_worker": 0})) == "float32"
    assert dtype_of_workers(config()) == "bfloat16"
