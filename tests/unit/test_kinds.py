"""Every kind of task: what is learned, what is scored, and that neither padding nor truncation changes it."""

import json
import types

import numpy as np
import pytest
import torch

from pipelines.config.loading import parse_config
from pipelines.data.encoding import IGNORE, Encoded, Encoder, pack
from pipelines.data.kinds import kind_of
from pipelines.data.kinds.base import EvaluationSet, Scored
from pipelines.data.kinds.multiple_choice import right_choice
from pipelines.data.sets import evaluation_set, training_examples
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.evaluation.batching import make_question_batches
from pipelines.evaluation.evaluate import evaluate, score, score_part
from pipelines.evaluation.scorers import greedy, sequence_nll
from pipelines.metrics import answers as metrics
from pipelines.models.padding import pad
from tests.conftest import WORDS, minimal, write_jsonl

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def config_of(tmp_path):
    """A configuration of one task over given rows, the same for train and test."""

    def make(rows: list[dict], **task):
        folder = tmp_path / f"data-{abs(hash(json.dumps(rows)))}"
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            write_jsonl(folder / f"{split}.jsonl", rows)
        raw = minimal(tmp_path, folder, training={"max_length": task.pop("max_length", 60)})
        raw["tasks"] = [{"name": "task", "data": str(folder)} | task]
        return parse_config(raw)

    return make


def sets(config, tokenizer, context=64):
    task = config.tasks[0]
    examples = training_examples(task, tokenizer, config.training.max_length, None, seed=0)
    return examples, evaluation_set(task, tokenizer, config, context)


QUESTIONS = [
    {"question": "the plot is", "answer": "dull", "wrong": "warm and bright", "endings": ["dull", "warm and bright"]},
    {"question": "a good actor was", "answer": "slow", "wrong": "bad", "endings": ["bad", "slow"]},
]
GENERATION = {"kind": "generation", "prompt": "Q: {question}\nA:", "completion": "{answer}", "max_new_tokens": 4}


# -- generation


def test_only_the_completion_and_its_end_are_learned(config_of, tokenizer):
    examples, _ = sets(config_of(QUESTIONS, **GENERATION), tokenizer)
    for example, row in zip(examples, QUESTIONS, strict=True):
        learned = [label for label in example.labels if label != IGNORE]
        assert tokenizer.decode(learned) == f" {row['answer']}</s>"
        assert tokenizer.decode(example.input_ids) == f"Q: {row['question']}\nA: {row['answer']}</s>"


