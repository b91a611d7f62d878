"""Rows in, tokens out: digests, labels, truncation, windows, and what is refused at the door."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.config.loading import parse_config
from pipelines.data import token_cache
from pipelines.data.encoding import IGNORE, windows
from pipelines.data.kinds.classification import label_set
from pipelines.data.sets import evaluation_set, subset_indices, training_examples
from pipelines.data.sources import digest, load_split
from pipelines.metrics.answers import majority_rate
from pipelines.preflight.data import check_data
from tests.conftest import minimal, write_jsonl


def config_of(tmp_path, data, **task):
    raw = minimal(tmp_path, data)
    raw["tasks"][0] |= task
    return parse_config(raw)


@given(st.integers(2, 200), st.integers(2, 40), st.integers(1, 40))
@example(length=9, window=4, stride=4)
def test_windows_score_every_token_but_the_first_once(length, window, stride):
    stride = min(stride, window)  # a stride of a whole window leaves no context, yet one token is seen
    stream = np.arange(length)
    scored = [token for item in windows([stream], window, stride) for token in item.input_ids[item.start :]]
    assert scored == list(range(1, length))
    assert all(len(item.input_ids) <= window for item in windows([stream], window, stride))
    assert all(item.start >= 1 for item in windows([stream], window, stride))


def test_digest_sees_content_and_order(tmp_path, reviews):
    task = config_of(tmp_path, reviews).tasks[0]
    rows = load_split(task, "train")
    assert digest(rows) == digest(rows.select(range(len(rows))))
    assert digest(rows) != digest(rows.select(range(len(rows) - 1, -1, -1)))
    assert digest(rows) != digest(rows.select(range(len(rows) - 1)))


def test_classifier_examples_carry_their_class_and_fit(tmp_path, reviews, tokenizer):
    task = config_of(tmp_path, reviews).tasks[0]
    examples = training_examples(task, tokenizer, 8, None, seed=0)
    assert len(examples) == 24
    assert max(len(e.input_ids) for e in examples) <= 8
    assert [e.target for e in examples] == [i % 2 for i in range(24)]
    assert len(training_examples(task, tokenizer, 8, 10, seed=0)) == 10


def test_verbalizer_truncation_keeps_the_question_and_the_label_text(tmp_path, reviews, tokenizer):
    task = config_of(tmp_path, reviews, head="verbalizer", prompt="{sentence}\nlabel:").tasks[0]
    full = training_examples(task, tokenizer, 60, None, seed=0)[1]
    cut = training_examples(task, tokenizer, 30, None, seed=0)[1]
    answer = tuple(t for t in full.labels if t != IGNORE)
    assert tokenizer.decode(answer) == " positive"
    assert cut.input_ids == full.input_ids[-30:]
    assert cut.input_ids[-len(answer) :] == answer
    assert tuple(t for t in cut.labels if t != IGNORE) == answer


def test_verbalizer_evaluation_has_one_sequence_a_label(tmp_path, reviews, tokenizer):
    config = config_of(tmp_path, reviews, head="verbalizer", prompt="{sentence}\nlabel:", verbalizer=["bad", "good"])
    encoded = evaluation_set(config.tasks[0], tokenizer, config, context=64)
    assert len(encoded.items) == 20
    texts = {item.choice: tokenizer.decode(item.input_ids[item.start :]) for item in encoded.items[:2]}
    assert texts == {0: " bad", 1: " good"}


def test_text_is_packed_with_ends_between_documents(tmp_path, tokenizer):
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": "the film"}, {"text": "a story is good"}])
    raw = minimal(tmp_path, folder)
    for documents in ("separate", "joined"):
        raw["tasks"] = [{"name": "t", "kind": "language-modeling", "data": str(folder), "documents": documents}]
        examples = training_examples(parse_config(raw).tasks[0], tokenizer, 9, None, seed=0)
        tokens = [t for e in examples for t in e.input_ids]
        assert tokenizer.decode(tokens) == "the film</s>a story is good</s>"
        assert [len(e.input_ids) for e in examples[:-1]] == [9] * (len(examples) - 1)
        second = len(tokenizer("the film</s>")["input_ids"])  # where the second document begins
        unlearned = {i for i, label in enumerate(t for e in examples for t in e.labels) if label == IGNORE}
        assert unlearned == ({second} if documents == "separate" else set())


def test_labels_by_name_by_mapping_and_by_occurrence(tmp_path, reviews):
    assert label_set(config_of(tmp_path, reviews).tasks[0]).index["positive"] == 1
    mapped = config_of(tmp_path, reviews, labels={4: "positive", 0: "negative"}).tasks[0]
    assert label_set(mapped).names == ("positive", "negative")
    assert [label_set(mapped).of(value) for value in (4, 0, "4", 1, None)] == [0, 1, 0, None, None]
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", [{"sentence": "x", "label": v} for v in ("spam", "ham", "spam")])
    assert label_set(config_of(tmp_path, other).tasks[0]).names == ("ham", "spam")


def problems(tmp_path, data, **task) -> str:
    return "\n".join(map(str, check_data(config_of(tmp_path, data, **task))))


def test_missing_folder_and_missing_split(tmp_path, reviews):
    assert "no such file" in problems(tmp_path, "./nowhere")
    (reviews / "test.jsonl").unlink()
    found = problems(tmp_path, reviews)
    assert "test.jsonl: no such file; the folder holds: labels.json, train.jsonl" in found


def test_empty_split(tmp_path, reviews):
    (reviews / "test.jsonl").write_text("")
    assert "the split is empty" in problems(tmp_path, reviews)


def test_label_outside_the_label_set_names_row_and_value(tmp_path, reviews):
    write_jsonl(reviews / "test.jsonl", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 7}])
    found = problems(tmp_path, reviews)
    assert f"tasks.0.data: {reviews}/test.jsonl:2: label 7 is outside the label set" in found


def test_missing_column_names_the_nearest(tmp_path, reviews):
    assert "has no column 'sentense', did you mean 'sentence'?" in problems(tmp_path, reviews, text="sentense")


def test_broken_line_is_named(tmp_path, reviews):
    with (reviews / "train.jsonl").open("a") as file:
        file.write('{"sentence": "cut of')
    assert "train.jsonl:25: not valid JSON" in problems(tmp_path, reviews)


def test_missing_text_names_the_row(tmp_path, reviews):
    write_jsonl(reviews / "test.jsonl", [{"sentence": "a", "label": 0}, {"sentence": None, "label": 1}])
    assert "test.jsonl:2: 'sentence' is missing" in problems(tmp_path, reviews)


def test_good_data_has_no_problem(tmp_path, reviews):
    assert problems(tmp_path, reviews) == ""


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_subset_is_seeded_and_without_repetition(count, at_most, seed):
    chosen = subset_indices(count, at_most, seed)
    assert len(set(chosen)) == len(chosen) == min(count, at_most)
    assert (chosen == subset_indices(count, at_most, seed)).all()


def test_majority_rate():
    assert majority_rate([0, 1, 1, 2]) == 0.5
    assert majority_rate([]) is None


def test_one_file_gives_disjoint_train_and_test(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"sentence": f"s{i}", "label": i % 2}) + "\n" for i in range(50)))
    task = config_of(tmp_path, file).tasks[0]
    train, test = (set(load_split(task, split)["sentence"]) for split in ("train", "test"))
    assert len(test) == 5
    assert not train & test


@pytest.fixture
def counted(monkeypatch):
    """How often sequences were really made."""
    made = []
    write = token_cache._write
    monkeypatch.setattr(token_cache, "_write", lambda sequences, path: (made.append(path), write(sequences, path))[1])
    return made


def test_tokens_are_made_once_for_the_same_content(tmp_path, reviews, tokenizer, counted, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE", str(tmp_path / "cache"))
    task = config_of(tmp_path, reviews).tasks[0]
    first = training_examples(task, tokenizer, 16, None, seed=0)
    moved = tmp_path / "moved"
    reviews.rename(moved)
    again = training_examples(config_of(tmp_path, moved).tasks[0], tokenizer, 16, None, seed=3)
    assert list(again) == list(first)
    assert len(counted) == 1
    training_examples(config_of(tmp_path, moved).tasks[0], tokenizer, 17, None, seed=0)
    training_examples(config_of(tmp_path, moved).tasks[0], tokenizer, 16, 5, seed=0)
    write_jsonl(moved / "train.jsonl", [{"sentence": "other", "label": i % 2} for i in range(24)])
    changed = training_examples(config_of(tmp_path, moved).tasks[0], tokenizer, 16, None, seed=0)
    assert len(counted) == 4
    assert list(changed) != list(first)


def test_a_process_that_dies_while_it_makes_tokens_leaves_nothing_half(tmp_path, reviews, tokenizer, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE", str(tmp_path / "cache"))
    task = config_of(tmp_path, reviews).tasks[0]

    def dies(sequences, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            training_examples(task, tokenizer, 16, None, seed=0)
    assert len(training_examples(task, tokenizer, 16, None, seed=0)) == 24
    assert not list((tmp_path / "cache" / "tokens").glob("*.tmp"))


def test_examples_of_several_tasks_are_one_sequence(tmp_path, reviews, tokenizer):
    one = config_of(tmp_path, reviews).tasks[0]
    other = config_of(tmp_path, reviews, name="other", head="verbalizer", prompt="{sentence}:").tasks[0]
    both = training_examples([one, other], tokenizer, 16, None, seed=0)
    assert len(both) == 48
    assert [e.task for e in both] == ["reviews"] * 24 + ["other"] * 24
    assert both[-1] == both[47]
    assert both[22:26] == [both[i] for i in range(22, 26)]
    with pytest.raises(IndexError):
        both[48]
