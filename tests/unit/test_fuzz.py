"""Whatever is given from outside ends in a result or in one line of ours: requests and configurations.
`CURLORA_FUZZ=20000` runs the long form, with about so many inputs per target."""

import json

import pytest
import yaml
from hypothesis import strategies as st

from pipelines.config.loading import load_config
from pipelines.config.paths import CONFIGS
from pipelines.errors import ConfigError
from pipelines.preflight.portability import open_secrets, unshared
from pipelines.serve.contract import Sampling
from pipelines.serve.prompts import Prompts
from pipelines.serve.schema import BadRequest, ChatRequest, CompletionRequest, PredictRequest, parse
from tests.conftest import make_tokenizer
from tests.unit.fuzzing import CUTS, EDITS, as_json, damaged, edited, fuzz, one_line
from tests.unit.serving import TEMPLATE

# -- HTTP bodies
BODIES = (
    (
        ChatRequest,
        {
            "model": "champion",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "the film"}]},
            ],
            "temperature": 0.5,
            "top_p": 0.9,
            "n": 2,
            "seed": 7,
            "stop": ["x", "y"],
            "max_tokens": 5,
            "logprobs": True,
            "top_logprobs": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "u",
            "tools": [],
            "logit_bias": {},
        },
    ),
    (
        CompletionRequest,
        {
            "model": "run/step",
            "prompt": ["the film", "a story"],
            "max_tokens": 4,
            "logprobs": 2,
            "echo": False,
            "best_of": 1,
            "stop": "x",
        },
    ),
    (CompletionRequest, {"model": "base", "prompt": [[1, 2, 3], [4]], "seed": -(2**63), "n": 16}),
    (PredictRequest, {"model": "champion", "task": "mood", "rows": [{"text": "good", "label": 1}, {"text": None}]}),
)


def test_http_bodies():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts(tokenizer, context=64, longest=32, vocabulary=len(tokenizer))

    def check(which, edits, cuts):
        kind, body = which
        try:
            request = parse(damaged(as_json(edited(body, edits)), cuts), kind)
            if kind is PredictRequest:
                assert request.rows and request.task
                return
            if kind is ChatRequest:
                ids = [prompts.of_chat([message.plain() for message in request.messages])]
            else:
                ids = [prompts.of_text(prompt) for prompt in request.prompts]
            for prompt in ids:
                room = prompts.room(prompt, request.limit, request.usual)
                assert 0 < room <= 32 and prompt and all(0 <= token < len(tokenizer) for token in prompt)
                for sampling in request.sampling(room):
                    assert isinstance(sampling, Sampling) and 0 <= sampling.seed < 2**63
        except BadRequest as error:
            one_line(error)
            assert 400 <= error.status < 500

    fuzz(check, st.sampled_from(BODIES), EDITS, CUTS, examples=600, share=4)


# -- configurations
FULL = """
name: full
base_model: {path: ../models/tiny, revision: null, dtype: auto, quantization: null}
storage: ./runs
adapter: {type: curlora, r: 16, alpha: 1.0, target_modules: [q_proj], selection: inverse, carry: continue}
strategy: {name: replay}
training: {learning_rate: 3e-3, epochs: 3, batch_size: 16, max_length: 128, seed: 0, warmup_ratio: 0.1}
evaluation: {max_examples: 10, batch_tokens: 8192}
resources: {workers: 2, gpus_per_worker: auto, cpus_per_worker: 1}
durability: {checkpoint_seconds: 30, max_failures: 3}
deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: false}}
tasks:
  - {name: a, kind: classification, head: classifier, data: ./a, text: [s, t], label: l, labels: [low, high]}
  - {name: b, kind: classification, head: verbalizer, data: ./b, prompt: "Review: {s}:", splits: {test: validation}}
  - {name: c, kind: language-modeling, data: "s3://bucket/c", text: text}
  - {name: d, kind: generation, data: ./d.jsonl, prompt: "{q}", completion: "{a}", max_new_tokens: 8}
  - {name: e, kind: multiple-choice, data: ./e, prompt: "{q}", choices: choices, label: label}
retention: [{name: wiki, data: ./wiki, text: text}]
tracking: {uri: "sqlite:///mlflow.db", experiment: x, register_as: bot}
gate: {max_forgetting: 0.02}
serve: {canary: 0.1, port: 8000, poll: 2s}
"""
MORE = (
    "search: {when: first, space: {training.learning_rate: {low: 1e-4, high: 1e-2, log: true}, adapter.r: [4, 8]}, "
    "trials: 4}",
    'domains: {inbox: ./inbox, template: {kind: language-modeling}, quiet_period: 10m, cron: "0 3 * * *", '
    "timezone: Etc/UTC}",
)
SETTINGS = (
    "training.learning_rate=1",
    "tasks.0.name=x",
    "adapter=",
    "a.b.c.d=1",
    "=",
    "tasks.99=x",
    "name.x=1",
    "tasks.-1=x",
    "tasks.٣=x",
    "training.epochs=&a [*a]",
    "serve.port=1e5",
    "x" * 500,
    "domains={",
    "tasks.0=null",
    "resources.workers=[[[[",
)


def _shipped() -> list[dict]:
    return [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]


def test_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    raws = [yaml.safe_load(FULL + more) for more in MORE]
    for raw in raws:
        file.write_text(yaml.safe_dump(raw))
        assert load_config(file).tasks[4].name == "e", "the input that is damaged is valid itself"

    def check(raw, edits, cuts, overrides):
        text = yaml.safe_dump(edited(raw, edits), sort_keys=False, allow_unicode=bool(len(edits) % 2))
        file.write_bytes(damaged(text.encode("utf-8", "surrogatepass"), cuts))
        try:
            config = load_config(file, overrides)
        except ConfigError as error:
            assert error.problems
            one_line(error)
            return
        again = type(config).model_validate(json.loads(json.dumps(config.model_dump())))
        assert again == config, "a run directory keeps it and reads it again"
        for problem in [*unshared(config, False), *open_secrets(config)]:
            one_line(ConfigError([problem]))

    overrides = st.one_of(st.just([]), st.lists(st.sampled_from(SETTINGS), max_size=2))
    fuzz(
        check,
        st.sampled_from([*raws, *raws, *_shipped()]),
        EDITS,
        st.one_of(st.just([]), CUTS),
        overrides,
        examples=60,
        share=1,
    )


# -- what the long form has found
def test_an_override_below_an_entry_that_is_no_section_is_bad_input(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\ntasks: [0.5]\n")
    with pytest.raises(ConfigError, match="'0' is not a section"):
        load_config(tmp_path / "c.yaml", ["tasks.0.name=x"])


def test_an_overlong_key_does_not_fill_the_terminal(tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: x\nbase_model: {{path: {tmp_path}}}\n{'k' * 3000}: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert all(len(str(problem)) < 2100 for problem in caught.value.problems)


def test_a_request_with_a_lone_surrogate_as_key_gets_an_answer_that_can_be_sent():
    with pytest.raises(BadRequest, match="there is no parameter") as caught:
        parse(b'{"model": "base", "prompt": "x", "\\ud800": 1}', CompletionRequest)
    str(caught.value).encode()
