"""The command line: exit codes, one clear line a problem, no traceback, quick answers."""

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from pipelines.cli.app import COMMANDS, GROUPS, main
from tests.conftest import minimal


@pytest.fixture
def call(tmp_path, reviews, model, tokenizer, monkeypatch):
    """`curlora run` on a valid configuration with one thing changed."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def invoke(*arguments: str, **changes):
        raw = minimal(tmp_path, reviews, base_model={"path": str(tmp_path / "base")}, tracking=None) | changes
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
        return CliRunner().invoke(main, ["run", "c.yaml", *arguments])

    return invoke


def bad_input(result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def test_dry_run_prints_the_arithmetic(call):
    result = call("--dry-run", "--json", "--set", "adapter.r=4")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["model"]["trainable_parameters"] == 14 * 16  # q k v o gate up down of two layers, 4 × 4 each
    assert set(facts["memory_gib"]) == {"zero1", "zero2", "zero3", "zero3-offload"}


def test_missing_file(call):
    result = CliRunner().invoke(main, ["run", "nowhere.yaml"])
    assert "nowhere.yaml: cannot be read" in bad_input(result)


def test_unknown_key(call):
    assert "unknown key 'trainig', did you mean 'training'?" in bad_input(call(trainig={}))


def test_rank_above_the_smaller_side(call):
    targets = "adapter.target_modules=[q_proj,k_proj]"  # under the default, layers that are too small get a lower rank
    found = bad_input(call("--dry-run", "--set", "adapter.r=13", "--set", targets))
    assert "13" in found
    assert "adapter" in found


def test_layers_that_get_a_lower_rank_are_named_in_one_warning(call):
    result = call("--dry-run", "--set", "adapter.r=13")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "smaller rank" in line]
    assert line.startswith("warning: CURLoRA on all linear layers: a smaller rank for 2 × model.layers.*.")


def test_module_name_that_matches_nothing(call):
    found = bad_input(call("--dry-run", "--set", "adapter.target_modules=[qq_proj]"))
    assert "qq_proj" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.type=lorra", "did you mean 'lora'?"),
        ("deepspeed=zero4", "unknown setting 'zero4'"),
        ("deepspeed={zero_optimization: {stage: 7}}", "stage is 7"),
        ("strategy={name: sequential, strength: 2}", "does not take strength"),
        ("strategy={name: replay, shar: 0.1}", "did you mean 'share'?"),
        ("strategy={name: ewc, strength: -1}", "strength is -1; use a number of at least 0"),
        ("strategy={name: olora}", "adapter.carry: is continue, but strategy 'olora' needs stack"),
        ("adapter={type: ia3, carry: stack}", "'ia3' cannot be stacked"),
        ("adapter={type: prompt_tuning}", "virtual tokens"),
        ("adapter={type: lora, options: {lora_dropuot: 0.1}}", "did you mean 'lora_dropout'?"),
        ("base_model.path=./nowhere", "base_model.path"),
        ("tasks.0.data=./nowhere", "no such file"),
    ],
)
def test_bad_values_name_field_and_remedy(call, override, expected):
    assert expected in bad_input(call("--dry-run", "--set", override))


@pytest.mark.parametrize("name", ["ilora", "lwf", "ewc", "clora"])
def test_a_strategy_that_protects_an_adapter_refuses_the_probe(call, name):
    found = bad_input(call("--dry-run", "--set", "adapter.type=none", "--set", f"strategy={{name: {name}}}"))
    assert f"'{name}' does not work with adapter 'none'" in found


def test_clora_needs_the_factors_of_a_lora(call):
    found = bad_input(call("--dry-run", "--set", "adapter.r=4", "--set", "strategy={name: clora, k: 4}"))
    assert "'clora' does not work with adapter 'curlora': its penalty is on LoRA's factors" in found


def test_lwf_needs_a_head_to_hold(call, reviews):
    text = f"tasks=[{{name: t, kind: language-modeling, data: {reviews}, text: sentence}}]"
    found = bad_input(call("--dry-run", "--set", "strategy={name: lwf}", "--set", text))
    assert "strategy.name: 'lwf' preserves the outputs of classifier heads, but no task has one" in found


def test_what_lives_in_one_adapter_refuses_a_new_adapter_for_every_task(call):
    options = {"ewc": "", "ilora": "", "lwf": "", "rehearsal": ", distill: 0, lwf: 1"}
    for name, more in options.items():
        strategy = f"strategy={{name: {name}{more}}}"
        found = bad_input(call("--dry-run", "--set", "adapter.carry=fresh", "--set", strategy))
        assert f"adapter.carry: is fresh, but strategy '{name}' needs continue" in found


def test_a_stack_that_outgrows_a_layer_is_refused_before_training(call, reviews):
    task = f"kind: language-modeling, data: {reviews}, text: sentence"
    tasks = "tasks=[" + ", ".join(f"{{name: t{i}, {task}}}" for i in range(4)) + "]"
    stack = ("--set", "adapter={type: curlora, r: 4, carry: stack}", "--set", tasks)
    assert "4 blocks of r=4 do not fit" in bad_input(call("--dry-run", *stack))


def test_bad_data_stops_a_real_run_before_ray(call, reviews):
    (reviews / "test.jsonl").write_text("")
    assert "the split is empty" in bad_input(call())


def test_status_of_nothing_and_of_an_unknown_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no runs" in CliRunner().invoke(main, ["status"]).output
    result = CliRunner().invoke(main, ["status", "ghost"])
    assert result.exit_code == 2
    assert "no run 'ghost'" in result.output


def test_every_command_has_help_with_an_example():
    for name in COMMANDS:
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert "Example" in text, name


def test_help_lists_every_command_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    text = CliRunner().invoke(main, ["--help"]).output
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "..." not in text.partition("Training:")[2], "the first sentence of a command fits its line"


def test_help_needs_no_library_but_click():
    code = (
        "import sys; from click.testing import CliRunner; from pipelines.cli.app import main\n"
        "CliRunner().invoke(main, ['--help'])\n"
        "print([m for m in ('pydantic', 'numpy', 'yaml', 'fsspec', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_imports_nothing_slow():
    code = (
        "import sys; from click.testing import CliRunner; from pipelines.cli.app import main\n"
        "CliRunner().invoke(main, ['run', '--help']); import pipelines.config.loading, pipelines.chain.driver\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
