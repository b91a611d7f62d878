"""Chats in every form that users bring: the exact tokens with a loss, what is refused and why, and fingerprints."""

import itertools
import json

import pytest

from pipelines.config.loading import parse_config
from pipelines.data.encoding import IGNORE, Encoder
from pipelines.data.identity import data_identity
from pipelines.data.sets import evaluation_set, training_examples
from pipelines.errors import ConfigError
from pipelines.preflight.data import check_data
from tests.conftest import WORDS, minimal, write_jsonl
from tests.unit.chat_rows import CHATML, FORMS, OPENAI, SPECIAL, TOOLS

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
GEMMA = (  # as Gemma is published with
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
TAIL = (
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = HEAD + "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}" + TAIL
MARKED_WITHOUT_END = HEAD + "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}" + TAIL
THINKING = (  # as Qwen3: what was thought is dropped once other turns follow
    HEAD + "{{ ('<think>\n\n</think>\n\n' if loop.last else '') + m.content + '<|im_end|>\n' }}" + TAIL
)
REWRITING = HEAD + "{{ m.content + '<|im_end|>\n' }}" + TAIL.replace("assistant\n", "assistant\n<think>\n")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def make_tokenizer(template: str):
    """A byte-level tokenizer that adds bos by itself, with the special tokens of several families."""
    import tokenizers
    import transformers

    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator([" ".join(WORDS)] * 4, vocab_size=320, special_tokens=["<s>", "</s>", *SPECIAL])
    processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw._tokenizer.post_processor = processor
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL),
        chat_template=template,
    )


@pytest.fixture
def bring(tmp_path):
    """A configuration of one task over given rows, and its tokenizer."""

    def bring(rows: list[dict], template: str = CHATML, max_length: int = 4096, **task):
        folder = tmp_path / f"data-{abs(hash(json.dumps(rows)))}"
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            write_jsonl(folder / f"{split}.jsonl", rows)
        raw = minimal(tmp_path, folder, training={"max_length": max_length})
        raw["tasks"] = [{"name": "task", "kind": "generation", "data": str(folder)} | task]
        return parse_config(raw), make_tokenizer(template)

    return bring


def learn(config, tokenizer) -> list:
    return list(training_examples(config.tasks[0], tokenizer, config.training.max_length, None, seed=0))


def spans(example) -> list[tuple[int, ...]]:
    """Runs of tokens with a loss."""
    runs = itertools.groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORE)
    found = [list(run) for learned, run in runs if learned]
    assert all(token == label for run in found for token, label in run)
    return [tuple(token for token, _ in run) for run in found]


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_answers_and_the_ends_of_their_turns_are_learned(bring, form):
    task, rows, learned = FORMS[form]
    config, tokenizer = bring(rows, **task)
    examples = learn(config, tokenizer)
    assert len(examples) == len(rows) == len(learned) == 10
    for example, texts in zip(examples, learned, strict=True):
        wanted = tokenizer([f"{text}<|im_end|>\n" for text in texts], add_special_tokens=False)["input_ids"]
        assert spans(example) == [tuple(ids) for ids in wanted]
        assert tokenizer.bos_token_id not in example.input_ids  # the template has none, though the tokenizer adds one


@pytest.mark.parametrize("form", ["openai", "tools", "sharegpt", "alpaca"])
def test_what_is_seen_is_what_the_template_writes(bring, form):
    task, rows, _ = FORMS[form]
    config, tokenizer = bring(rows, **task)
    for example, row in zip(learn(config, tokenizer), rows, strict=True):
        if form == "openai":
            whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            assert tokenizer.decode(example.input_ids) == whole
        text = tokenizer.decode(example.input_ids)
        for tool in row.get("tools") or ():
            assert json.dumps(tool) in text
        assert "None" not in text.replace('"None', "").replace("None.", "")


def test_the_prompt_in_training_is_the_prompt_that_is_asked(bring):
    for form in FORMS:
        task, rows, _ = FORMS[form]
        config, tokenizer = bring(rows, **task)
        asked = evaluation_set(config.tasks[0], tokenizer, config, context=8192).items
        for example, item in zip(learn(config, tokenizer), asked, strict=True):
            answer = spans(example)[-1]
            assert tuple(example.input_ids) == (*item.input_ids.tolist(), *answer)


