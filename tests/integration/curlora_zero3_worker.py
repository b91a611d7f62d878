"""One rank of the ZeRO-3 test: adapt a partitioned base, train with plain Trainer, save; see test_curlora_zero3.py.

Run by torchrun as ``curlora_zero3_worker.py STAGE BASE OUT``; stage 0 is the same training without DeepSpeed.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from curlora import CurloraConfig
from curlora.callback import ProjectUpdates
from curlora.layer import gathered

BOUND = 0.02


def start_deepspeed():
    import deepspeed

    # Plain gloo: DeepSpeed's shared-memory operator would take a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def arguments(stage, out):
    world = torch.distributed.get_world_size() if stage else 1
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        per_device_train_batch_size=4 // world,
        max_steps=6,
        learning_rate=3e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **({"deepspeed": config, "ddp_backend": "gloo"} if stage else {}),
    )


def examples():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": t, "labels": t} for t in torch.randint(0, 64, (64, 12), generator=generator)]


def snapshot(model):
    """Everything that the ranks must agree on, gathered."""
    result = {}
    for name, layer, core in model.base_model.cores("default"):
        with gathered(core.U), layer.base_tensors() as (weight, _):
            rows, columns, _ = core.read_record()
            result[name] = {
                "U": core.U.detach().flatten().tolist(),
                "rows": rows.tolist(),
                "columns": columns.tolist(),
                "share": core.update_norm() / float(weight.norm()),
            }
    return result


def check_merge(model):
    """Merging writes W + ΔW into the shards, unmerging takes it out again."""
    _, layer, _ = model.base_model.cores("default")[0]

    def weight():
        with layer.base_tensors() as (tensor, _):
            return tensor.clone()

    before, (columns, middle, rows) = weight(), layer.factors("default")
    model.merge_adapter()
    assert torch.allclose(weight(), before + columns @ middle @ rows, atol=1e-6)
    assert not torch.allclose(weight(), before, atol=1e-6)
    model.unmerge_adapter()
    assert torch.allclose(weight(), before, atol=1e-6)


def main(stage, base_directory, out):
    if stage:
        start_deepspeed()
    args = arguments(stage, out)  # before from_pretrained: it switches the partitioned loading on
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    local = sum(p.numel() for p in base.parameters())
    config = CurloraConfig(r=4, carry="stack", max_update_norm=BOUND)
    model = get_peft_model(base, config)
    trainer = Trainer(model=model, args=args, train_dataset=examples(), callbacks=[ProjectUpdates()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = snapshot(model)
    trainer.save_model(str(out / "adapter"))
    rank = torch.distributed.get_rank() if stage else 0
    partitioned = sum(getattr(p, "ds_tensor", p).numel() for p in base.parameters())
    report = {"losses": losses, "layers": seen, "before": local, "local": partitioned, "bound": BOUND}
    (out / f"rank{rank}.json").write_text(json.dumps(report))
    if stage:
        torch.distributed.barrier()
        reloaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_directory), str(out / "adapter"), is_trainable=True
        )
        again = snapshot(reloaded)
        assert all(again[n]["rows"] == seen[n]["rows"] for n in seen), "the saved indices load on a partitioned base"
        assert all(torch.allclose(torch.tensor(again[n]["U"]), torch.tensor(seen[n]["U"])) for n in seen)
        check_merge(reloaded)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
