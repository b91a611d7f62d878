"""DeepSpeed settings as users have them: for Transformers, axolotl and LLaMA-Factory."""

import json

import pytest
from click.testing import CliRunner

from pipelines.config.loading import parse_config
from pipelines.distributed.zero_settings import (
    SHIPPED,
    asks_for_sizes,
    complete_settings,
    deepspeed_settings,
    ignored,
    stage_of,
)
from pipelines.errors import ConfigError
from tests.conftest import minimal
from tests.deepspeed_files import FILES


@pytest.fixture
def config_of(tmp_path):
    def make(settings, dtype: str = "float32"):
        base = {"path": str(tmp_path), "dtype": dtype}
        return parse_config(minimal(tmp_path, tmp_path, deepspeed=settings, base_model=base))

    return make


def values(part) -> list:
    return [v for nested in part.values() for v in values(nested)] if isinstance(part, dict) else [part]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_left_to_be_filled_in_and_what_the_chain_decides_is_its_own(name, config_of):
    config = config_of(FILES[name])
    settings = complete_settings(config, world_size=2, hidden=32)
    assert "auto" not in values(settings)
    assert not {"optimizer", "scheduler", "amp", "compile"} & set(settings)
    training = config.training
    assert settings["train_batch_size"] == training.batch_size
    assert settings["gradient_clipping"] == training.max_grad_norm
    assert settings["bf16"] == settings["fp16"] == {"enabled": False}
    assert settings["zero_allow_untested_optimizer"] and not settings["zero_force_ds_cpu_optimizer"]
    assert stage_of(settings) == FILES[name].get("zero_optimization", {}).get("stage", 0)


def test_automatic_sizes_follow_the_hidden_size_as_in_transformers():
    zero = deepspeed_settings(FILES["transformers-zero3"], hidden=64)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert "reduce_bucket_size" not in deepspeed_settings(FILES["transformers-zero3"])["zero_optimization"]
    assert asks_for_sizes(FILES["transformers-zero3"]) and not asks_for_sizes("zero3")


def test_the_rules_are_those_that_transformers_applies(tmp_path):
    import transformers
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    written = HfTrainerDeepSpeedConfig(FILES["transformers-zero3"])
    model = type("Model", (), {"config": transformers.LlamaConfig(hidden_size=64)})
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    written.trainer_config_process(arguments)
    written.trainer_config_finalize(arguments, model, 10)
    ours = deepspeed_settings(FILES["transformers-zero3"], hidden=64)["zero_optimization"]
    assert written.config["zero_optimization"] == ours


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("transformers-zero2", "float32", "optimizer, scheduler (training: decides)"),
        (
            "transformers-zero2-fixed",
            "float32",
            "train_micro_batch_size_per_gpu, gradient_clipping (training: decides)",
        ),
        ("transformers-zero2-fixed", "float32", "fp16 (base_model.dtype float32 decides)"),
        ("axolotl-zero3-offload", "float32", "not used of its settings: bf16 (base_model.dtype float32 decides)"),
        ("axolotl-zero1-compiled", "float32", "compile (a chain does not support it)"),
    ],
)
def test_one_warning_names_what_is_not_used(config_of, name, dtype, expected):
    assert expected in ignored(config_of(FILES[name], dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-factory-zero2", "float32"), ("llama-factory-zero3-offload", "float32")]
    + [("axolotl-zero3-offload", "bfloat16")]
    + [(name, "bfloat16") for name in SHIPPED],
)
def test_what_is_left_to_the_caller_or_agrees_needs_no_warning(config_of, name, dtype):
    assert ignored(config_of(FILES.get(name, name), dtype)) is None


def test_shipped_settings_stay_what_they_are():
    from importlib import resources

    for name in SHIPPED:
        file = resources.files("cluster").joinpath(f"deepspeed/{name}.json")
        assert deepspeed_settings(name) == json.loads(file.read_text())


def test_loss_scaling_is_kept_where_the_base_is_in_half_precision(config_of):
    settings = complete_settings(config_of(FILES["transformers-zero2-fixed"], "float16"), 2)
    assert settings["fp16"] == {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}


def test_dry_run_takes_a_users_file_and_warns_once(tmp_path, reviews, model, tokenizer, monkeypatch):
    import yaml

    from pipelines.cli.app import main

    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "ds.json").write_text(json.dumps(FILES["transformers-zero3"]))
    raw = minimal(tmp_path, reviews, base_model={"path": str(tmp_path / "base")}, tracking=None, deepspeed="ds.json")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw | {"adapter": {"r": 4}}))
    called = CliRunner().invoke(main, ["run", "c.yaml", "--dry-run"])
    assert called.exit_code == 0, called.output
    warnings = [line for line in called.output.splitlines() if line.startswith("warning: deepspeed")]
    assert len(warnings) == 1
    assert "ds.json: optimizer, scheduler (training: decides)" in warnings[0]


@pytest.mark.parametrize("settings", [{"zero_optimization": {"stage": 7}}, {"zero_optimization": True}])
def test_impossible_settings_are_bad_input(settings):
    with pytest.raises(ConfigError, match=r"use 0, 1, 2 or 3|expected a mapping"):
        deepspeed_settings(settings)
