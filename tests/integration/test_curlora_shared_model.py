"""The shared model: generation, a plain Trainer run on real text, and the converted adapter without this package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from curlora import CurloraConfig
from curlora.conversion import to_lora

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL, TEXT = SHARED / "models" / "tiny-llama", SHARED / "data" / "domain_biomed_pubmedqa"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="../shared/models/tiny-llama is not here")

PROMPT = "The patients were treated with"
STOCK_PEFT = """
import json, sys
sys.modules["curlora"] = None  # importing it raises ImportError from here on
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    logits = model(**inputs).logits
generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(json.dumps({"logits": logits.flatten().tolist(), "generated": generated[0].tolist()}))
"""


def blocks(tokenizer, split, count, length=128):
    rows = [json.loads(line) for line in (TEXT / f"{split}.jsonl").open()]
    ids = tokenizer("\n".join(row["text"] for row in rows))["input_ids"]
    pieces = [torch.tensor(ids[i : i + length]) for i in range(0, len(ids) - length, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces[:count]]


def generate(model, tokenizer):
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    return model.eval().generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """60 steps of plain Trainer on biomedical text; the adapter is saved by the Trainer itself."""
    path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), CurloraConfig(r=16, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        max_steps=60,
        learning_rate=1e-2,
        warmup_steps=5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks(tokenizer, "train", 480),
        eval_dataset=blocks(tokenizer, "test", 48),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(path / "adapter"))
    return {"model": model, "tokenizer": tokenizer, "path": path, "before": before, "after": after}


def test_plain_trainer_learns_held_out_text(trained):
    assert trained["after"] < trained["before"] - 0.1


def test_the_base_generates_the_same_with_an_untrained_adapter():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    expected = generate(base, tokenizer)
    assert generate(get_peft_model(base, CurloraConfig(r=16)), tokenizer) == expected


def test_the_saved_adapter_generates_what_the_trained_model_generates(trained):
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), trained["path"] / "adapter")
    found = generate(loaded, trained["tokenizer"])
    assert found == generate(trained["model"], trained["tokenizer"])
    assert found != generate(AutoModelForCausalLM.from_pretrained(MODEL), trained["tokenizer"])


def test_the_converted_adapter_runs_in_a_process_that_cannot_import_curlora(trained, tmp_path):
    to_lora(trained["path"] / "adapter", tmp_path / "lora")
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", STOCK_PEFT, str(MODEL), str(tmp_path / "lora"), PROMPT]
    result = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    inputs = trained["tokenizer"](PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = trained["model"].eval()(**inputs).logits.flatten()
    # 7 adapted matrices in each of 4 layers add their rounding: 1e-5 a layer, relative to logits of about 10.
    assert (torch.tensor(found["logits"]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found["generated"] == generate(trained["model"], trained["tokenizer"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trained_adapter_keeps_its_gain_on_the_base_in_half_precision(trained, dtype):
    def loss(model):
        with torch.no_grad():
            rows = blocks(trained["tokenizer"], "test", 12)
            return sum(float(model(r["input_ids"][None], labels=r["labels"][None]).loss) for r in rows) / 12

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    plain = loss(base)
    adapted = loss(PeftModel.from_pretrained(base, trained["path"] / "adapter").eval())
    gain = trained["before"] - trained["after"]
    assert plain - adapted > 0.7 * gain