def test_a_called_tool_is_the_reference_in_the_words_of_the_template(bring):
    task, rows, learned = FORMS["tools"]
    config, tokenizer = bring(rows, **task)
    found = evaluation_set(config.tasks[0], tokenizer, config, context=8192)
    assert found.references == tuple(texts[-1] for texts in learned)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in found.stops


@pytest.mark.parametrize(
    ("template", "end", "begun"),
    [
        (GEMMA, "<end_of_turn>\n", True),
        (MISTRAL, "</s>", True),
        (LLAMA, "<|eot_id|>", True),
        (MARKED, "<|im_end|>", False),
    ],
)
def test_every_family_learns_its_end_of_turn_and_has_one_bos_at_most(bring, template, end, begun):
    rows = [row for row in OPENAI if row["messages"][0]["role"] == "user"]
    config, tokenizer = bring(rows, template, messages="messages")
    stops = evaluation_set(config.tasks[0], tokenizer, config, context=8192).stops
    for example, row in zip(learn(config, tokenizer), rows, strict=True):
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        space = " " if template is MISTRAL else ""
        assert [tokenizer.decode(ids) for ids in spans(example)] == [f"{space}{text}{end}" for text in said]
        assert all(stops_at(ids, stops) for ids in spans(example))
        assert list(example.input_ids).count(tokenizer.bos_token_id) == int(begun)
        assert (example.input_ids[0] == tokenizer.bos_token_id) == begun


def stops_at(ids, stops) -> bool:
    """Whether greedy decoding would stop at the end of what is learned, and not before."""
    at = [position for position, token in enumerate(ids) if token in stops]
    return len(at) == 1 and at[0] >= len(ids) - 2


def test_the_end_of_a_turn_is_learned_where_the_template_leaves_it_out_of_its_marks(bring):
    for template in (MARKED, MARKED_WITHOUT_END):
        config, tokenizer = bring(OPENAI, template, messages="messages")
        said = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in OPENAI]
        found = [[tokenizer.decode(ids) for ids in spans(example)] for example in learn(config, tokenizer)]
        assert found == [[f"{text}<|im_end|>" for text in texts] for texts in said]


def test_marks_of_the_last_answer_alone(bring):
    config, tokenizer = bring(OPENAI, MARKED, messages="messages", learn="last")
    for example, row in zip(learn(config, tokenizer), OPENAI, strict=True):
        assert [tokenizer.decode(ids) for ids in spans(example)] == [row["messages"][-1]["content"] + "<|im_end|>"]


def test_a_template_without_an_end_of_turn_gets_the_end_token(bring):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 2
    config, tokenizer = bring(rows, PLAIN, messages="messages")
    assert [tokenizer.decode(ids) for ids in spans(learn(config, tokenizer)[0])] == ["assistant: Hello\n</s>"]


def test_a_prompt_that_begins_with_bos_gets_no_second_one(bring):
    rows = [{"question": "<s>the film", "answer": "good"}, {"question": "the film", "answer": "bad"}]
    config, tokenizer = bring(rows, prompt="{question}", completion="{answer}")
    assert [list(example.input_ids).count(0) for example in learn(config, tokenizer)] == [1, 1]
    assert Encoder(tokenizer, 60).prompts(["", "<s>"]) == [[0], [0]]


# -- too long


@pytest.mark.parametrize("max_length", [16, 24, 40])
def test_a_chat_that_is_too_long_loses_its_beginning(bring, max_length):
    turns = [f"{word} {' '.join(WORDS[:6])}" for word in WORDS[:6]]
    rows = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}] * 2
    (whole, *_), (cut, *_) = (
        learn(*bring(rows, LLAMA, max_length=length, messages="messages")) for length in (4096, max_length)
    )
    assert len(cut.input_ids) == max_length
    kept = max_length - 1  # behind bos, which stays
    if max_length > 24:
        assert cut.input_ids[1:] == whole.input_ids[-kept:]
        assert spans(cut)[-1] == spans(whole)[-1]
        assert set(spans(cut)) <= set(spans(whole))  # no answer is learned in part
    else:
        assert sum(label != IGNORE for label in cut.labels) == max_length // 2


