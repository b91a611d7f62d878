"""The adapter in whole models: which layers it takes, its life cycle, its files, and what it refuses to load."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from curlora_cases import logits, randomise, tiny_deberta, tiny_falcon, tiny_gpt2, tiny_llama, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from transformers import LlamaModel, MistralConfig, MistralForCausalLM

from curlora import BaseMismatchError, CurloraConfig
from curlora.conversion import to_lora
from curlora.record import check_whole
from curlora.sizes import adapter_file_bytes, safetensors_bytes

QKV = ["q_proj", "k_proj", "v_proj"]


def wrapped(base=None, trained=True, **config):
    config = {"r": 4, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny_llama() if base is None else base, CurloraConfig(**config)).eval()
    if trained:
        randomise(model)
    return model


def names(model):
    return {name for name, _ in model.base_model.adapted_layers()}


# --------------------------------------------------------------------------------------------------- which layers


def test_import_registers_the_tuner_and_pulls_in_no_system():
    code = (
        "import sys, curlora, importlib; importlib.reload(curlora); from peft.mapping import *;"
        "from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as p; assert p['CURLORA'] == 'curlora_';"
        "bad = {'deepspeed', 'ray', 'mlflow'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_all_linear_takes_every_dense_layer_but_the_output_head():
    model = wrapped()
    assert len(names(model)) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in names(model))
    assert logits(wrapped(trained=False)).equal(logits(tiny_llama()))


def test_gpt2_with_conv1d_layers_including_square_ones():
    model = wrapped(tiny_gpt2())
    square = [n for n, layer in model.base_model.adapted_layers() if layer.in_features == layer.out_features]
    assert len(names(model)) == 2 * 4 and len(square) == 2
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_gpt2()), atol=1e-3)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)


def test_targets_exclusions_layers_ranks_and_alphas():
    model = wrapped(
        target_modules=[*QKV, "up_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[1],
        rank_pattern={"up_proj": 6},
        alpha_pattern={"v_proj": 2.5},
    )
    assert names(model) == {f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")}
    settings = {n.rpartition(".")[2]: core.settings for n, _, core in model.base_model.cores("default")}
    assert {n: s.r for n, s in settings.items()} == {"q_proj": 4, "v_proj": 4, "up_proj": 6}
    assert settings["v_proj"].alpha == 2.5 and settings["q_proj"].alpha == 1.0
    assert model.get_nb_trainable_parameters()[0] == 2 * 16 + 36


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="nowhere"):
        wrapped(target_modules=["nowhere"])


def test_a_layer_without_a_matrix_is_refused_by_name():
    with pytest.raises(ValueError, match="norm: a layer of type LlamaRMSNorm cannot be adapted"):
        wrapped(target_modules=["norm"])


def test_only_u_is_trained_and_the_base_stays_frozen():
    model = wrapped(target_modules=QKV)
    assert all(("curlora_core.default.U" in n) == p.requires_grad for n, p in model.named_parameters())
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * 16


def test_modules_to_save_are_trained_saved_and_restored(tmp_path):
    model = wrapped(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), expected, atol=1e-6)


@pytest.mark.parametrize(("layers", "expected"), [(1, {1}), ([0], {0}), ([0, 1], {0, 1}), ([], {0, 1})])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_layers_to_transform_counts_under_the_default_too(layers, expected, pattern):
    model = wrapped(layers_to_transform=layers, layers_pattern=pattern)
    assert {int(name.split(".")[2]) for name in names(model)} == expected
    assert len(names(model)) == 7 * len(expected)


def test_layers_that_a_model_does_not_have_are_named():
    with pytest.raises(ValueError, match=r"layers_to_transform=\[7\] names no layer.*\[0, 1\]"):
        wrapped(layers_to_transform=[7])
    with pytest.raises(ValueError, match="layers_pattern='blocks'"):
        wrapped(layers_to_transform=[1], layers_pattern="blocks")


@pytest.mark.parametrize("bias", ["all", "curlora_only"])
def test_biases_train_and_are_saved_with_the_adapter(tmp_path, bias):
    model = wrapped(tiny_gpt2(), bias=bias, target_modules=["c_attn"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert any("c_attn" in name for name in trained) and (bias == "all") == any("ln_1" in name for name in trained)
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad.abs().max() > 0
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="does not produce the same output"), model.disable_adapter():
        pass
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "adapter").eval()), logits(model))
    to_lora(model, tmp_path / "lora")
    converted = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    assert torch.allclose(logits(converted), logits(model), atol=1e-4)


def test_a_configuration_object_may_belong_to_several_adapters_and_stays_as_it_was(tmp_path):
    config = CurloraConfig(r=3, carry="stack", target_modules=QKV)
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)
    model.base_model.add_block("other")
    randomise(model)
    assert config.blocks == 1 and [c.blocks for c in model.peft_config.values()] == [1, 2]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    loaded.load_adapter(str(tmp_path / "other"), "other")
    for name in ("default", "other"):
        model.eval().set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["other"].blocks == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_u_takes_the_dtype_of_the_base_where_peft_is_asked_not_to_cast_it(dtype, autocast):
    config = CurloraConfig(r=4, init_weights=False, target_modules=QKV)
    model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith(".U")} == {torch.float32 if autocast else dtype}
    assert not torch.equal(logits(model.eval()), logits(tiny_llama().to(dtype)))


def test_the_tuner_hides_no_attribute_of_the_model():
    base = LlamaModel(tiny_llama().config)
    model = get_peft_model(base, CurloraConfig(r=4))
    assert model.base_model.layers is base.layers and model.layers is base.layers


# ----------------------------------------------------------------------------------------------------- life cycle


def test_unload_leaves_the_base_bit_identical_and_wraps_again():
    base = tiny_llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    for seed in range(3):
        model = wrapped(base, seed=seed)
        assert not torch.allclose(logits(model), logits(tiny_llama()), atol=1e-3)
        base = model.unload()
        after = base.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_several_adapters_are_switched_disabled_and_deleted():
    model = wrapped(target_modules=QKV)
    model.add_adapter("other", CurloraConfig(r=3, target_modules=["up_proj", "q_proj"], seed=9))
    first = logits(model)
    model.set_adapter("other")
    assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-6), "a new adapter is the identity"
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    randomise(model, seed=4)
    second = logits(model)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-6)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    randomise(model, seed=0)
    model.delete_adapter("other")
    assert "other" not in "".join(model.state_dict())
    assert first.shape == logits(model).shape and not torch.equal(logits(model), second)


def test_deleting_the_active_adapter_activates_the_other():
    model = wrapped(target_modules=QKV)
    model.add_adapter("other", CurloraConfig(r=4, target_modules=QKV, seed=9))
    model.delete_adapter("default")
    assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-6)


def test_an_adapter_cannot_be_added_while_another_is_merged():
    model = wrapped()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.add_adapter("late", CurloraConfig(r=4))
    model.unmerge_adapter()
    model.add_adapter("late", CurloraConfig(r=4))


def test_safe_merge_of_a_broken_adapter_changes_nothing():
    model = wrapped(target_modules=["q_proj"])
    layer = model.base_model.adapted_layers()[0][1]
    before = layer.weight.clone()
    with torch.no_grad():
        layer.curlora_core["default"].U[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter default seems to be broken.*not be finite; nothing was changed"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_merging_a_tied_output_layer_leaves_the_embedding_alone():
    base = tiny_llama(tied=True)
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = wrapped(base, target_modules=["lm_head"])
    expected = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.unmerge_adapter()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not merged.config.tie_word_embeddings


def test_a_deep_copy_is_independent():
    model = wrapped()
    twin = copy.deepcopy(model)
    randomise(twin, seed=5)
    assert not torch.equal(logits(model), logits(twin))


def test_gradient_checkpointing_of_a_whole_model_reaches_every_u():
    model = wrapped().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [tiny_falcon, tiny_deberta])
def test_models_that_change_outputs_in_place_train(make):
    model = wrapped(make(), trained=False, task_type=None).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_stack_through_a_file_and_back(tmp_path):
    model = wrapped(carry="stack", r=3)
    model.base_model.add_block()
    randomise(model, seed=1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), expected)
    loaded.base_model.remove_block()
    first = wrapped(carry="stack", r=3)
    assert torch.allclose(logits(loaded), logits(first), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- files


def test_a_whole_model_compiles_without_a_graph_break():
    model = wrapped()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", [{}, {"whiten": False, "scale": "none"}, {"selection": "deim"}])
def test_save_and_load_give_the_same_logits(tmp_path, config, low_cpu_mem_usage):
    model = wrapped(**config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_calibrated_adapter_loads_without_a_calibration_batch(tmp_path):
    model = wrapped(selection="activation", trained=False)
    model.base_model.calibrate([{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}])
    randomise(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(model))


def test_load_adapter_under_another_name_and_through_a_state_dict(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    other = wrapped(seed=3)
    other.load_adapter(str(tmp_path), "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    fresh = wrapped(seed=8)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert torch.equal(logits(fresh), logits(model)), "indices come with the state dict, not from the seed"


def test_the_file_holds_u_and_one_record_a_layer_and_nothing_else(tmp_path):
    wrapped(target_modules=QKV).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * 2 * 3
    for key, tensor in state.items():
        if key.endswith(".U"):
            assert tensor.shape == (4, 4) and tensor.dtype == torch.float32
        else:
            assert key.endswith(".record") and tensor.shape == (2 * 4 + 3 + 1,) and tensor.dtype == torch.int32


def test_mistral_7b_adapter_is_under_150_kb_by_arithmetic_on_the_meta_device():
    config = MistralConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)
    with torch.device("meta"):
        base = MistralForCausalLM(config)
    model = get_peft_model(base, CurloraConfig(r=16, target_modules=QKV))
    assert model.get_nb_trainable_parameters()[0] == 96 * 256
    state = get_peft_model_state_dict(model)
    sizes = {".U": 96 * 16 * 16 * 4, ".record": 96 * (16 + 16 + 3 + 1) * 4}
    for suffix, expected in sizes.items():
        tensors = [t for k, t in state.items() if k.endswith(suffix)]
        assert sum(t.numel() * t.element_size() for t in tensors) == expected
    assert adapter_file_bytes(model) <= 150_000
    lora = 32 * (2 * 4096 + 2 * (4096 + 1024)) * 16 * 4
    assert sum(sizes.values()) * 150 <= lora * 3  # k and v are narrow there; the square case is in benchmarks


@pytest.mark.parametrize("config", [{}, {"carry": "stack"}, {"target_modules": QKV, "r": 3}])
def test_the_size_of_the_file_is_known_before_it_is_written(tmp_path, config):
    model = wrapped(**config)
    if "carry" in config:
        model.base_model.add_block()
    model.save_pretrained(tmp_path)
    assert adapter_file_bytes(model) == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_the_size_of_a_large_file_of_several_dtypes_is_exact():
    dtypes = (torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int64, torch.float64)
    state = {f"layers.{i}.x{j}": torch.zeros(3, i + 1, dtype=d) for i in range(150) for j, d in enumerate(dtypes)}
    assert safetensors_bytes(state) == len(save(state, metadata={"format": "pt"}))


def test_the_meta_device_runs_shapes_without_reading_weights():
    with torch.device("meta"):
        base = tiny_llama()
    model = get_peft_model(base, CurloraConfig(r=4))
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 64)
    with torch.device("meta"):
        base = tiny_llama()
    with pytest.raises(ValueError, match="r=33 is larger"):
        get_peft_model(base, CurloraConfig(r=33, target_modules=QKV))


# ------------------------------------------------------------------------------------------- another dtype or base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_adapter_loads_on_the_same_base_in_half_precision(tmp_path, dtype):
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path).eval()
    plain = logits(tiny_llama())
    change = (logits(model) - plain).abs().max()
    assert (logits(loaded).float() - logits(model)).abs().max() < 0.2 * change


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_of_the_same_shape_is_refused_naming_the_layer(tmp_path, low_cpu_mem_usage):
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"layers\.0.*made for another base model.*base_model_name_or_path"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_another_base_is_refused_by_load_adapter_and_by_a_state_dict(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    other = wrapped(tiny_llama(seed=1))
    with pytest.raises(BaseMismatchError):
        other.load_adapter(str(tmp_path), "second")
    with pytest.raises(BaseMismatchError):
        set_peft_model_state_dict(wrapped(tiny_llama(seed=1)), get_peft_model_state_dict(model))


def test_a_base_that_was_trained_on_a_little_is_refused_and_rounding_is_not(tmp_path):
    wrapped().save_pretrained(tmp_path)

    def scaled(factor):
        base = tiny_llama()
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight.mul_(factor)
        return base

    PeftModel.from_pretrained(scaled(1.005), tmp_path)
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.mlp\.up_proj"):
        PeftModel.from_pretrained(scaled(1.03), tmp_path)


# ----------------------------------------------------------------------------------------------------- damaged files


def edited(path, edit):
    state = load_file(path / "adapter_model.safetensors")
    edit(state)
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})


def first(state, suffix):
    return next(key for key in sorted(state) if key.endswith(suffix))


DAMAGES = {
    "a flipped number in U": (lambda s: s[first(s, ".U")].view(-1)[3].mul_(1.001), "checksum.*damaged"),
    "an index out of range": (lambda s: s[first(s, ".record")][0].fill_(9999), "row indices.*damaged"),
    "an index twice": (
        lambda s: s[first(s, ".record")][4].copy_(s[first(s, ".record")][5]),
        "column indices.*damaged",
    ),
    "another index": (lambda s: s[first(s, ".record")][5].copy_(_unused(s)), "fingerprint"),
    "a flipped fingerprint": (lambda s: s[first(s, ".record")][-3].bitwise_xor_(1 << 24), "fingerprint"),
    "a missing U": (lambda s: s.pop(first(s, ".U")), "lacks 1 entries"),
    "a missing record": (lambda s: s.pop(first(s, ".record")), "lacks 1 entries"),
    "a missing layer": (lambda s: [s.pop(k) for k in list(s) if "layers.1" in k], "lacks 28|lacks 14"),
    "an unknown layer": (lambda s: s.update({"base_model.model.x.curlora_core.U": torch.zeros(4, 4)}), "has no layer"),
}


def _unused(state):
    used = set(state[first(state, ".record")][4:8].tolist())
    return torch.tensor(next(i for i in range(32) if i not in used), dtype=torch.int32)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, damage):
    edit, message = DAMAGES[damage]
    wrapped().save_pretrained(tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    wrapped().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*truncated or damaged"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_file_of_another_rank_is_refused_naming_both(tmp_path):
    wrapped(r=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ValueError, match=r"has shape \(4, 4\) in the file.*\(8, 8\).*another r"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_configuration_without_its_weights_never_computes(tmp_path):
    wrapped().save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), CurloraConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="no weights were loaded for this layer"):
        logits(model)


def test_empty_zero3_shards_are_never_saved():
    state = {"x.curlora_core.U": torch.zeros(0), "x.curlora_core.record": torch.zeros(12, dtype=torch.int32)}
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned or dropped it"):
        check_whole(state)
    state.pop("x.curlora_core.U")
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned or dropped it"):
        check_whole(state)


# ------------------------------------------------------------------------------------------- states in memory


def doubled(state):
    return {key: value * 2 if key.endswith(".U") else value for key, value in state.items()}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_state_dict_may_be_averaged_cast_and_trained_on(tmp_path, loaded):
    """Of a new adapter and of one that came from a file, which holds checksums."""
    model = wrapped()
    model.save_pretrained(tmp_path)
    if loaded:
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    state = get_peft_model_state_dict(model)
    fresh = wrapped(trained=False)
    for changed in (
        doubled(state),
        {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()},
    ):
        set_peft_model_state_dict(fresh, changed)
        assert not torch.equal(logits(fresh), logits(model))
    randomise(model, seed=9)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert torch.equal(logits(fresh), logits(model))
    fresh.load_state_dict(doubled(model.state_dict()))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert torch.equal(logits(averaged.module), logits(model))
    fresh.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()), logits(fresh))


def test_only_the_file_holds_checksums(tmp_path):
    model = wrapped(target_modules=QKV)
    model.save_pretrained(tmp_path)

    def checksums(state):
        return {int(value[-1]) for key, value in state.items() if key.endswith(".record")}

    assert 0 not in checksums(load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert checksums(get_peft_model_state_dict(model)) == checksums(get_peft_model_state_dict(loaded)) == {0}


def test_an_adapter_that_is_still_on_the_meta_device_has_a_state_dict_and_takes_one():
    model = wrapped()
    empty = get_peft_model(tiny_llama(), CurloraConfig(r=4, task_type="CAUSAL_LM"), low_cpu_mem_usage=True).eval()
    state = get_peft_model_state_dict(empty)
    assert state.keys() == get_peft_model_state_dict(model).keys()
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(logits(empty), logits(model))
