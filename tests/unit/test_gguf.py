"""A base in a GGUF file: what it becomes, what it is known by, and what is said where it cannot be read."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from pipelines.cli.app import main
from pipelines.config.sections import BaseModelConfig
from pipelines.errors import ConfigError, Unavailable
from pipelines.inference.predict import load_folder
from pipelines.models.base import load_base, load_tokenizer
from pipelines.models.gguf import converted, described
from pipelines.preflight.model import base_on_meta
from pipelines.runs.identity import base_fingerprint
from tests.conftest import make_model, make_tokenizer, minimal

pytest.importorskip("gguf", reason="pip install 'curlora[gguf]'")
from tests.gguf_file import rounded, write_gguf

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
IDS = torch.arange(3, 35)[None]


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory):
    """One cache for all tests: what is the same file is converted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache for one test alone."""
    monkeypatch.setenv("CURLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wide():
    """A model whose rows are whole blocks of 32 weights."""
    return make_model(make_tokenizer(), hidden=64)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_float32_weights_come_back_bit_by_bit(tmp_path, wide, tokenizer):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    loaded = load_base(BaseModelConfig(path=str(file), dtype="float32"), torch.device("cpu"))
    found, expected = loaded.state_dict(), wide.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.allclose(logits(loaded), logits(wide), atol=1e-6)
    assert not getattr(loaded, "is_quantized", False)


def test_quantised_weights_are_dequantised_to_the_dtype_asked_for(tmp_path, wide, tokenizer):
    before = logits(wide)
    file = str(write_gguf(tmp_path / "m.gguf", wide, tokenizer, "Q8_0"))
    exact = rounded(wide, "Q8_0")
    assert not torch.equal(logits(exact), before)
    whole = load_base(BaseModelConfig(path=file, dtype="float32")).state_dict()
    assert all(torch.equal(whole[name], weight) for name, weight in exact.state_dict().items())
    half = load_base(BaseModelConfig(path=file, dtype="bfloat16")).state_dict()
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in exact.state_dict().items())


def test_the_tokenizer_comes_from_the_file_with_its_chat_template(tmp_path, wide, tokenizer):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer, template=TEMPLATE)
    found = load_tokenizer(BaseModelConfig(path=str(file), dtype="float32"))
    for text in ("the film is good", "the  plot, née:\n 12 jokes!", "<s>a warm story</s>"):
        assert found(text).input_ids == tokenizer(text).input_ids
    assert found.chat_template == TEMPLATE
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<pad>")


def test_it_is_converted_once_and_described_without_its_weights(tmp_path, wide, tokenizer, cache):
    base = BaseModelConfig(path=str(write_gguf(tmp_path / "m.gguf", wide, tokenizer)), dtype="float32")
    first = Path(described(base).path)
    assert not list(cache.rglob("*.safetensors"))
    folder = Path(converted(base).path)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert Path(converted(base).path) == folder
    assert weights.stat().st_mtime_ns == written
    assert {"float32", "description"} == {path.name for path in folder.parent.iterdir()}
    assert first.parent == folder.parent


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, wide, tokenizer, cache):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer, leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ConfigError, match=r"m.gguf': lacks weights \(model.layers.1.mlp.up_proj.weight\)"):
        converted(BaseModelConfig(path=str(file), dtype="float32"))
    assert [path.name for path in next((cache / "gguf").iterdir()).iterdir()] == ["description"]


def test_a_base_is_known_by_the_content_of_its_file(tmp_path, wide, tokenizer):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    same = tmp_path / "renamed.GGUF"
    same.write_bytes(file.read_bytes())
    found = base_fingerprint(BaseModelConfig(path=str(file), dtype="float32"))
    assert base_fingerprint(BaseModelConfig(path=str(same), dtype="float32")) == found
    assert base_fingerprint(BaseModelConfig(path=str(file), dtype="bfloat16")) != found
    with torch.no_grad():
        wide.model.norm.weight[0] += 1
    write_gguf(file, wide, tokenizer)
    changed = BaseModelConfig(path=str(file), dtype="float32")
    assert base_fingerprint(changed) != found
    assert load_base(changed).model.norm.weight[0] == wide.model.norm.weight[0]


def configuration(tmp_path, reviews, file) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(minimal(tmp_path, reviews, base_model={"path": str(file), "dtype": "float32"}, tracking=None))
    )
    return str(path)


def test_dry_run_counts_the_parameters_from_the_header(tmp_path, reviews, wide, tokenizer, cache):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer, "Q8_0")
    config = configuration(tmp_path, reviews, file)
    result = CliRunner().invoke(main, ["run", config, "--dry-run", "--json", "--set", "adapter.r=4"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["model"]
    assert facts["base_parameters"] == sum(p.numel() for p in wide.parameters())
    assert facts["context"] == 64
    assert not list(cache.rglob("*.safetensors"))


def test_predictions_load_it(tmp_path, reviews, wide, tokenizer):
    from pipelines.config.loading import load_config

    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    config = load_config(configuration(tmp_path, reviews, file))
    bare = load_folder(None, config, frozenset())
    assert torch.allclose(logits(bare.model.cpu()), logits(wide), atol=1e-6)
    assert base_on_meta(config).config.num_hidden_layers == 2


def fails(config: str, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["run", config, *arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("arguments", [["--dry-run"], []], ids=["dry-run", "run"])
def test_without_the_extra_its_name_is_said_before_workers_start(
    tmp_path, reviews, wide, tokenizer, monkeypatch, arguments, cache
):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    config = configuration(tmp_path, reviews, file)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    monkeypatch.setattr("pipelines.chain.driver.early_cluster", None)
    found = fails(config, *arguments)
    assert "error: base_model.path: " in found
    assert found.count("pip install 'curlora[gguf]'") == 1


def test_what_cannot_be_read_is_said_with_a_remedy(tmp_path, reviews, wide, tokenizer):
    expected = {"nowhere.gguf": "no such file"}
    (tmp_path / "text.gguf").write_text("not a model")
    expected["text.gguf"] = "cannot be read ("
    whole = write_gguf(tmp_path / "m.gguf", wide, tokenizer).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    expected["half.gguf"] = "cannot be read ("
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(whole)
    expected["m-00001-of-00002.gguf"] = "llama-gguf-split --merge"
    write_gguf(tmp_path / "rope.gguf", wide, tokenizer, extra=[("rope_freqs.weight", torch.ones(16))])
    expected["rope.gguf"] = "scales its rotary positions (rope_freqs.weight)"
    for name, words in expected.items():
        with pytest.raises(ConfigError) as raised:
            described(BaseModelConfig(path=str(tmp_path / name), dtype="float32"))
        (problem,) = raised.value.problems
        assert words in problem.message
        assert "\n" not in problem.message
    for arguments in ([], ["--dry-run"]):
        said = fails(configuration(tmp_path, reviews, "elsewhere.gguf"), *arguments)
        assert said.count("elsewhere.gguf': no such file; check the path") == 1


def test_a_worker_of_another_rank_than_0_converts_as_well(tmp_path, wide, tokenizer, cache, monkeypatch):
    """Where Transformers saves on rank 0 alone: a node that has no rank 0, or whose rank 0 came second."""
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    wide.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing" / "model.safetensors").exists()
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    assert Path(converted(BaseModelConfig(path=str(file), dtype="float32")).path, "model.safetensors").exists()


def test_a_conversion_that_fails_is_one_line(tmp_path, wide, tokenizer, cache, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", wide, tokenizer)
    base = BaseModelConfig(path=str(file), dtype="float32")
    described(base)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(
        Unavailable, match=r"m.gguf' could not be dequantised \(its process ended with 1\); check memory"
    ):
        converted(base)
    assert [path.name for path in next((cache / "gguf").iterdir()).iterdir()] == ["description"]
