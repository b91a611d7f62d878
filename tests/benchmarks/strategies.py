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
from peft.tuners.psoft.layer import PsoftLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora import CurloraConfig
from curlora.continual import Example, TaskContext, make_strategy
from curlora.cur import scale_factor
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


def adapted(model, name: str, seed: int) -> peft.PeftModel:
    """The model with an adapter of a type and rank, on all linear layers unless another is said.

    `curlora:46`, or `curlora-uniform:46` with another selection rule; `lora:8` on q, k and v; `lora-all:8`;
    `lora-fa:8`, whose A is frozen (arXiv 2308.03303); `lora-xs:46`, a trained square between frozen singular vectors
    (arXiv 2405.17604); `random:46`, the same square between random orthonormal vectors: CURLoRA without CUR.
    """
    kind, _, rank = name.partition(":")
    common = {"r": int(rank), "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    if kind.startswith("curlora"):
        selection = kind.partition("-")[2] or "inverse"
        return peft.get_peft_model(model, CurloraConfig(selection=selection, scale="adam", **common))
    if kind in ("lora-xs", "random"):
        plain = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "psoft_alpha": int(rank)}
        found = peft.get_peft_model(model, peft.PsoftConfig(**plain, **common))
        if kind == "random":
            _randomise(found, seed)
        return found
    if kind == "lora":
        common["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    found = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=int(rank), **common))
    if kind == "lora-fa":
        for parameter_name, parameter in found.named_parameters():
            parameter.requires_grad_("lora_B" in parameter_name)
    return found


def _randomise(model: peft.PeftModel, seed: int) -> None:
    """Random orthonormal factors in place of singular vectors, with the scale of `curlora:`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, PsoftLayer):
            rank = layer.r["default"]
            a, b = (torch.randn(size, rank, generator=generator) for size in (layer.in_features, layer.out_features))
            scale = scale_factor("adam", 1.0, layer.out_features, rank)
            layer._set_psoft_ab_cache_buffers(
                "default", torch.linalg.qr(a).Q.t().contiguous(), scale * torch.linalg.qr(b).Q
            )


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
        self.model = adapted(model, setting.adapter, setting.seed)
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