@pytest.mark.parametrize(("learn", "learned"), [("all", "good</s>dull</s>"), ("last", "dull</s>")])
def test_chat_is_put_into_words_by_the_tokenizers_template(config_of, tokenizer, monkeypatch, learn, learned):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    turns = [("user", "the film"), ("assistant", "good"), ("user", "the plot"), ("assistant", "dull")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    task = {"kind": "generation", "messages": "messages", "learn": learn, "max_new_tokens": 4}
    examples, evaluation = sets(config_of(rows, **task), tokenizer)
    whole = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert tokenizer.decode(examples[0].input_ids) == whole
    assert tokenizer.decode([label for label in examples[0].labels if label != IGNORE]) == learned
    assert tokenizer.decode(evaluation.items[0].input_ids) == whole.removesuffix("dull</s>")
    assert evaluation.references == ("dull",)
    assert tokenizer.eos_token_id in evaluation.stops


def test_prompt_and_completion_are_a_chat_where_asked(config_of, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    task = GENERATION | {"prompt": "{question}", "chat": True}
    examples, evaluation = sets(config_of(QUESTIONS, **task), tokenizer)
    assert tokenizer.decode(examples[0].input_ids) == "<s>user\nthe plot is</s><s>assistant\ndull</s>"
    assert tokenizer.decode([label for label in examples[0].labels if label != IGNORE]) == "dull</s>"
    assert tokenizer.decode(evaluation.items[0].input_ids) == "<s>user\nthe plot is</s><s>assistant\n"
    assert evaluation.references == ("dull", "slow")
    assert tokenizer.eos_token_id in evaluation.stops


def test_a_chat_needs_a_template(config_of, tokenizer):
    task = config_of(QUESTIONS, **GENERATION, chat=True).tasks[0]
    (problem,) = kind_of(task).task_problems(task, Encoder(tokenizer, 60))
    assert problem.startswith("chat: true needs a chat template")


def test_a_field_with_a_chat_is_not_made_one_again(config_of):
    with pytest.raises(ConfigError, match="messages are a chat already; remove chat"):
        config_of(QUESTIONS, kind="generation", messages="messages", chat=True)


def test_a_task_without_chat_has_the_identity_that_it_had_before_there_was_one(config_of):
    plain, chat = (config_of(QUESTIONS, **GENERATION, chat=chat).tasks[0] for chat in (False, True))
    assert "chat" not in plain.training_identity() | plain.scoring_identity()
    assert chat.training_identity()["chat"] and chat.scoring_identity()["chat"]


@pytest.mark.parametrize("max_length", [8, 12])
def test_truncation_leaves_both_prompt_and_completion(config_of, tokenizer, max_length):
    rows = [{"question": " ".join(WORDS), "answer": " ".join(reversed(WORDS))}]
    examples, evaluation = sets(config_of(rows, max_length=max_length, **GENERATION), tokenizer, context=16)
    learned = [label for label in examples[0].labels if label != IGNORE]
    assert len(examples[0].input_ids) == max_length
    assert len(learned) == max_length // 2
    assert tokenizer.decode(examples[0].input_ids[: -len(learned)]).endswith("A:")
    assert len(evaluation.items[0].input_ids) <= 16 - 4  # what it writes fits the context too
    assert tokenizer.decode(evaluation.items[0].input_ids).endswith("A:")


def plain_greedy(model, prompt: list[int], limit: int, stop: int) -> list[int]:
    """One prompt, without cache and without padding."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_decoding_is_that_of_one_prompt_at_a_time(model, tokenizer):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, len(tokenizer), size=n).tolist() for n in (1, 7, 3, 12)]
    stop = plain_greedy(model, prompts[1], 8, -1)[3]  # so that one of them ends early
    with torch.no_grad():
        written = greedy(model, pad(prompts, CPU, "left"), 8, [stop], ALONE)
    assert written == [plain_greedy(model, prompt, 8, stop) for prompt in prompts]
    assert len(written[1]) <= 3


def test_generation_records_every_metric_and_each_answer(config_of, tokenizer, model):
    _, evaluation = sets(config_of(QUESTIONS, **GENERATION), tokenizer)
    cell, outcomes = evaluate(model, evaluation, ALONE, 100, "task", "k")
    assert set(cell.extras) == {"rouge_l", "token_f1", "exact_match"}
    assert cell.value == cell.extras["rouge_l"] == np.mean([o["score"] for o in outcomes])
    assert [o["reference"] for o in outcomes] == ["dull", "slow"]
    assert [o["id"] for o in outcomes] == [0, 1]


def test_a_right_answer_scores_one(config_of, tokenizer):
    _, evaluation = sets(config_of(QUESTIONS, **GENERATION), tokenizer)
    kind = kind_of(types.SimpleNamespace(kind="generation"))
    answers = [tuple(tokenizer(f" {row['answer']}")["input_ids"]) for row in QUESTIONS]
    outcomes = kind.outcomes(evaluation, [Scored(i, -1, output=ids) for i, ids in enumerate(answers)])
    assert all(o["correct"] and o["score"] == 1.0 for o in outcomes)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1", "rouge"),
    [
        ("The Film!", "film", 1.0, 1.0, 2 / 3),
        ("good film", "bad film", 0.0, 0.5, 0.5),
        ("", "film", 0.0, 0.0, 0.0),
        ("good old film", "old good film", 0.0, 1.0, 2 / 3),
    ],
)
def test_generation_metrics_against_their_definitions(prediction, reference, exact, f1, rouge):
    assert metrics.exact_match(prediction, reference) == exact
    assert metrics.token_f1(prediction, reference) == pytest.approx(f1)
    assert metrics.rouge_l(prediction, reference) == pytest.approx(rouge)


# -- multiple choice


@pytest.mark.parametrize("choices", ["endings", ["{answer}", "{wrong}"]])
def test_multiple_choice_picks_the_likeliest_continuation(config_of, tokenizer, model, choices):
    rows = [row | {"label": i if choices == "endings" else 0} for i, row in enumerate(QUESTIONS)]
    config = config_of(rows, kind="multiple-choice", prompt="{question}", choices=choices)
    examples, evaluation = sets(config, tokenizer)
    assert [tokenizer.decode([t for t in e.labels if t != IGNORE]) for e in examples] == [" dull", " slow"]
    cell, outcomes = evaluate(model, evaluation, ALONE, 1000, "task", "k")
    for row, outcome in zip(rows, outcomes, strict=True):
        texts = row["endings"] if choices == "endings" else [row["answer"], row["wrong"]]
        likelihoods = [plain_likelihood(model, tokenizer, row["question"], f" {text}") for text in texts]
        assert outcome["prediction"] == int(np.argmax(likelihoods))
    assert cell.majority is not None
    assert cell.value == np.mean([o["correct"] for o in outcomes])


def plain_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    start = tokenizer(prompt)["input_ids"]
    ids = start + tokenizer(answer)["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[p - 1, ids[p]].item() for p in range(len(start), len(ids)))


def test_normalisation_divides_by_length(config_of, tokenizer, model):
    chosen = {}
    for how in ("none", "tokens", "characters"):
        rows = [{"question": "the plot is", "endings": ["a", "warm and bright and good"], "label": 0}]
        config = config_of(rows, kind="multiple-choice", prompt="{question}", choices="endings", normalization=how)
        _, evaluation = sets(config, tokenizer)
        chosen[how] = evaluate(model, evaluation, ALONE, 1000, "task", "k")[1][0]["prediction"]
    assert chosen["none"] == 0  # an untrained model finds every token equally unlikely: the short one wins
    assert chosen["characters"] == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (2, 2), (3, None), ("1", 1), ("B", 1), ("c", 2), ("blue", 2), ("", None), (None, None), (-1, None)],
)
def test_the_right_choice_by_index_letter_or_text(value, expected):
    assert right_choice(value, ["red", "green", "blue"]) == expected


# -- text


def test_packed_documents_do_not_see_each_other(model, tokenizer):
    from curlora.continual import Example
    from pipelines.training.batches import collate
    from pipelines.training.example_losses import example_losses

    rng = np.random.default_rng(0)
    first, second = (tuple(rng.integers(3, len(tokenizer), size=n).tolist()) for n in (6, 5))
    packed = Example("t", first + second, (*first, IGNORE, *second[1:]), breaks=(6,))
    other = Example("t", (9,) * 6 + second, (*[IGNORE] * 7, *second[1:]), breaks=(6,))
    alone = Example("t", second, second)
    long = Example("t", tuple(range(3, 20)), tuple(range(3, 20)))  # so that the others are padded

    def losses(*examples) -> list[float]:
        with torch.no_grad():
            return example_losses(model, collate(list(examples), ALONE))[0].tolist()

    assert losses(other, long)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    expected = (5 * losses(Example("t", first, first))[0] + 4 * losses(alone)[0]) / 9
    assert losses(packed, long)[0] == pytest.approx(expected, rel=1e-5)
    joined = Example("t", first + second, packed.labels)
    assert losses(joined)[0] != pytest.approx(expected, rel=1e-4)


def test_pack_fills_blocks_and_keeps_every_token():
    documents = [list(range(n)) for n in (3, 9, 1, 4, 2)]
    blocks = list(pack(documents, 8))
    assert [len(ids) for ids, _ in blocks] == [8, 8, 3]
    assert [t for ids, _ in blocks for t in ids] == [t for document in documents for t in document]
    starts = {8 * number + position for number, (_, breaks) in enumerate(blocks) for position in breaks}
    assert starts == {3, 12, 13, 17}


def test_separate_documents_are_scored_each_from_its_own_start(config_of, tokenizer, model):
    rows = [{"text": "the film was good and the plot was dull"}, {"text": "a story"}, {"text": ""}]
    _, evaluation = sets(config_of(rows, kind="language-modeling", max_length=8), tokenizer)
    cell, outcomes = evaluate(model, evaluation, ALONE, 100, "task", "k")
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows]
    assert [(o["id"], o["tokens"]) for o in outcomes] == [(0, lengths[0]), (1, lengths[1])]
    ids = [*tokenizer("a story")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert outcomes[1]["nll"] == pytest.approx(
        -sum(scores[i - 1, ids[i]].item() for i in range(1, len(ids))), rel=1e-5
    )
    assert cell.tokens == sum(lengths)
    assert not cell.higher_is_better


# -- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_likelihood(model, tokenizer, side):
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, len(tokenizer), size=n) for n in (4, 11, 7)]
    starts = [2, 5, 1]
    with torch.no_grad():
        together = sequence_nll(model, pad(ids, CPU, side), starts)
        alone = [sequence_nll(model, pad([i], CPU), [s])[0] for i, s in zip(ids, starts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("answers", [(1, 1), (1, 3, 2)])
@pytest.mark.parametrize("lockstep", [False, True])
def test_a_prompt_that_runs_once_for_all_its_answers_changes_no_likelihood(model, tokenizer, answers, lockstep):
    rng = np.random.default_rng(0)
    items = []
    for example, length in enumerate((4, 11, 1, 7)):
        prompt = rng.integers(3, len(tokenizer), size=length)
        for choice, more in enumerate(answers[: 2 + example % 2]):
            ids = np.concatenate([prompt, rng.integers(3, len(tokenizer), size=more)])
            items.append(Encoded(example, ids, start=length, choice=choice))
    evaluation = EvaluationSet("v", "verbalizer", "accuracy", tuple(items), (0,) * 4, tuple(range(4)), ("x", "y"), "d")
    world = World(0, 1, CPU, lockstep=lockstep)
    alone = {(i.example, i.choice): sequence_nll(model, pad([i.input_ids], CPU), [i.start])[0] for i in items}
    for budget in (1, 20, 1000):
        scored = score(model, evaluation, world, budget)
        assert {(s.example, s.choice): s.nll for s in scored} == pytest.approx(alone, rel=1e-5)
        assert {(s.example, s.choice): s.tokens for s in scored} == {k: answers[k[1]] for k in alone}
    batches = make_question_batches(items, 20)
    assert sorted(len({i.example for i in batch}) for batch in batches)[0] >= 1
    assert all(sum(batch[0].example in {i.example for i in other} for other in batches) == 1 for batch in batches)


def tokenizer_with(rule: str, **special):
    """The test tokenizer with a post-processor `rule` over $A and its own special tokens."""
    import tokenizers
    import transformers

    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator([" ".join(WORDS)] * 4, vocab_size=300, special_tokens=["<s>", "</s>"])
    if rule:
        processor = tokenizers.processors.TemplateProcessing(single=rule, special_tokens=[("<s>", 0), ("</s>", 1)])
        raw._tokenizer.post_processor = processor
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, **special)


def test_bos_and_eos_by_the_tokenizers_own_rules(config_of):
    tokenizer = tokenizer_with("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    assert Encoder(tokenizer, 60).prefix == (0,)
    for max_length in (60, 10):
        examples, evaluation = sets(config_of(QUESTIONS, max_length=max_length, **GENERATION), tokenizer)
        for example in examples:
            assert example.input_ids[0] == 0  # bos stays, also where the prompt is cut
            assert list(example.input_ids).count(1) == 1  # eos ends the answer, not the prompt
            assert example.input_ids[-1] == 1 or max_length == 10
        assert all(item.input_ids[0] == 0 and item.input_ids[-1] != 1 for item in evaluation.items)


def test_a_model_without_any_special_token_works(config_of, model, reviews):
    tokenizer = tokenizer_with("")
    assert tokenizer.pad_token is None is tokenizer.eos_token
    rows = [{"text": "the film", "label": 0}, {"text": "", "label": 1}]
    config = config_of(rows, kind="classification", head="verbalizer", prompt="{text}", labels=["bad", "good"])
    _, evaluation = sets(config, tokenizer)
    cell, _ = evaluate(model, evaluation, ALONE, 100, "task", "k")
    assert 0 <= cell.value <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_scores_agree_for_any_number_of_workers_and_batch_size(config_of, tokenizer, model, size):
    rows = [q | {"label": 0, "text": q["question"]} for q in QUESTIONS * 5]
    kinds = (
        GENERATION,
        {"kind": "multiple-choice", "prompt": "{question}", "choices": "endings"},
        {"kind": "language-modeling"},
    )
    for task in kinds:
        _, evaluation = sets(config_of(rows, **task), tokenizer)
        kind = kind_of(types.SimpleNamespace(**task))
        alone, expected = evaluate(model, evaluation, ALONE, 10_000, "task", "k")
        for batch_tokens in (1, 64):
            worlds = [World(rank, size, CPU) for rank in range(size)]
            scored = [entry for world in worlds for entry in score_part(model, evaluation, world, batch_tokens)]
            outcomes = kind.outcomes(evaluation, scored)
            assert kind.summary(evaluation, outcomes).value == pytest.approx(alone.value, abs=1e-5)
            assert [o["id"] for o in outcomes] == [o["id"] for o in expected]


def test_encoded_sequences_come_back_from_the_cache_as_they_went_in(tmp_path):
    from pipelines.data.token_cache import Sequences, _write

    items = [Encoded(i, np.arange(i % 7), start=i % 3, choice=i - 1, breaks=(1, 2)[: i % 3]) for i in range(2500)]
    _write(items, tmp_path / "x.arrow")
    back = Sequences(tmp_path / "x.arrow")
    assert len(back) == 2500
    for wanted, found in zip(items, back, strict=True):
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert (found.example, found.start, found.choice) == (wanted.example, wanted.start, wanted.choice)
        assert found.breaks == wanted.breaks
