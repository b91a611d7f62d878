"""The model of the workers as lm-evaluation-harness sees a model.

Every rank asks the same questions; here they are divided among the ranks, and every rank gets all answers. Tokens and
their truncation are those of the harness's own `HFLM`, so that a score is the one that `lm_eval` gives on the same
weights. Import it only where the harness is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from pipelines.distributed.world import World, gather_everywhere
from pipelines.evaluation.scorers import greedy
from pipelines.models.bank import bank_of
from pipelines.models.losses import keep_logits, position_ids
from pipelines.models.padding import pad

LOGITS_AT_A_TIME = 1 << 26
LONGEST_ANSWER = 256  # tokens, where a task names no limit; as HFLM

Progress = Callable[[int, int], None]
"""Called after every batch with the number of questions of this kind answered so far on all ranks, and of all."""


class Question(NamedTuple):
    """Token ids that the model reads, and what follows: ids to be scored, or the texts that end an answer."""

    number: int
    ids: list[int]
    wanted: tuple[int, ...] = ()
    until: tuple[str, ...] = ()
    limit: int = 0

    @property
    def asked(self) -> list[int]:
        """What the model is given of it; of a whole text all of it."""
        given = self.ids[: len(self.ids) - max(0, len(self.wanted) - 1)]
        return given if len(given) > 1 else self.ids


class WorkersModel(TemplateLM):
    """A causal language model that all ranks of a worker group hold.

    Args:
        context: longest input in tokens.
        batch_tokens: tokens per forward pass, padding included.
        progress: see `Progress`.
    """

    def __init__(self, model: nn.Module, tokenizer, context: int, world: World, batch_tokens: int, progress: Progress):
        super().__init__()
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.max_length, self.batch_tokens, self.progress = context, batch_tokens, progress
        self._device = world.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- the three requests

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the same tokens) of each continuation."""
        questions = []
        for number, (_, context, continuation) in enumerate(requests):
            whole = [*context, *continuation][-(self.max_length + 1) :]
            questions.append(Question(number, whole[:-1], tuple(continuation[-self.max_length :])))
        return self._answers(questions, self._likelihoods)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += likelihood
        return sums

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, each up to the first of its stop texts."""
        end = self.tokenizer.decode(self.eot_token_id)
        questions = []
        for number, request in enumerate(requests):
            text, given = request.args
            settings = normalize_gen_kwargs(given, LONGEST_ANSWER)
            limit = settings["max_gen_toks"]
            room = self.max_length - limit
            if room < 1:
                raise ValueError(
                    f"{request.task_name} asks for answers of {limit} tokens, but the model's context holds "
                    f"{self.max_length}; lower generation_kwargs.max_gen_toks of the task"
                )
            until = tuple(handle_stop_sequences(settings.get("until"), eos=end))
            ids = self._prompt(text)[-room:]
            questions.append(Question(number, ids, until=until, limit=limit))
        return self._answers(questions, self._generated)

    def _prompt(self, text: str) -> list[int]:
        begun = has_bos_prefix(text, self.tokenizer.bos_token)
        return self.tokenizer.encode(text, verbose=False, **({"add_special_tokens": False} if begun else {}))

    # -- their distribution

    def _answers(self, questions: Sequence[Question], answer: Callable[[list[Question]], list[tuple]]) -> list:
        """The answers in the order of the questions, on every rank; each by the adapter that a bank chooses for it."""
        bank, found = bank_of(self.model), []
        if bank is None:
            found = self._share(questions, answer)
        else:
            places = bank.routes(self.model, [question.asked for question in questions], self.world)
            for place in sorted(set(places)):
                with bank.active(self.model, place):
                    mine = [question for question, chosen in zip(questions, places, strict=True) if chosen == place]
                    found += self._share(mine, answer)
        by_number = dict(gather_everywhere(found, self.world))
        return [by_number[number] for number in range(len(questions))]

    def _share(self, questions: Sequence[Question], answer: Callable[[list[Question]], list[tuple]]) -> list[tuple]:
        """The answers to this rank's share of the questions."""
        batches, found, done = self._batches(questions), [], 0
        with torch.no_grad():
            for number in range(0, len(batches), self.world.size):
                mine = number + self.world.rank
                if mine < len(batches):
                    found += answer(batches[mine])
                elif self.world.lockstep:  # every rank runs the same number of forward passes
                    answer(batches[-1])
                done += sum(map(len, batches[number : number + self.world.size]))
                self.progress(done, len(questions))
        return found

    def _batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Batches of equal stop texts and limits and of at most `batch_tokens` tokens, longest questions first."""
        vocabulary = len(self.tokenizer)
        batches: list[list[Question]] = []
        scored = 0  # positions of a row of the last batch with logits
        for question in sorted(questions, key=lambda q: (q.until, q.limit, -len(q.ids), q.number)):
            last = batches[-1] if batches else None
            if last and (last[0].until, last[0].limit) == (question.until, question.limit):
                rows, longest = len(last) + 1, len(last[0].ids)
                span = max(scored, longest - len(question.ids) + len(question.wanted))
                fits = rows * (longest + question.limit) <= self.batch_tokens
                if fits and rows * span * vocabulary <= LOGITS_AT_A_TIME:
                    last.append(question)
                    scored = span
                    continue
            batches.append([question])
            scored = len(question.wanted)
        return batches

    def _likelihoods(self, batch: list[Question]) -> list[tuple[int, tuple[float, bool]]]:
        padded = pad([question.ids for question in batch], self.world.device)
        first = min(len(question.ids) - len(question.wanted) for question in batch)
        kept = keep_logits(self.model, torch.arange(first, padded.ids.shape[1], device=padded.ids.device))
        positions = position_ids(self.model, padded.positions)
        inputs = {"input_ids": padded.ids, "attention_mask": padded.mask, "use_cache": False}
        logits = self.model(**inputs, **positions, **kept).logits
        logits = logits if kept else logits[:, first:]
        found = []
        for row, question in enumerate(batch):
            stop = len(question.ids) - first
            part = logits[row, stop - len(question.wanted) : stop].float()
            wanted = torch.tensor(question.wanted, device=part.device)
            total = part.log_softmax(-1).gather(1, wanted[:, None]).double().sum().item()
            found.append((question.number, (total, bool((part.argmax(-1) == wanted).all()))))
        return found

    def _generated(self, batch: list[Question]) -> list[tuple[int, str]]:
        until, limit = batch[0].until, batch[0].limit
        tail = max(map(len, until)) + 4  # a token holds at least a character, or a part of one

        def ended(tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(tokens[-tail:], skip_special_tokens=True)
            return any(stop in text for stop in until)

        padded = pad([question.ids for question in batch], self.world.device, side="left")
        rows = greedy(self.model, padded, limit, (self.eot_token_id,), self.world, ended)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [
            (question.number, postprocess_generated_text(text, list(until), None))
            for question, text in zip(batch, texts, strict=True)
        ]
