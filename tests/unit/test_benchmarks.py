"""Benchmarks of lm-evaluation-harness score as the harness alone scores the merged model."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'curlora[lm-eval]'")

from one_worker import opened, prepare, work_off

from curlora.continual import Example
from curlora.continual.parameters import adapter_parameters, read
from pipelines.chain.results import build_results
from pipelines.config.benchmarks import Benchmark
from pipelines.config.loading import parse_config
from pipelines.config.sections import AdapterConfig
from pipelines.data.benchmarks import benchmark_identity, load_benchmark
from pipelines.data.held_out import training_view, trial_view
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.evaluation.benchmarks import evaluate_benchmark
from pipelines.inference.predict import load_trained
from pipelines.metrics.paired import paired_p_value
from pipelines.models.adapters import attach_adapter
from pipelines.models.bank import Bank
from pipelines.preflight.data import check_data
from pipelines.reporting.page import write_report
from pipelines.reporting.summary import headlines
from pipelines.runs.records import score_points
from pipelines.runs.results import Results
from tests.conftest import WORDS, minimal, write_jsonl

ALONE = World(0, 1, torch.device("cpu"))
CONTEXT = 64  # of the model

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl, train: quiz.jsonl}}
test_split: test
fewshot_split: train
doc_to_text: "{{question}}"
"""
CHOICE = """
include: common.yaml
task: quiz
output_type: multiple_choice
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GREEDY = """
include: common.yaml
task: last_word
output_type: loglikelihood
doc_to_target: "{{' ' + endings[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
include: common.yaml
task: written
output_type: generate_until
doc_to_target: "{{endings[label]}}"
generation_kwargs: {until: ["warm", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
TEXT = """
include: common.yaml
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}} {{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
FILES = {"common": COMMON, "quiz": CHOICE, "last_word": GREEDY, "written": WRITTEN, "text": TEXT}


@pytest.fixture
def suite(tmp_path) -> Path:
    """A folder with a task of every kind of request over the same 30 rows."""
    folder, draw = tmp_path / "suite", random.Random(0)
    folder.mkdir()
    rows = []
    for _ in range(30):
        question = " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))
        rows.append({"question": question, "endings": draw.sample(WORDS, 3), "label": draw.randrange(3)})
    write_jsonl(folder / "quiz.jsonl", rows)
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def adapted(model):
    """A model with an adapter that changes its answers."""
    changed = attach_adapter(model, AdapterConfig(type="lora", r=4, alpha=8), seed=0)
    torch.manual_seed(3)
    for name, parameter in changed.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return changed.eval()


def benchmark(suite: Path, *names: str, **fields) -> Benchmark:
    return Benchmark(name="bench", suite="lm-eval", tasks=[str(suite / f"{name}.yaml") for name in names], **fields)


def ours(model, tokenizer, wanted: Benchmark, batch_tokens: int = 300):
    return evaluate_benchmark(model, load_benchmark(wanted), tokenizer, CONTEXT, ALONE, batch_tokens, "key")


@pytest.fixture
def alone(tokenizer, suite, monkeypatch):
    """lm-eval's own results on the merged copy of a model."""

    def evaluate(model, *names: str, **options) -> dict:
        import copy

        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        monkeypatch.chdir(suite)  # where it looks for data_files
        merged = copy.deepcopy(model).merge_and_unload()
        lm = HFLM(pretrained=merged, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=CONTEXT)
        tasks = [str(suite / f"{name}.yaml") for name in names]
        manager = TaskManager(include_defaults=False)  # its own tasks take seconds to list
        return lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, task_manager=manager, **options)

    return evaluate


def test_multiple_choice_has_the_numbers_of_the_harness_alone(adapted, tokenizer, suite, alone):
    cell, outcomes = ours(adapted, tokenizer, benchmark(suite, "quiz"))
    found = alone(adapted, "quiz")
    wanted = found["results"]["quiz"]
    assert (cell.metric, cell.role, cell.count) == ("acc", "benchmark", 30)
    assert cell.value == pytest.approx(wanted["acc,none"]) and 0 < cell.value < 1
    assert cell.extras == {"acc_norm": wanted["acc_norm,none"]}
    samples = sorted(found["samples"]["quiz"], key=lambda sample: sample["doc_id"])
    assert [outcome["correct"] for outcome in outcomes] == [bool(sample["acc"]) for sample in samples]
    chosen = [max(range(3), key=lambda i: sample["filtered_resps"][i][0]) for sample in samples]
    assert [outcome["prediction"] for outcome in outcomes] == list(map(str, chosen))
    assert outcomes[7]["id"] == "quiz/7"


def test_the_adapter_counts(adapted, tokenizer, suite):
    with_adapter = ours(adapted, tokenizer, benchmark(suite, "quiz"))[1]
    with adapted.disable_adapter():
        assert ours(adapted, tokenizer, benchmark(suite, "quiz"))[1] != with_adapter


def test_a_bank_answers_each_example_by_the_adapter_that_it_chooses(adapted, tokenizer, suite):
    bank, wanted = Bank(), benchmark(suite, "quiz")
    other, trained = read(adapter_parameters(adapted)), adapter_parameters(adapted)
    questions = [
        tokenizer.encode(json.loads(row)["question"]) for row in (suite / "quiz.jsonl").read_text().splitlines()
    ]
    for name in trained:
        if "lora_B" in name:
            trained[name].data.zero_()
    bank.begin(adapted, questions[::2])
    bank.add(adapted, "task", [Example("task", tuple(ids), tuple(ids)) for ids in questions[1::2]], other)
    alone = []
    for place in range(2):
        with bank.active(adapted, place):
            alone.append(ours(adapted, tokenizer, wanted)[1])
    bank.attach(adapted)
    places = bank.routes(adapted, questions, ALONE)
    assert set(places) == {0, 1}
    assert ours(adapted, tokenizer, wanted)[1] == [alone[place][row] for row, place in enumerate(places)]


@pytest.mark.parametrize("options", [{"limit": 11}, {"num_fewshot": 2}])
def test_limits_and_solved_examples_are_those_of_the_harness(adapted, tokenizer, suite, alone, options):
    cell, outcomes = ours(adapted, tokenizer, benchmark(suite, "quiz", **options))
    found = alone(adapted, "quiz", **options)
    assert len(outcomes) == options.get("limit", 30)
    assert cell.value == pytest.approx(found["results"]["quiz"]["acc,none"])


def test_prompts_are_chats_where_asked(adapted, tokenizer, suite, alone, monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    cell, _ = ours(adapted, tokenizer, benchmark(suite, "quiz", chat_template=True, num_fewshot=1))
    found = alone(adapted, "quiz", num_fewshot=1, apply_chat_template=True)
    prompts = [sample["arguments"][0][0] for sample in found["samples"]["quiz"]]
    assert all(prompt.startswith("user: ") and prompt.count("user: ") == 2 for prompt in prompts)
    assert cell.value == pytest.approx(found["results"]["quiz"]["acc,none"])
    assert cell.extras["acc_norm"] == pytest.approx(found["results"]["quiz"]["acc_norm,none"])


@pytest.mark.parametrize(("task", "metric"), [("last_word", "acc"), ("written", "exact_match")])
def test_every_example_of_other_requests_is_answered_as_by_the_harness(adapted, tokenizer, suite, alone, task, metric):
    cell, outcomes = ours(adapted, tokenizer, benchmark(suite, task))
    found = alone(adapted, task)
    assert cell.metric == metric
    assert cell.value == pytest.approx(found["results"][task][f"{metric},none"])
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    if task == "written":
        assert [outcome["prediction"] for outcome in outcomes] == [sample["filtered_resps"][0] for sample in samples]
        assert len({outcome["prediction"] for outcome in outcomes}) > 1
    else:
        assert cell.extras["perplexity"] == pytest.approx(found["results"][task]["perplexity,none"], rel=1e-4)


def test_whole_texts_have_a_perplexity_per_word(adapted, tokenizer, suite, alone):
    cell, outcomes = ours(adapted, tokenizer, benchmark(suite, "text"))
    wanted = alone(adapted, "text")["results"]["text"]
    assert (cell.role, cell.metric) == ("retention", "nll")
    assert cell.perplexity == pytest.approx(wanted["word_perplexity,none"], rel=1e-4)
    assert cell.extras["bits_per_byte"] == pytest.approx(wanted["bits_per_byte,none"], rel=1e-4)
    assert cell.tokens == sum(outcome["tokens"] for outcome in outcomes)


def test_several_tasks_are_one_mean_over_all_examples(adapted, tokenizer, suite):
    cell, outcomes = ours(adapted, tokenizer, benchmark(suite, "quiz", "last_word"))
    assert len(outcomes) == 60
    assert cell.value == pytest.approx((cell.extras["quiz.acc"] + cell.extras["last_word.acc"]) / 2)


def test_scores_do_not_depend_on_the_batches_and_disturb_no_generator(adapted, tokenizer, suite):
    before = random.getstate(), torch.get_rng_state()
    found = [ours(adapted, tokenizer, benchmark(suite, name), 1)[1] for name in ("quiz", "written")]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert found == [ours(adapted, tokenizer, benchmark(suite, name), 2000)[1] for name in ("quiz", "written")]


@pytest.fixture
def run(tmp_path, model, tokenizer, reviews, suite, monkeypatch):
    """A run of one task with two benchmarks, worked off by a worker in this process; and its plan."""
    prepare(monkeypatch)
    torch.manual_seed(1)
    model.model.embed_tokens.weight.data.normal_(0, 1)  # so that answers differ
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    entry = {"suite": "lm-eval", "tasks": [str(suite / "quiz.yaml")]}
    raw = minimal(tmp_path, reviews, base_model={"path": str(tmp_path / "base"), "dtype": "float32"}, tracking=None)
    raw |= {
        "adapter": {"type": "curlora", "r": 4},
        "training": {"max_steps": 6, "batch_size": 4, "max_length": 40, "learning_rate": 0.3},
        "resources": {"workers": 1, "gpus_per_worker": 0},
        "retention": [entry | {"name": "quiz"}, entry | {"name": "texts", "tasks": [str(suite / "text.yaml")]}],
    }
    config, directory, plan = opened(raw)
    work_off(config, directory, plan)
    return config, directory, plan


def test_a_step_scores_its_benchmarks_as_the_harness_alone_scores_the_merged_model(run, alone):
    config, directory, plan = run
    assert not plan.lacks_scores(directory)
    results = build_results(config, plan, directory, "finished")
    directory.write_json("results.json", results)
    record = directory.metrics(plan.steps[-1].directory)
    points = {name: value for name, value, *_ in score_points(record)}
    assert points["score/quiz"] == results.benchmarks["quiz"].scores[-1]
    assert {"acc_norm/quiz", "perplexity/texts", "nll/texts"} <= points.keys()
    card = directory.read_bytes(f"{plan.steps[-1].directory}/adapter/README.md").decode()
    ends = (results.benchmarks["quiz"].scores[-1], results.benchmarks["quiz"].scores[0])
    assert "| quiz | acc | {:.4g} | {:.4g} |".format(*ends) in card
    found = results.benchmarks["quiz"]
    trained = load_trained(directory, plan.steps[-1].fingerprint)
    wanted = alone(trained.model, "quiz")["results"]["quiz"]
    assert (found.metric, found.examples) == ("acc", 30)
    assert found.scores[-1] == pytest.approx(wanted["acc,none"])
    assert found.extras[-1] == {"acc_norm": wanted["acc_norm,none"]}
    assert found.scores[0] != found.scores[-1]
    rows = (plan.base_directory, plan.steps[0].directory)
    outcomes = [directory.read_jsonl(f"{row}/predictions/quiz.jsonl") for row in rows]
    assert [len(rows) for rows in outcomes] == [30, 30]
    assert found.p == paired_p_value(*outcomes)[0]
    assert list(results.nll) == list(results.perplexity) == ["texts"] and results.perplexity_ratio
    assert Results.from_json(json.loads(json.dumps(results.to_json()))) == results
    write_report(directory)
    assert "acc, 30 examples" in directory.read_bytes("report.html").decode()
    assert "quiz, acc" in {item.label for item in headlines(results)}


def test_a_score_is_known_again_until_its_definition_or_its_data_changes(suite, tmp_path):
    import shutil

    first = benchmark_identity(benchmark(suite, "last_word"))
    moved = Path(shutil.copytree(suite, tmp_path / "moved"))
    assert benchmark_identity(benchmark(moved, "last_word")) == first
    with open(moved / "quiz.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "film", "endings": ["a", "b"], "label": 0}) + "\n")
    assert benchmark_identity(benchmark(moved, "last_word")) != first
    (suite / "common.yaml").write_text(COMMON.replace("question", "endings"))  # which it includes
    assert benchmark_identity(benchmark(suite, "last_word")) != first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["arc_eazy"]}, "retention.0.tasks: lm-eval has no task 'arc_eazy', did you mean 'arc_easy'?"),
        ({"tasks": ["none.yaml"]}, "cannot be read as a task of lm-eval"),
        ({"metric": "acc_mean"}, "quiz has no score 'acc_mean' for each example; it has acc, acc_norm"),
        ({"metric": "acc,strict"}, "quiz has no filter 'strict'; it has none"),
        ({"chat_template": True}, "retention.0.chat_template: the base's tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_run(
    tmp_path, model, tokenizer, reviews, suite, changes, expected, monkeypatch
):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    raw = minimal(tmp_path, reviews, base_model={"path": str(tmp_path / "base")}, training={"max_length": 40})
    entry = {"name": "bench", "suite": "lm-eval", "tasks": [str(suite / "quiz.yaml")]}
    assert check_data(parse_config(raw | {"retention": [entry]})) == []
    (problem,) = check_data(parse_config(raw | {"retention": [entry | changes]}))
    assert expected in str(problem)


def test_a_search_does_not_see_benchmarks(tmp_path, reviews, suite):
    bench = {"name": "bench", "suite": "lm-eval", "tasks": [str(suite / "quiz.yaml")]}
    search = {"when": "first", "space": {"training.learning_rate": [1e-3, 1e-2]}}
    config = parse_config(minimal(tmp_path, reviews, retention=[bench], search=search))
    assert trial_view(training_view(config), 1).retention == []


def test_data_files_that_are_not_beside_the_definition_are_named(suite):
    (suite / "quiz.jsonl").unlink()
    with pytest.raises(DataError, match=r"data_files names quiz\.jsonl, and .* does not exist"):
        load_benchmark(benchmark(suite, "quiz"))
