"""Load on a running `curlora serve`: requests per second, time to the first token and to the last, requests lost.

    curlora serve support-bot &
    python tests/benchmarks/serving.py --models champion --clients 1,8,32 --seconds 120
    python tests/benchmarks/serving.py --models run-1/chat,run-2/chat,… --clients 32     # mixed batches
    python tests/benchmarks/serving.py --plain RUN/steps/1-chat-1a2b3c4d --base BASE     # Transformers, one at a time

Every client is a thread with OpenAI's client, which streams one answer after the other; the models take turns. Prints
a row of a Markdown table per number of clients. `--plain` answers the same chats by `generate` of the same model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How do I sort a list in Python?",
    "Name three colours.",
    "Why is the sky blue? Answer briefly.",
    "Translate 'good morning' into Spanish.",
    "What does a baker do?",
    "Give me a short title for a story about a dog.",
)


@dataclass
class Seen:
    """What the clients saw; seconds per request."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    tokens: int = 0
    lost: Counter = field(default_factory=Counter)
    adapters: Counter = field(default_factory=Counter)


def ask(client, model: str, question: str, tokens: int, seen: Seen) -> None:
    """One streamed answer."""
    begin, first, usage, adapter = time.perf_counter(), None, None, None
    chat = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    for part in client.chat.completions.create(
        **chat, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        if first is None and part.choices and part.choices[0].delta.content:
            first = time.perf_counter() - begin
        usage, adapter = part.usage or usage, part.adapter["name"]
    seen.first.append(first if first is not None else time.perf_counter() - begin)
    seen.total.append(time.perf_counter() - begin)
    seen.tokens += usage.completion_tokens
    seen.adapters[adapter] += 1


def load(url: str, models: list[str], clients: int, seconds: float, tokens: int) -> Seen:
    """`clients` threads for so many seconds; answers that have begun are waited for."""
    import openai

    seen, end = Seen(), time.monotonic() + seconds
    turns = itertools.cycle(itertools.product(QUESTIONS, models))  # `next` is atomic

    def work() -> None:
        with openai.OpenAI(base_url=url, api_key="none") as client:
            while time.monotonic() < end:
                question, model = next(turns)
                try:
                    ask(client, model, question, tokens, seen)
                except openai.OpenAIError as error:
                    seen.lost[f"{type(error).__name__}: {error}"[:80]] += 1

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def plain(base: str, step: str, seconds: float, tokens: int) -> Seen:
    """The same chats by `generate`, one request at a time."""
    import peft
    import torch
    import transformers

    import curlora  # noqa: F401  registers its tuner with PEFT

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype="auto" if device == "cuda" else torch.float32
    )
    model = peft.PeftModel.from_pretrained(model, f"{step}/adapter").to(device).eval()
    seen, end = Seen(), time.monotonic() + seconds
    for question in itertools.cycle(QUESTIONS):
        if time.monotonic() >= end:
            return seen
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        begin = time.perf_counter()
        answer = model.generate(**inputs.to(device), max_new_tokens=tokens, do_sample=False)
        seen.total.append(time.perf_counter() - begin)
        seen.tokens += answer.shape[1] - inputs["input_ids"].shape[1]
    return seen


def row(name: str, seen: Seen, seconds: float) -> str:
    def spread(values: list[float]) -> str:
        if len(values) < 2:
            return "" if not values else f"{values[0]:.2f}"
        return f"{statistics.median(values):.2f}, {statistics.quantiles(values, n=20)[-1]:.2f}"

    rates = f"{len(seen.total) / seconds:.2f} | {seen.tokens / seconds:.1f}"
    return f"| {name} | {rates} | {spread(seen.first)} | {spread(seen.total)} | {sum(seen.lost.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--models", default="champion")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--plain", metavar="STEP", help="folder of a step; needs --base")
    parser.add_argument("--base")
    options = parser.parse_args()
    print("| clients | requests/s | tokens/s | first token: median, 95th (s) | total: median, 95th (s) | lost |")
    print("|---|---|---|---|---|---|")
    if options.plain:
        begin = time.perf_counter()
        seen = plain(options.base, options.plain, options.seconds, options.tokens)
        print(row("Transformers, one at a time", seen, sum(seen.total) or time.perf_counter() - begin))
        return
    models = options.models.split(",")
    for clients in map(int, options.clients.split(",")):
        begin = time.perf_counter()
        seen = load(options.url, models, clients, options.seconds, options.tokens)
        print(row(f"{clients}, {len(models)} models", seen, time.perf_counter() - begin), flush=True)
        for reason, count in seen.lost.items():
            print(f"lost {count}: {reason}")
        print(f"answered by {dict(seen.adapters)}")


if __name__ == "__main__":
    main()
