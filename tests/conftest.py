"""Where the shared data and model lie, what is skipped without them, and a model small enough for unit tests."""

import json
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = (
    *("the", "a", "film", "story", "actor", "plot", "joke", "is", "was", "good", "bad", "dull", "warm"),
    *("bright", "slow", "review", "label", "and", "of", "with"),
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real datasets and the small pretrained model, beside the repository."""
    if not (SHARED / "data").is_dir() or not (SHARED / "models" / "tiny-llama").is_dir():
        pytest.skip("needs ../shared/data and ../shared/models beside the repository")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory):
    """Neither rows nor tokens of a test stay on the machine, and none are found there."""
    folder = str(tmp_path_factory.mktemp("caches"))
    with pytest.MonkeyPatch.context() as patch:
        if "CURLORA_TEST_CACHE" not in os.environ:
            patch.setenv("CURLORA_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer over a handful of words, with its special tokens."""
    import tokenizers
    import transformers

    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator([" ".join(WORDS)] * 4, vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


@pytest.fixture
def model(tokenizer):
    """An untrained two-layer Llama in fp32."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def reviews(tmp_path) -> Path:
    """A two-class folder whose label is the adjective of the sentence."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    sentences = {0: "the film is bad and dull", 1: "the film is good and warm"}
    for split, count in (("train", 24), ("test", 10)):
        rows = [{"sentence": f"{sentences[i % 2]} {WORDS[i % 5]}", "label": i % 2} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    (folder / "labels.json").write_text(json.dumps(["negative", "positive"]))
    return folder


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def minimal(tmp_path, data, **changes) -> dict:
    """The smallest valid configuration as a plain mapping."""
    task = {"name": "reviews", "kind": "classification", "data": str(data), "text": "sentence"}
    return {
        "name": "unit",
        "base_model": {"path": str(tmp_path)},
        "storage": str(tmp_path / "runs"),
        "tasks": [task],
        **changes,
    }
