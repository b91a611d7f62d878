"""A tiny base with several trained CURLoRA adapters, as folders and as one model alone, for the tests of serving."""

from __future__ import annotations

import contextlib
import copy
import queue
from pathlib import Path

import peft
import torch
import transformers

from curlora import CurloraConfig
from pipelines.config.loading import parse_config
from pipelines.data.kinds import kind_of
from pipelines.models import adapters, heads
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import base_fingerprint, fingerprint
from pipelines.runs.results import StepSummary
from pipelines.runs.step_record import PublishedFile, Seconds, base_directory
from pipelines.serve.contract import Ask, Piece, Sampling
from tests.conftest import WORDS, make_model, write_jsonl
from tests.unit.sample_records import results, step_record


def write_adapter(base, folder: Path, number: int, **options) -> Path:
    """A step's folder with an adapter whose U is random and large enough to change what the model says."""
    config = CurloraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(number)
    for name, parameter in model.named_parameters():
        if "curlora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def alone(base, folder: Path | None):
    """The base with the adapter of a folder, loaded as PEFT loads it."""
    copied = copy.deepcopy(base)
    return copied if folder is None else peft.PeftModel.from_pretrained(copied, str(folder / "adapter")).eval()


@torch.no_grad()
def greedy_alone(base, folder: Path | None, prompt, count: int) -> list[int]:
    """The answer of one model to one prompt by Transformers itself."""
    ids = torch.tensor([prompt])
    model = alone(base, folder)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return found[0, len(prompt) :].tolist()


class Answer:
    """Collects what the engine says of one request."""

    def __init__(self) -> None:
        self.queue: queue.Queue = queue.Queue()
        self.pieces: list[Piece] = []

    def __call__(self, what) -> None:
        self.queue.put(what)

    def wait(self, seconds: float = 60.0) -> Answer:
        while not (self.pieces and self.pieces[-1].finish):
            what = self.queue.get(timeout=seconds)
            if isinstance(what, Exception):
                raise what
            self.pieces.append(what)
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def scores(self) -> list:
        return [score for piece in self.pieces for score in piece.scores]

    @property
    def tokens(self) -> list[int]:
        return [score.token for score in self.scores]


def ask(adapter: str, prompt, max_tokens: int = 12, stops=(), deadline: float = float("inf"), **sampling) -> Ask:
    """A request whose answer reports its tokens; greedy unless it says otherwise."""
    options = {"temperature": 0.0, "top_logprobs": 0} | sampling
    return Ask(adapter, tuple(prompt), Sampling(max_tokens, **options), frozenset(stops), deadline)


# -- runs as workers write them, and versions in a registry
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}"
    "{% endif %}"
)
TASKS = [
    {"name": "mood", "kind": "classification", "head": "verbalizer", "prompt": "{text}:", "labels": ["bad", "good"]},
    {"name": "topic", "kind": "classification", "text": "text"},
    {"name": "choose", "kind": "multiple-choice", "prompt": "{text}", "choices": "choices"},
    {"name": "write", "kind": "generation", "prompt": "{text}", "completion": "{choices}", "max_new_tokens": 5},
    {"name": "later", "kind": "classification", "text": "text"},
]
ROWS = [
    {"text": f"the film is {word} and {other}", "choices": ["warm", "dull and slow", word]}
    for word, other in zip(WORDS, reversed(WORDS), strict=True)
]


def write_base(folder: Path, tokenizer) -> Path:
    """The tiny base, with a tokenizer that knows chats."""
    make_model(tokenizer).save_pretrained(folder)
    told = copy.deepcopy(tokenizer)
    told.chat_template = TEMPLATE
    told.save_pretrained(folder)
    return folder


def write_run(root: Path, base: Path, name: str, number: int, **changes) -> RunDirectory:
    """A finished run with one step, whose adapter and head depend on `number`."""
    data = root / "data"
    data.mkdir(exist_ok=True)
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", [row | {"label": i % 2} for i, row in enumerate(ROWS)])
    raw = {"name": name, "storage": str(root / "runs"), "base_model": {"path": str(base), "dtype": "float32"}}
    raw |= {"adapter": {"type": "curlora", "r": 4}, "training": {"max_length": 40}}
    raw["tasks"] = [task | {"data": str(data)} for task in TASKS]
    config = parse_config(raw | changes)
    run, bottom = RunDirectory(config.run_uri), base_fingerprint(config.base_model)
    run.open_for_writing(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = adapters.attach_adapter(model, config.adapter, 0)
    heads.attach_heads(adapted, {"topic": 2}, number)
    generator = torch.Generator().manual_seed(number)
    chosen = {}
    for key, parameter in adapted.named_parameters():
        if "curlora_" in key or heads.saved_name(key):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            chosen[key] = parameter.detach().clone()
    buffers = {key: buffer for key, buffer in adapted.state_dict().items() if "curlora_" in key}
    own, folder = fingerprint({"name": name, "number": number}), root / f"step-{name}"
    folder.mkdir()
    adapters.save_adapter(adapted, buffers | chosen, folder)
    directory = f"steps/1-mood-{own[:8]}"
    run.upload(folder, directory)
    files = {
        path.relative_to(folder).as_posix(): PublishedFile(path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }
    learned = [task for task in config.tasks if task.name != "later"]
    classes = {task.name: kind_of(task).classes(task) for task in learned}
    row = step_record(own, tuple(task.name for task in learned), parent=bottom, depth=1, files=files, classes=classes)
    run.write_json(f"{base_directory(bottom)}/metrics.json", step_record(bottom))
    run.write_json(f"{directory}/metrics.json", row)
    step = StepSummary("mood", own, directory, seconds=Seconds(total=1.0))
    run.write_json("results.json", results(steps=(step,), base_fingerprint=bottom))
    return run


def register(client, name: str, run: RunDirectory, alias: str | None = None, source: str | None = None) -> int:
    """A version of a model for the last step of a run, with the tags that a version has; its number."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(name)
    found = run.results()
    step = found.steps[-1]
    tags = {"run_uri": run.uri, "step_directory": step.directory, "step_fingerprint": step.fingerprint}
    tags |= {"base_fingerprint": found.base_fingerprint, "tasks": "mood", "domains": "{}"}
    made = client.create_model_version(
        name, source or run.uri, tags={f"curlora.{key}": value for key, value in tags.items()}
    )
    if alias:
        client.set_registered_model_alias(name, alias, made.version)
    return int(made.version)