# -- what is refused, and why


@pytest.fixture
def check(bring, tmp_path):
    def check(rows: list[dict], template: str = CHATML, **task) -> tuple[list[str], list[str]]:
        config, tokenizer = bring(rows, template, **task)
        tokenizer.save_pretrained(tmp_path)
        warnings: list[str] = []
        problems = [str(problem) for problem in check_data(config, warnings.append)]
        return problems, [text for text in warnings if "also occur in train" not in text]

    return check


@pytest.mark.parametrize("form", FORMS)
def test_every_form_passes_without_a_word(check, form):
    task, rows, _ = FORMS[form]
    assert check(rows, **task) == ([], [])


def test_a_refused_system_prompt_names_the_remedy_and_the_remedy_works(check, bring):
    problems, _ = check(OPENAI, GEMMA, messages="messages")
    (train, _) = problems
    assert "train.jsonl:3: the chat template refuses this chat (System role not supported); set fold_system" in train
    assert train.endswith("(also rows 8, 10)")  # one line for all of them
    assert check(OPENAI, GEMMA, messages="messages", fold_system=True) == ([], [])
    config, tokenizer = bring(OPENAI, GEMMA, messages="messages", fold_system=True)
    assert "user\nBe brief.\n\nWho are you?<end_of_turn>" in tokenizer.decode(learn(config, tokenizer)[9].input_ids)


def test_a_template_that_says_nothing_of_the_system_prompt_or_the_tools(check):
    silent = LLAMA.replace("messages %}{% if loop.first", "messages if m.role != 'system' %}{% if loop.first")
    (train, _), _ = check(OPENAI, silent, messages="messages")
    assert "jsonl:3: the chat template leaves out the system message; set fold_system: true" in train
    problems, _ = check(TOOLS, LLAMA, messages="messages", tools="tools")
    assert any("the chat template does not show the tools" in problem for problem in problems)
    assert any("the chat template leaves out tool_calls" in problem for problem in problems)
    _, warnings = check(TOOLS, messages="messages")
    assert (
        "task/train: the column 'tools' is not used; set tools: tools to show the model what it may call" in warnings
    )


def test_a_template_that_rewrites_earlier_turns(check, bring):
    rows = [row for row in OPENAI if row["messages"][0]["role"] == "user"]
    (train,), _ = check(rows, THINKING, messages="messages")  # the test split has its last answer alone
    assert "jsonl:2: the chat template writes message 2, an answer, differently once others follow" in train
    assert "set learn: last, or use a base whose template marks answers" in train
    assert check(rows, THINKING, messages="messages", learn="last") == ([], [])
    config, tokenizer = bring(rows, THINKING, messages="messages", learn="last")
    said = "<think>\n\n</think>\n\nTry 'The Dispossessed' by Ursula K. Le Guin.<|im_end|>\n"
    assert [tokenizer.decode(ids) for ids in spans(learn(config, tokenizer)[1])] == [said]
    problems, _ = check(rows, REWRITING, messages="messages", learn="last")
    assert "the chat template writes what precedes the answer differently once the answer is there" in problems[0]
    assert len(problems) == 2  # train and test, each with one line for all rows


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ({}, {"role": "assistant", "content": None}, "message 2 is {'role': 'assistant', 'content': None}, expected"),
        ({}, {"role": "assistant", "content": None, "tool_calls": []}, "expected {role, content} with text"),
        ({}, {"role": "assistant", "tool_calls": [{"type": "function"}]}, "expected {name, arguments}"),
        ({}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "expected {name, arguments}"),
        ({}, {"role": "developer", "content": "b"}, "has the role 'developer', use one of: system, user"),
        ({"format": "sharegpt"}, {"from": "bard", "value": "b"}, "message 2 is from 'bard', use one of: system"),
        ({"format": "sharegpt"}, {"from": "gpt", "value": None}, "expected {from, value} with text"),
        ({"format": "sharegpt"}, {"from": "gpt", "value": " "}, "'conversations, message 2' is empty text"),
        ({"format": "sharegpt"}, {"from": "function_call", "value": "get()"}, "expected {name, arguments}"),
    ],
)
def test_bad_messages_come_as_one_line(check, task, row, expected):
    sharegpt = task.get("format") == "sharegpt"
    column = "conversations" if sharegpt else "messages"
    user = {"from": "human", "value": "a"} if sharegpt else {"role": "user", "content": "a"}
    good = {"from": "gpt", "value": "b"} if sharegpt else {"role": "assistant", "content": "b"}
    rows = [{column: [user, good]}, {column: [user, row]}, {column: [user, good]}, {column: [user, row]}]
    (train, test), _ = check(rows, **(task or {"messages": "messages"}))
    assert "train.jsonl:2:" in train and expected in train and train.endswith("(also row 4)")
    assert "test.jsonl:2:" in test


