"""Mixed batches: each row with its own adapter gives what that adapter gives alone."""

import pytest
import torch
from curlora_cases import layer_of, one_layer, reseeded, tiny_gpt2, tiny_llama, tokens
from peft import PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from curlora import CurloraConfig

LOTS = 64


def several(base, count, **config):
    """A model with adapters a0 … and U of each at random."""
    model = get_peft_model(base, CurloraConfig(**{"r": 3} | config), adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", CurloraConfig(**{"r": 3} | config))
    return reseeded(model)


@torch.no_grad()
def one_at_a_time(model, run, names, x):
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, row[None]))
        else:
            model.set_adapter(name)
            rows.append(run(model, row[None]))
    return torch.cat(rows)


def output(model, x, **kwargs):
    return model(x, **kwargs)


def logits(model, x, **kwargs):
    return model(x, **kwargs).logits


def test_64_adapters_in_one_batch_equal_one_adapter_at_a_time():
    model = several(tiny_llama(), LOTS)
    ids = torch.randint(0, 64, (LOTS, 9), generator=torch.Generator().manual_seed(0))
    names = [f"a{i}" for i in torch.randperm(LOTS, generator=torch.Generator().manual_seed(2)).tolist()]
    expected = one_at_a_time(model, logits, names, ids)
    with torch.no_grad():
        found = logits(model, ids, adapter_names=names)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, found.roll(1, dims=0), atol=1e-2)


@pytest.mark.parametrize("names", [["a0", "__base__", "a1", "a0", "a2"], ["__base__"] * 5, ["a1"] * 5])
@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 2, 3)])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "half with a bias", "float64"])
def test_layers_of_every_kind_and_rows_of_every_shape(names, shape, kind):
    dtype = {"half with a bias": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32)
    model = several(one_layer(16, 14, conv1d=kind == "conv1d", dtype=dtype), 3, target_modules=["lin"])
    x = torch.randn(*shape, 14, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = model(x, adapter_names=names)
    expected = one_at_a_time(model, output, names, x)
    assert torch.allclose(found.double(), expected.double(), atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 5},
        {"alpha": 3.0},
        {"r": 5},
        {"whiten": False},
        {"max_update_norm": 0.01},
        {"selection": "deim", "scale": "rsqrt"},
    ],
)
def test_adapters_with_other_factors_form_groups_of_their_own(other):
    model = several(one_layer(16, 14), 2, target_modules=["lin"])
    model.add_adapter("other", CurloraConfig(**{"r": 3, "target_modules": ["lin"]} | other))
    reseeded(model)
    names, x = ["a1", "other", "a0", "__base__", "other"], torch.randn(5, 4, 14)
    found = model(x, adapter_names=names)
    assert torch.allclose(found, one_at_a_time(model, output, names, x), atol=1e-5)


def test_an_adapter_that_lacks_a_layer_leaves_that_layer_to_the_base():
    model = several(tiny_llama(), 1)
    model.add_adapter("narrow", CurloraConfig(r=3, target_modules=["q_proj"]))
    reseeded(model)
    names, ids = ["narrow", "a0", "narrow"], torch.randint(0, 64, (3, 5))
    with torch.no_grad():
        found = logits(model, ids, adapter_names=names)
    assert torch.allclose(found, one_at_a_time(model, logits, names, ids), atol=1e-5)


def test_stacks_and_loaded_adapters_take_part(tmp_path):
    model = several(one_layer(16, 14), 2, target_modules=["lin"], carry="stack")
    model.base_model.add_block("a1")
    reseeded(model)
    names, x = ["a1", "a0", "a1"], torch.randn(3, 14)
    expected = one_at_a_time(model, output, names, x)
    assert torch.allclose(model(x, adapter_names=names), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one_layer(16, 14), tmp_path / "a0", adapter_name="a0")
    loaded.load_adapter(str(tmp_path / "a1"), "a1")
    assert torch.allclose(loaded.eval()(x, adapter_names=names), expected, atol=1e-5)


def test_generation_with_beams_gives_each_row_its_adapter():
    model = several(tiny_gpt2(), 2)
    ids, names = tokens(), ["a1", "a0"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    expected = one_at_a_time(model, lambda m, row: m.generate(input_ids=row, **options), names, ids)
    assert torch.equal(found, expected)


def test_the_encoder_of_an_encoder_decoder_is_not_repeated_for_beams():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = several(T5ForConditionalGeneration(config), 2)
    ids, names = tokens() % 60 + 2, ["a1", "a0"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    expected = one_at_a_time(model, lambda m, row: m.generate(input_ids=row, **options), names, ids)
    assert torch.equal(found, expected)


def test_mistakes_are_refused_by_name():
    model = several(one_layer(16, 14), 2, target_modules=["lin"])
    x = torch.randn(2, 14)
    with pytest.raises(ValueError, match=r"non-existing adapter.*: b1"):
        model(x, adapter_names=["a0", "b1"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 2"):
        model(x, adapter_names=["a0"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["a0", "a1"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["a0", "a1"])
    model.unmerge_adapter()
    model(x, adapter_names=["a0", "a1"])
    assert not layer_of(model)._forward_pre_hooks, "no hook is left behind"
