"""A tiny base with several trained CURLoRA adapters, as folders and as one model alone, for the tests of serving."""

from __future__ import annotations

import copy
import itertools
import queue
from pathlib import Path

import peft
import torch

from curlora import CurloraConfig
from pipelines.serve.contract import Ask, Piece, Sampling

COUNT = itertools.count()


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
