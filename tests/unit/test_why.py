"""A dry run says of every step why it will be trained."""

import json

import pytest
from sample_run import make_config, make_run

from pipelines.chain.plan import make_plan
from pipelines.chain.why import steps_ahead, trained_again
from pipelines.runs.directory import RunDirectory

TASKS = ("mrpc", "sst2", "biomed")


def sentences(config) -> list[str]:
    run = RunDirectory(config.run_uri)
    return [step.sentence for step in steps_ahead(config, run, make_plan(config, run))]


def test_a_finished_chain_has_nothing_to_do_and_a_new_one_everything(tmp_path):
    assert sentences(make_config(tmp_path)) == ["will be trained: not trained yet"] * 3
    make_run(tmp_path)
    assert sentences(make_config(tmp_path)) == ["done"] * 3


def test_a_changed_field_is_named_with_both_values(tmp_path):
    make_run(tmp_path)
    found = sentences(make_config(tmp_path, training={"learning_rate": 1e-3, "epochs": 2}))
    changed = "training.learning_rate 0.003 → 0.001"
    assert found[0] == f"will be trained: {changed}"
    assert found[1] == f"will be trained: it follows step 1 (mrpc), which is another one now; {changed}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj"]}}, "adapter.type curlora → lora"),
        ({"strategy": {"name": "ewc", "strength": 3.0}}, "strategy.strength null → 3"),
        ({"base_model": {"path": "{}/tiny-llama", "dtype": "bfloat16"}}, "base_model.dtype float32 → bfloat16"),
        ({"tasks": TASKS[1:]}, "tasks mrpc → sst2"),
    ],
)
def test_every_part_of_a_steps_identity_can_be_the_reason(tmp_path, changes, expected):
    make_run(tmp_path)
    if "base_model" in changes:
        changes = {"base_model": {**changes["base_model"], "path": str(tmp_path / "tiny-llama")}}
    assert expected in sentences(make_config(tmp_path, **changes))[0]


def test_changed_data_and_changed_fields_of_a_task(tmp_path):
    make_run(tmp_path)
    with open(tmp_path / "sst2" / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more", "label": 0}) + "\n")
    config = make_config(tmp_path)  # writes the data anew
    with open(tmp_path / "sst2" / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more", "label": 0}) + "\n")
    found = sentences(config)
    assert found[0] == "done"
    assert found[1].startswith("will be trained: the training data of sst2 has changed (digest ")
    assert "it follows step 2 (sst2)" in found[2]
    (first, *rest) = config.tasks
    prompted = config.model_copy(update={"tasks": [first.model_copy(update={"prompt": "Now: {text}"}), *rest]})
    assert "mrpc.prompt Review: {text}\nSentiment: → Now: {text}" in sentences(prompted)[0]


def test_changed_files_of_the_base_are_the_reason_where_its_path_is_the_same(tmp_path):
    make_run(tmp_path)
    config = make_config(tmp_path)
    (tmp_path / "tiny-llama" / "model.safetensors").write_bytes(b"others")
    assert f"the files of base_model.path {tmp_path}/tiny-llama have changed" in sentences(config)[0]


def test_a_task_that_was_added_costs_only_itself_and_the_scores_of_the_step_before(tmp_path):
    make_run(tmp_path, tasks=TASKS[:2])
    found = sentences(make_config(tmp_path, tasks=TASKS))
    assert found == ["done", "will be scored: no score on biomed", "will be trained: not trained yet"]


def test_a_checkpoint_and_a_trained_step_are_seen(tmp_path):
    make_run(tmp_path, finished=0, status="failed")
    config = make_config(tmp_path)
    run = RunDirectory(config.run_uri)
    _, second, _ = make_plan(config, run).steps
    run.write_json(f"{second.checkpoints}/00000012.json", {})
    states = [step.state for step in steps_ahead(config, run, make_plan(config, run))]
    assert states == ["trained", "resumed", "trained"]


def test_prompts_added_to_a_finished_chain_are_the_only_thing_to_do(tmp_path):
    make_run(tmp_path)
    asked = make_config(tmp_path, evaluation={"samples": {"prompts": ["Who are you?"], "per_task": 0}})
    assert sentences(asked) == ["will be scored: 1 sample prompt without an answer"] * 3


def test_a_run_names_the_first_step_that_it_trains_again_and_why(tmp_path):
    """As after a change of a default, e.g. that of training.max_length from 128 to 1024."""
    make_run(tmp_path, training={"learning_rate": 3e-3, "epochs": 2, "max_length": 128})
    config = make_config(tmp_path)
    run = RunDirectory(config.run_uri)
    found = trained_again(config, run, make_plan(config, run))
    assert found == ("step 1 (mrpc) and all steps after it will be trained again: training.max_length 128 → 1024")


def test_a_run_has_nothing_to_say_of_steps_that_are_new_or_done(tmp_path):
    make_run(tmp_path, tasks=TASKS[:2])
    config = make_config(tmp_path, tasks=TASKS)
    run = RunDirectory(config.run_uri)
    assert trained_again(config, run, make_plan(config, run)) is None
