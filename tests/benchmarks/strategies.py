"""Strategies over a chain of four domains in one process: no Ray, no DeepSpeed, minutes on one core.

For research: what a change of a strategy does to learning, forgetting and other text, before `curlora compare`
confirms it. The chain is that of `tests/configs/domains-tiny.yaml` in small: 80 steps of 8 × 128 tokens a domain, the
NLL of 40 test blocks. One line of JSON per setting; settings that the output file has already are not run again.

    python tests/benchmarks/strategies.py --adapter curlora:46 --strategy '{name: curvature}' --learning-rate 1e-2
    python tests/benchmarks/strategies.py --adapter lora-all:8 --strategy '{name: sequential}' --seed 1
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora import CurloraConfig
from curlora.continual import Example, TaskContext, make_strategy
from pipelines.distributed.world import World
from pipelines.evaluation.sampling import sample_text
from pipelines.training.batches import collate
from pipelines.training.example_losses import drawn_targets, example_losses, losses_alone

SHARED = Path(__file__).resolve().parents[3] / "shared"
DOMAINS = ("biomed_pubmedqa", "finance_reuters", "code_mbpp", "literature_shakespeare")
LENGTH, BATCH, TESTED = 128, 8, 40
CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


@dataclass(frozen=True)
class Setting:
    adapter: str
    strategy: str
    learning_rate: float
    weight_decay: float
    steps: int
    seed: int


def adapter_config(name: str) -> peft.PeftConfig:
    """`curlora:46`, `lora:8` (q/k/v) or `lora-all:8`: type and rank."""
    kind, _, rank = name.partition(":")
    common = {"r": int(rank), "task_type": "CAUSAL_LM"}
    if kind == "curlora":
        return CurloraConfig(target_modules="all-linear", selection="inverse", scale="adam", **common)
    targets = "all-linear" if kind == "lora-all" else ["q_proj", "k_proj", "v_proj"]
    return peft.LoraConfig(lora_alpha=int(rank), target_modules=targets, **common)


def blocks(tokenizer, folder: Path, split: str, count: int, length: int = LENGTH) -> list[tuple[int, ...]]:
    ids: list[int] = []
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return [tuple(ids[i : i + length]) for i in range(0, min(len(ids) - length, count * length), length)]


@torch.no_grad()
def nll(model, rows: torch.Tensor) -> float:
    total = 0.0
    for part in rows.split(16):
        logits = model.eval()(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="sum").item()
    return total / (rows.numel() - len(rows))


class Chain:
    """Model, data and strategy of one setting; `scores[t][i]` as in `results.json`."""

    def __init__(self, setting: Setting, base: Path):
        self.setting = setting
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        torch.manual_seed(setting.seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = peft.get_peft_model(model, adapter_config(setting.adapter))
        options = yaml.safe_load(setting.strategy)
        self.strategy = make_strategy(options.pop("name"), **options)
        data = SHARED / "data"
        self.tests = {
            name: torch.tensor(blocks(self.tokenizer, data / f"domain_{name}", "test", TESTED)) for name in DOMAINS
        }
        self.other = torch.tensor(blocks(self.tokenizer, data / "wikitext2", "test", 32, 256))

    def rows(self, domain: str, position: int) -> list[Example]:
        found = blocks(self.tokenizer, SHARED / "data" / f"domain_{domain}", "train", self.setting.steps * BATCH)
        order = np.random.default_rng([self.setting.seed, position]).permutation(len(found))
        return [Example(domain, found[i], found[i]) for i in order]

    def train(self, domain: str, position: int) -> None:
        examples = self.rows(domain, position)
        task = TaskContext(
            domain,
            position,
            self.setting.seed,
            examples,
            losses=lambda model, some: losses_alone(model, some, CPU),
            draw=lambda model, some, seed: drawn_targets(model, some, CPU, seed),
            write=lambda model, rows, length: sample_text(model, rows, length, self.tokenizer.bos_token_id, 7, WORLD),
        )
        self.strategy.before_task(self.model, task)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.setting.learning_rate, weight_decay=self.setting.weight_decay
        )
        steps = self.setting.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / (0.1 * steps), 1) * 0.5 * (1 + math.cos(math.pi * i / steps))
        )
        for step in range(1, steps + 1):
            batch = self.strategy.batch(examples[BATCH * (step - 1) : BATCH * step])
            losses, output = example_losses(self.model.train(), collate(list(batch), WORLD))
            output = replace(output, loss=losses.mean(), replayed=sum(example.replayed for example in batch))
            self.strategy.loss(self.model, batch, output).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.strategy.after_step(self.model, step)
        self.strategy.after_task(self.model, task)

    def run(self) -> dict:
        scores = [[nll(self.model, rows) for rows in self.tests.values()]]
        before, seconds = nll(self.model, self.other), 0.0
        for position, domain in enumerate(DOMAINS, 1):
            start = time.process_time()
            self.train(domain, position)
            seconds += time.process_time() - start
            scores.append([nll(self.model, rows) for rows in self.tests.values()])
        last = len(DOMAINS)
        best = [min(row[i] for row in scores[i + 1 :]) for i in range(last)]
        return {
            "learning": float(np.mean([scores[0][i] - scores[i + 1][i] for i in range(last)])),
            "forgetting": float(np.mean([scores[last][i] - best[i] for i in range(last - 1)])),
            "perplexity_ratio": math.exp(nll(self.model, self.other) - before),
            "processor_seconds": seconds,
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "scores": scores,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=SHARED / "models" / "tiny-llama")
    parser.add_argument("--adapter", default="curlora:46")
    parser.add_argument("--strategy", default="{name: curvature}")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("strategies.jsonl"))
    given = vars(parser.parse_args())
    base, out = given.pop("base"), given.pop("out")
    setting = Setting(**given)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found = next((row for row in done if row["setting"] == vars(setting)), None)
    if found is None:
        torch.set_num_threads(1)
        found = {"setting": vars(setting)} | Chain(setting, base).run()
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "scores"}))


if __name__ == "__main__":
    main()