@pytest.mark.parametrize("tools", ["no JSON", '{"name": "f"}', [{"type": "function"}], 3])
def test_bad_tools_come_as_one_line(check, tools):
    rows = [{**OPENAI[0], "tools": tools}] * 2
    problems, _ = check(rows, messages="messages", tools="tools")
    assert len(problems) == 2 and "'tools'" in problems[0] and "expected a" in problems[0]


def test_alpaca_without_an_answer(check):
    rows = [{"instruction": "Add.", "input": None, "output": ""}, {"instruction": "", "input": "", "output": "3"}]
    (first, second, *_), _ = check(rows, format="alpaca")
    assert "train.jsonl:1: 'output' is empty text" in first
    assert "train.jsonl:2: 'instruction' is empty text" in second


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"format": "alpaca", "messages": "m"}, "format: alpaca is a chat of instruction, input, output; remove"),
        ({"format": "sharegpt", "prompt": "{a}"}, "give either prompt and completion, or messages"),
        ({"prompt": "{a}", "completion": "{b}", "learn": "last"}, "learn belongs to messages"),
        ({"format": "alpaca", "fold_system": True}, "fold_system belongs to messages"),
        ({"prompt": "{a}", "completion": "{b}", "tools": "t"}, "tools are shown by the chat template; add chat: true"),
    ],
)
def test_settings_that_contradict_each_other(bring, task, message):
    with pytest.raises(ConfigError, match=message):
        bring(OPENAI, **task)


# -- fingerprints


def identity(config, tokenizer) -> dict:
    return data_identity(config.tasks[0], tokenizer)


BEFORE = {"name", "splits", "kind", "prompt", "completion", "messages", "digest", "classes"}  # before these settings


def test_the_identity_changes_only_where_the_learned_tokens_do(bring):
    single, several = [row for row in OPENAI if len(row["messages"]) == 2], OPENAI
    assert identity(*bring(single, messages="messages")).keys() == BEFORE
    assert identity(*bring(several, messages="messages", learn="last")).keys() == BEFORE
    learned = [
        [example.labels for example in learn(*bring(single, messages="messages", learn=how))]
        for how in ("all", "last")
    ]
    assert learned[0] == learned[1]
    assert identity(*bring(several, messages="messages")) == {
        **identity(*bring(several, messages="messages", learn="last")),
        "learn": "all",
    }


def test_templates_that_say_themselves_what_is_learned_have_another_identity(bring):
    single = OPENAI[:1]
    assert identity(*bring(single * 2, MARKED, messages="messages"))["answers"] == "marked"
    assert identity(*bring(single * 2, PLAIN, messages="messages"))["turn_end"] == "added"
    config, tokenizer = bring(single * 2, MARKED, prompt="a", completion="b")
    assert identity(config, tokenizer).keys() == BEFORE  # no chat, no template


def test_scores_do_not_depend_on_what_is_learned(bring):
    (first, _), (second, _) = (bring(OPENAI, messages="messages", learn=how) for how in ("all", "last"))
    assert first.tasks[0].scoring_identity() == second.tasks[0].scoring_identity()
    old = {"name", "splits", "kind", "prompt", "completion", "messages", "max_new_tokens", "metric"}
    assert first.tasks[0].scoring_identity().keys() == old
