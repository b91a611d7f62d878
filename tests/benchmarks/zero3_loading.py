"""Memory of loading a base: does a worker under ZeRO-3 ever hold a whole copy? Against ZeRO-2, which keeps one.

A Llama of random weights is written once, then two workers (gloo, CPU) load it by the very code that a chain uses,
each in a process of its own, and read every number once. Its memory is looked at every 2 ms. Anonymous memory is what
a copy costs; pages of the mapped file are the kernel's, which takes them back when it needs them. Run by hand:

    python tests/benchmarks/zero3_loading.py [--megabytes 400]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LOOK_SECONDS = 0.002
WORKERS = 2


def write_model(folder: Path, megabytes: float) -> int:
    """A Llama of about so many megabytes in fp32; its exact bytes."""
    import transformers

    hidden = 768
    per_layer = 4 * hidden**2 + 3 * hidden * 4 * hidden
    layers = max(1, round((megabytes * 1e6 / 4 - 2 * 8000 * hidden) / per_layer))
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    save_random(config, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def save_random(config, folder: Path) -> None:
    """A Llama of random weights, with the least of a tokenizer."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)


class Watch:
    """The peaks of this process's memory, in bytes: anonymous (`RssAnon`) and all of it (`VmRSS`)."""

    def __init__(self):
        self.before = self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmRSS")))
        return {name: int(value.split()[0]) * 1024 for name, value in found.items()}

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.peak = {name: max(value, self.peak[name]) for name, value in self.now().items()}

    def end(self) -> dict[str, int]:
        """Growth since the beginning: peaks, and what is left."""
        self._stop.set()
        self._thread.join()
        left = self.now()
        peaks = {f"peak {name}": self.peak[name] - self.before[name] for name in left}
        return peaks | {f"kept {name}": left[name] - self.before[name] for name in left}


def load(model: str, stage: str, rank: int, port: str) -> None:
    """In a worker: join the other one, load as a chain's worker does, say what it took."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    os.environ |= {"LOCAL_RANK": str(rank)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORKERS)
    from pipelines.config.pipeline import PipelineConfig
    from pipelines.distributed import engine, zero_settings
    from pipelines.distributed.world import World
    from pipelines.workers.resident_model import load_frozen_base

    engine.prepare_environment()
    task = {"name": "none", "kind": "language-modeling", "data": "."}
    raw = {"name": "loading", "base_model": {"path": model, "dtype": "float32"}, "tasks": [task], "deepspeed": stage}
    world = World(rank, WORKERS, torch.device("cpu"), lockstep=stage == "zero3")
    config = PipelineConfig.model_validate(raw)
    settings = zero_settings.complete_settings(config, WORKERS)
    import transformers

    transformers.AutoModelForCausalLM  # noqa: B018  imported here: that is no part of the loading
    torch.distributed.barrier()
    watch = Watch()
    begun = time.time()
    base, _, _partitioning = load_frozen_base(config.base_model, settings, world)
    for parameter in base.parameters():  # under ZeRO-2 the weights are a mapped file, which is read at first use
        getattr(parameter, "ds_tensor", parameter).sum()
    found = watch.end()
    held, whole = engine.parameters_held(base)
    torch.distributed.barrier()
    print(json.dumps(found | {"seconds": time.time() - begun, "held": held, "whole": whole}))


def measure(model: str, stage: str) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, "--load", model, "--stage", stage, "--port", port, "--rank"]
    started = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        for rank in range(WORKERS)
    ]
    said = [process.communicate()[0].decode().splitlines() for process in started]
    found = [json.loads(next(line for line in lines if line.startswith("{"))) for lines in said]
    assert not any(process.returncode for process in started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=400)
    for hidden in ("--load", "--stage", "--port"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.stage, arguments.rank, arguments.port)
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = write_model(Path(scratch), arguments.megabytes)
        print(f"model: {size / 1e6:.0f} MB in fp32, {WORKERS} workers; growth while loading, in copies of the model")
        print("stage  rank  peak anonymous  peak resident  kept anonymous  numbers held  seconds")
        for stage in ("zero2", "zero3"):
            for rank, found in enumerate(measure(scratch, stage)):
                copies = [found[name] / size for name in ("peak RssAnon", "peak VmRSS", "kept RssAnon")]
                print(
                    f"{stage}  {rank:4d}  {copies[0]:14.2f}  {copies[1]:13.2f}  {copies[2]:14.2f}  "
                    f"{found['held'] / found['whole']:12.2f}  {found['seconds']:7.1f}"
                )


if __name__ == "__main__":
    main()
