"""The project's own command line in a process of its own, over a small chain that is made on the spot."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from measure import DTYPE, GPU, Plan
from results import SkipPart

NEEDED = ("ray", "deepspeed", "datasets", "pydantic")
NOUNS = ("film", "plot", "actor", "story", "score", "scene", "ending", "joke")
GOOD, BAD = ("bright", "warm", "clever", "moving"), ("dull", "flat", "clumsy", "tired")


def require(*modules: str) -> None:
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise SkipPart(f"not importable here: {', '.join(missing)}")


@dataclass(frozen=True)
class Finished:
    """A command that ended: exit code, standard output and error, seconds, and what else is to be said of it."""

    code: int
    out: str
    err: str
    seconds: float
    remark: str = ""

    @property
    def last_words(self) -> str:
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return " ".join(lines[-4:])[-400:]


@dataclass(frozen=True)
class Chain:
    """A folder with a base model, the data of three tasks, and a configuration over them."""

    root: Path
    raw: dict

    @classmethod
    def make(cls, root: Path, plan: Plan, steps: int) -> Chain:
        model = plan.model.resolve() if plan.model else root / "model"
        if not plan.model:
            save_model(model, plan.tiny)
        reviews, text = save_reviews(root / "reviews"), save_text(root / "text")
        first = {"name": "reviews", "kind": "classification", "data": str(reviews), "text": "sentence"}
        word = {"name": "word", "head": "verbalizer", "prompt": "Review: {sentence}\nIt was"}
        raw = {
            "base_model": {"path": str(model), "dtype": str(DTYPE).removeprefix("torch.")},
            "storage": str(root / "runs"),
            "adapter": {"type": "curlora", "r": 8},
            "training": {"max_steps": steps, "batch_size": 8, "max_length": 64, "learning_rate": 1e-3},
            "resources": {"workers": 1},
            "tasks": [first, first | word, {"name": "text", "kind": "language-modeling", "data": str(text)}],
            "tracking": None,
        }
        return cls(root, raw)

    def start(self, name: str, **changes) -> subprocess.Popen:
        """`python -m pipelines run` with fields of the configuration changed."""
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.raw | {"name": name} | changes))
        return start(["run", str(path), "--json"], self.root)

    def run(self, name: str, seconds: float, **changes) -> Finished:
        return finish(self.start(name, **changes), seconds)

    def directory(self, name: str) -> Path:
        return self.root / "runs" / name

    def training_step(self, name: str) -> int:
        """The optimizer step that a run says it has reached; 0 while it does not train."""
        progress = self.directory(name) / "progress.json"
        try:
            now = json.loads(progress.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        return now["step"] if now.get("kind") == "training" else 0


def start(arguments: list[str], directory: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipelines", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=directory, env=environment, **streams)  # ends with this part's process group


def finish(process: subprocess.Popen, seconds: float) -> Finished:
    """Wait for a command; one that takes longer is ended, and its code is negative."""
    begun = time.monotonic()
    try:
        out, err = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.kill()  # Ray's processes share the fate of the one that started them
        out, err = process.communicate()
        err += f"\nended after {seconds:.0f} s"
    return Finished(process.returncode, out, err, time.monotonic() - begun)


# -- what it works on


def save_model(folder: Path, tiny: bool) -> None:
    """A Llama with random weights, and a byte-level tokenizer."""
    import tokenizers
    import torch
    import transformers

    raw = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    raw.train_from_iterator([" ".join((*NOUNS, *GOOD, *BAD))] * 4, vocab_size=320, special_tokens=special)
    folder.mkdir(parents=True)
    raw.save(str(folder / "raw.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )
    tokenizer.save_pretrained(folder)
    width, layers = (32, 2) if tiny else (512, 8)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if tiny else 8,
        num_key_value_heads=1 if tiny else 4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def save_reviews(folder: Path) -> Path:
    chance = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 512), ("test", 64)):
        rows = []
        for number in range(count):
            words = (GOOD if number % 2 else BAD, NOUNS)
            sentence = " and ".join(f"a {chance.choice(words[0])} {chance.choice(words[1])}" for _ in range(3))
            rows.append({"sentence": sentence, "label": number % 2})
        _write_rows(folder / f"{split}.jsonl", rows)
    (folder / "labels.json").write_text(json.dumps([" bad", " good"]))
    return folder


def save_text(folder: Path, rows: dict[str, int] | None = None, words: int = 48) -> Path:
    chance = random.Random(1)
    folder.mkdir(parents=True)
    for split, count in (rows or {"train": 256, "test": 32}).items():
        texts = [{"text": " ".join(chance.choices(NOUNS, k=words))} for _ in range(count)]
        _write_rows(folder / f"{split}.jsonl", texts)
    return folder


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def at_once() -> int:
    """How many commands may run side by side: they share one GPU, but each has processes of its own."""
    return min(4, max((os.cpu_count() or 1) // 4, 1)) if GPU else 1
