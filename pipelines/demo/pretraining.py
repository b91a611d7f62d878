"""Trains a tokenizer and a small Llama on the corpus of the demo. Imports torch only when the demo is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.demo.presets import Preset, Progress
from pipelines.errors import DemoError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def pretrain(
    folder: Path, train: list[str], held_out: list[str], preset: Preset, progress: Progress
) -> dict[str, Any]:
    """Train tokenizer and model on `train`, save both in `folder`, return what was measured.

    Raises `DemoError` when the held-out NLL is not `preset.min_gain` nats per token below the unigram's.
    """
    progress(0, preset.steps, "training the tokenizer")
    tokenizer = train_tokenizer(train, preset)
    tokenizer.save_pretrained(folder)
    train_ids, held_out_ids = encode(tokenizer, train), encode(tokenizer, held_out)
    with torch_threads(preset.threads):
        model = train_model(train_ids, tokenizer, preset, progress)
        nll = model_nll(model, held_out_ids, preset.context)
    unigram = unigram_nll(train_ids, held_out_ids, len(tokenizer))
    if unigram - nll < preset.min_gain:
        raise DemoError(
            f"the pretrained model's held-out NLL is {nll:.3f} nats per token against the unigram's {unigram:.3f}: it "
            f"must be {preset.min_gain} lower. There is too little text ({len(train_ids)} tokens) or too little "
            f"training ({preset.steps} steps); install the versions named in requirements.lock"
        )
    save_quietly(model, folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "context": preset.context,
        "steps": preset.steps,
        "train_tokens": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "held_out_nll": nll,
        "unigram_nll": unigram,
    }


def train_tokenizer(texts: list[str], preset: Preset) -> Any:
    """A byte-level BPE tokenizer that puts `<s>` before a text, as Llama's does; it decodes to what it encoded."""
    # slow
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=preset.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: list[str]) -> Any:
    """All texts as one sequence of token ids `[tokens]`, each between `<s>` and `</s>`."""
    import torch  # slow

    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for text in encoded for token in (*text.ids, eos)])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads, then with as many as before; None changes nothing."""
    import torch  # slow

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_model(ids: Any, tokenizer: Any, preset: Preset, progress: Progress) -> Any:
    """A Llama-shaped model trained for a fixed number of steps (not by the clock, so that it is the same again)."""
    import torch  # slow

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(tokenizer, preset)
        optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, preset.steps))
        for step, batch in enumerate(batches(ids, preset)):
            loss = next_token_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 9:
                progress(step + 1, preset.steps, f"pretraining the base model, loss {loss.item():.2f}")
    progress(preset.steps, preset.steps, "base model pretrained")
    return model.eval()


def new_model(tokenizer: Any, preset: Preset) -> Any:
    """An untrained Llama with tied embeddings, in fp32."""
    # slow
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(torch.float32).train()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(ids: Any, preset: Preset) -> Iterator[Any]:
    """`preset.steps` batches `[batch, context]`: the text in shuffled windows, cut elsewhere on every pass."""
    import torch  # slow

    generator = torch.Generator().manual_seed(0)
    windows: list[Any] = []
    for _ in range(preset.steps):
        while len(windows) < preset.batch:
            offset = int(torch.randint(preset.context, (1,), generator=generator))
            count = (len(ids) - offset) // preset.context
            if count < 1:
                raise DemoError(f"only {len(ids)} tokens of text to pretrain on: install more of the libraries")
            whole = ids[offset : offset + count * preset.context].view(count, preset.context)
            windows += list(whole[torch.randperm(count, generator=generator)])
        yield torch.stack(windows[: preset.batch])
        del windows[: preset.batch]


def save_quietly(model: Any, folder: Path) -> None:
    """Save without the library's own progress bar: what the user sees is the caller's to say."""
    from transformers.utils import logging  # slow

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def next_token_loss(model: Any, ids: Any, reduction: str = "mean") -> Any:
    """Negative log-likelihood of tokens 1.. given those before; `ids` is `[batch, tokens]`."""
    import torch  # slow

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def model_nll(model: Any, ids: Any, context: int) -> float:
    """Nats per token of `ids` in windows of `context` tokens; every token but the first is predicted once."""
    import torch  # slow

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context - 1):
            total += next_token_loss(model, ids[None, start : start + context], reduction="sum").item()
    return total / (len(ids) - 1)


def unigram_nll(train: Any, held_out: Any, vocabulary: int) -> float:
    """Nats per token of `held_out[1:]` under the token frequencies of `train` (one added to each count)."""
    counts = train.bincount(minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out[1:]].mean())
