"""Sample prompts: which rows are asked, that answers are those of plain decoding, and where they are shown."""

import json
from dataclasses import replace

import pytest
import torch

from pipelines.chain.plan import make_plan
from pipelines.config.loading import parse_config
from pipelines.data.kinds import kind_of
from pipelines.data.samples import parts_of, questions_of
from pipelines.data.sets import evaluation_set
from pipelines.data.sources import load_split
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.samples import answer
from pipelines.models import heads
from pipelines.preflight.data import check_data
from pipelines.runs.directory import RunDirectory
from pipelines.runs.samples import Sample
from pipelines.workers.assignment import Assignment
from tests.conftest import minimal, write_jsonl
from tests.unit.sample_records import step_record

ALONE = World(0, 1, torch.device("cpu"))
CONTEXT = 64
LONGEST = 5
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
STORY = "the film is a warm story of a dull actor and the plot is slow with a good joke and a bad review of the film"


@pytest.fixture
def raw(tmp_path, model, tokenizer):
    """A task of every kind over the same rows."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = tmp_path / "rows"
    folder.mkdir()
    words = ("good", "bad", "warm", "dull", "slow", "bright")
    rows = [{"text": f"the plot is {word} {STORY}", "label": number % 2} for number, word in enumerate(words)]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    shared = {"data": str(folder)}
    classes = {"kind": "classification", "labels": ["bad", "good"]} | shared
    tasks = [
        classes | {"name": "head"},
        classes | {"name": "words", "head": "verbalizer", "prompt": "{text}\nlabel:"},
        {"name": "write", "kind": "generation", "prompt": "{text}:", "completion": "it is {label}"} | shared,
        {"name": "choose", "kind": "multiple-choice", "prompt": "{text}:", "choices": ["a joke", "a story"]} | shared,
        {"name": "read", "kind": "language-modeling"} | shared,
    ]
    tasks[2]["max_new_tokens"] = 3
    samples = {"prompts": ["the film is", "a good joke was"], "per_task": 2, "max_new_tokens": LONGEST}
    changes = {"training": {"max_length": 40}, "evaluation": {"samples": samples}, "tracking": None}
    base = {"path": str(tmp_path / "base"), "dtype": "float32"}
    return minimal(tmp_path, folder, tasks=tasks, base_model=base, **changes)


def changed(raw: dict, **samples) -> dict:
    return raw | {"evaluation": {"samples": raw["evaluation"]["samples"] | samples}}


def keys(raw: dict, task: str | None) -> list[str]:
    return [question.key for question in questions_of(parse_config(raw)) if question.task == task]


def answers(raw: dict, model, tokenizer, batch_tokens: int = 8192) -> dict[str | None, list[Sample]]:
    """Task → its samples."""
    config = parse_config(raw)
    questions = questions_of(config)
    heads.attach_heads(model, {"head": 2}, seed=0)
    found = answer(model, questions, parts_of(questions, tokenizer, config, CONTEXT), ALONE, batch_tokens)
    assert [sample.key for sample in found] == [question.key for question in questions]
    return {task: [s for s in found if s.task == task] for task in (None, *(t.name for t in config.tasks))}


def plainly(model, tokenizer, ids: list[int], limit: int, stops: set[int]) -> str:
    """Greedy decoding by its definition, without cache, padding or batches."""
    written: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].argmax().item()
        if token in stops:
            break
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


# -- what is asked


def test_nothing_is_asked_unless_the_configuration_says_so(raw):
    config = parse_config(raw | {"evaluation": {}})
    assert config.evaluation.samples is None
    assert questions_of(config) == ()
    assert questions_of(parse_config(changed(raw, prompts=[], per_task=1)))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ({"prompts": ["  "]}, "prompt 0 is empty; write it or remove it"),
        ({"prompts": ["a", "b", "a"]}, "prompt 2 repeats prompt 0; remove one of them"),
        ({"prompts": [], "per_task": 0}, "give a prompt, or set samples: null"),
        ({"max_new_tokens": 0}, "evaluation.samples.max_new_tokens"),
        ({"prompt": ["a"]}, "prompts"),
    ],
)
def test_what_cannot_be_asked_is_refused(raw, samples, expected):
    with pytest.raises(ConfigError) as refused:
        parse_config(raw | {"evaluation": {"samples": samples}})
    assert expected in str(refused.value)


def test_a_row_stays_the_same_one_when_more_rows_are_asked(raw):
    for task in ("head", "words", "write", "choose", "read"):
        assert keys(changed(raw, per_task=4), task)[:2] == keys(raw, task)
        assert len(set(keys(changed(raw, per_task=4), task))) == 4
    assert len(keys(changed(raw, per_task=99), "read")) == 6  # the test split has no more
    other = raw | {"evaluation": raw["evaluation"] | {"seed": 7}}
    assert keys(other, "words") != keys(raw, "words")


def test_rows_without_a_text_are_not_asked(raw, tmp_path):
    write_jsonl(tmp_path / "rows" / "test.jsonl", [{"text": " ", "label": 0}] * 20 + [{"text": STORY, "label": 1}])
    config = parse_config(changed(raw, per_task=3))
    assert [question.row for question in questions_of(config) if question.task == "read"] == [20]


def test_a_longer_answer_is_asked_again_only_where_it_can_be_longer(raw):
    longer = changed(raw, max_new_tokens=9)
    tasks = (None, "head", "words", "write", "choose", "read")
    assert [task for task in tasks if keys(longer, task) == keys(raw, task)] == ["head", "write"]


def test_changed_test_rows_and_prompts_are_asked_again(raw, tmp_path):
    before = questions_of(parse_config(raw))
    tasks = [task | ({"prompt": "{text}?"} if task["name"] == "words" else {}) for task in raw["tasks"]]
    after = questions_of(parse_config(raw | {"tasks": tasks}))
    assert {q.task for q, other in zip(before, after, strict=True) if q.key != other.key} == {"words"}
    write_jsonl(tmp_path / "rows" / "test.jsonl", [{"text": f"{STORY} {n}", "label": n % 2} for n in range(6)])
    again = questions_of(parse_config(raw))
    assert [q.key == other.key for q, other in zip(before, again, strict=True)] == [True] * 2 + [False] * 10


def test_questions_and_references_are_what_a_person_would_write(raw):
    config = parse_config(raw)
    rows = load_split(config.tasks[0], "test")
    asked = {q.task: (q, rows[q.row]) for q in questions_of(config) if q.task}
    for task, question, reference in (
        ("head", "{text}", "{name}"),
        ("words", "{text}\nlabel:", "{name}"),
        ("write", "{text}:", "it is {label}"),
        ("choose", "{text}:", "{choice}"),
    ):
        found, row = asked[task]
        fields = row | {"name": ("bad", "good")[row["label"]], "choice": ("a joke", "a story")[row["label"]]}
        assert (found.prompt, found.reference) == (question.format(**fields), reference.format(**fields))
    found, row = asked["read"]
    assert f"{found.prompt} {found.reference}" == row["text"]
    assert len(row["text"]) / 3 < len(found.prompt) <= len(row["text"]) / 2 + 1


@pytest.mark.parametrize("text", ["a", "one word", "x" * 999, "def f(x):\n    return x\n" * 40, "词" * 500])
def test_a_document_is_cut_once_whatever_it_looks_like(raw, text):
    task = parse_config(raw).task("read")
    begin, rest = kind_of(task).question(task, {"text": text}), kind_of(task).reference(task, {"text": text})
    assert begin
    assert text.startswith(begin)
    assert rest.removesuffix("…") in text[len(begin) :]
    assert len(begin) <= 160
    assert len(rest) <= 401


def test_a_chat_is_shown_without_the_words_of_its_template(raw):
    turns = [("system", "be good"), ("user", "the film"), ("assistant", "warm")]
    messages = [{"role": role, "content": content} for role, content in turns]
    task = raw["tasks"][2] | {"prompt": None, "completion": None, "messages": "messages"}
    task = parse_config(raw | {"tasks": [task]}).tasks[0]
    kind = kind_of(task)
    assert kind.question(task, {"messages": messages}) == "system: be good\nuser: the film"
    assert kind.question(task, {"messages": messages[1:]}) == "the film"
    assert kind.reference(task, {"messages": messages}) == "warm"


# -- answers


def test_a_general_prompt_goes_through_the_chat_template_where_there_is_one(raw, model, tokenizer, monkeypatch):
    prompts = raw["evaluation"]["samples"]["prompts"]
    plain = [s.answer for s in answers(raw, model, tokenizer)[None]]
    stops = {tokenizer.eos_token_id}
    assert plain == [plainly(model, tokenizer, tokenizer(p)["input_ids"], LONGEST, stops) for p in prompts]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    chatted = [s.answer for s in answers(raw, model, tokenizer)[None]]
    for prompt, found in zip(prompts, chatted, strict=True):
        text = f"<s>user\n{prompt}</s><s>assistant\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == plainly(model, tokenizer, ids, LONGEST, stops)
    assert chatted != plain


def test_answers_to_rows_are_those_that_the_evaluation_scores(raw, model, tokenizer):
    found, config = answers(raw, model, tokenizer), parse_config(raw)
    for name, shown in (("head", ["bad", "good"]), ("words", ["bad", "good"]), ("choose", ["a joke", "a story"])):
        _, outcomes = evaluate(model, evaluation_set(config.task(name), tokenizer, config, 64), ALONE, 99, "task", "k")
        assert [s.answer for s in found[name]] == [shown[outcomes[s.row]["prediction"]] for s in found[name]]
    _, outcomes = evaluate(model, evaluation_set(config.task("write"), tokenizer, config, 64), ALONE, 99, "task", "k")
    assert [s.answer for s in found["write"]] == [outcomes[s.row]["prediction"] for s in found["write"]]
    assert [s.reference for s in found["write"]] == [outcomes[s.row]["reference"] for s in found["write"]]


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_what_the_model_would_write_is_that_of_plain_decoding_in_any_batch(raw, model, tokenizer, batch_tokens):
    found = answers(raw, model, tokenizer, batch_tokens)
    for name in ("words", "choose", "read"):
        for sample in found[name]:
            ids = tokenizer(sample.prompt)["input_ids"][-40:]  # training.max_length: the end of a prompt is kept
            written = plainly(model, tokenizer, ids, LONGEST, {tokenizer.eos_token_id})
            assert written == (sample.answer if name == "read" else sample.generated)
    assert {s.generated for name in (None, "head", "write", "read") for s in found[name]} == {None}


def test_answering_changes_neither_weights_nor_random_numbers_nor_mode(raw, model, tokenizer):
    heads.attach_heads(model, {"head": 2}, seed=0)
    config = parse_config(raw)
    parts = parts_of(questions_of(config), tokenizer, config, CONTEXT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    answer(model, questions_of(config), parts, ALONE, 8192)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- the plan


def test_a_step_is_asked_what_it_has_not_answered_and_no_untrained_head(raw):
    config = parse_config(raw)
    plan, run = make_plan(config), RunDirectory(config.run_uri)
    by_key = {question.key: question for question in plan.questions}
    tasks = {directory: [by_key[key].task for key in asked] for directory, asked in plan.asked.items()}
    everything = [None, None, *(name for task in config.tasks for name in (task.name, task.name))]
    assert tasks[plan.base_directory] == [task for task in everything if task != "head"]
    assert all(tasks[step.directory] == everything for step in plan.steps)
    step = plan.steps[0]
    given = tuple(Sample.of(question, "a") for question in plan.questions[:-2])
    run.write_json(f"{step.directory}/metrics.json", step_record(step.fingerprint, step.tasks, samples=given))
    assert plan.unanswered(run)[step.directory] == [question.key for question in plan.questions[-2:]]
    assert plan.lacks_scores(run)


def test_without_samples_nothing_is_unanswered_and_records_are_as_before(raw):
    config = parse_config(raw | {"evaluation": {}})
    plan = make_plan(config)
    assert plan.unanswered(RunDirectory(config.run_uri)) == {}
    assert "samples" not in step_record("f", ("a",)).to_json()
    assert plan.cell_keys == make_plan(parse_config(raw)).cell_keys


def test_an_assignment_carries_its_questions_through_json(raw):
    plan = make_plan(parse_config(raw))
    wanted = {"steps/1": [plan.questions[3].key, plan.questions[0].key]}
    sent = Assignment("run", {}, plan.steps, "base", "b", {}, {}, questions=plan.questions, unanswered=wanted)
    read = Assignment.from_json(json.loads(json.dumps(sent.to_json())))
    assert replace(read, rungs=()) == sent
    assert read.questions_for("steps/1") == [plan.questions[0], plan.questions[3]]
    assert read.questions_for("steps/2") == []


# -- before a run


def test_what_does_not_fit_the_context_is_refused_before_a_run(raw):
    def problems(**samples) -> list[str]:
        return [str(problem) for problem in check_data(parse_config(changed(raw, **samples)))]

    assert problems() == []
    found = problems(prompts=["a film", STORY * 3], max_new_tokens=10)
    assert len(found) == 1
    assert found[0].startswith("evaluation.samples.prompts.1: 'the film is")
    assert "tokens and its answer up to 10, but the model's context holds 64; shorten it" in found[0]
    assert problems(max_new_tokens=64)[0].startswith(
        "evaluation.samples.max_new_tokens: 64 leaves no room in the model's context of 64 tokens; lower it"
    )
