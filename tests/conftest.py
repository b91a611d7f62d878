"""The shared data and model, what is skipped without them, a model small enough for unit tests, and whole chains."""

import json
import os
from pathlib import Path

import pytest

from tests.bench import Bench, WarmWorkers

# `datasets` counts every file that it reads, local ones too, by a request to the hub: seconds a file without a network
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = (
    *("the", "a", "film", "story", "actor", "plot", "joke", "is", "was", "good", "bad", "dull", "warm"),
    *("bright", "slow", "review", "label", "and", "of", "with"),
)


def pytest_addoption(parser):
    parser.addoption("--chaos", type=int, default=0, help="random damages a strategy in the chaos test; 0: short form")
    parser.addoption("--chaos-seed", default="0", help="seed of the moments and kinds of damage")


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
    return make_tokenizer()


def make_tokenizer():
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
    return make_model(tokenizer)


def make_model(tokenizer, hidden: int = 16):
    """An untrained two-layer Llama in fp32. Its narrowest linear layers have `hidden` / 2 outputs."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def reviews(tmp_path) -> Path:
    return write_reviews(tmp_path / "reviews")


def write_reviews(folder: Path, ending: str = "") -> Path:
    """A two-class folder whose label is the adjective of the sentence; another ending makes it another task."""
    folder.mkdir()
    sentences = {0: "the film is bad and dull", 1: "the film is good and warm"}
    for split, count in (("train", 24), ("test", 10)):
        rows = [{"sentence": f"{sentences[i % 2]} {WORDS[i % 5]}{ending}", "label": i % 2} for i in range(count)]
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
        "base_model": {"path": str(tmp_path), "dtype": "float32"},
        "storage": str(tmp_path / "runs"),
        "tasks": [task],
        **changes,
    }


@pytest.fixture(scope="module")
def bucket():
    """A real S3 server on loopback, with the environment that points clients at it."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask s3fs")
    pytest.importorskip("s3fs", reason="pip install s3fs")
    import s3fs

    s3 = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("http_proxy", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        fs.mkdir("tasks")
        yield fs
        fs.rm("tasks", recursive=True)  # moto's stores are one for a process
        s3fs.S3FileSystem.clear_instance_cache()
    s3.stop()


@pytest.fixture(scope="session")
def demo_assets(tmp_path_factory):
    from pipelines.demo.build import prepare_demo

    cache = os.environ.get("CURLORA_TEST_CACHE")
    return prepare_demo(Path(cache) if cache else tmp_path_factory.mktemp("demo"), preset="test")


@pytest.fixture(scope="session")
def warm_workers(tmp_path_factory):
    workers = WarmWorkers(tmp_path_factory.mktemp("warm"))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def bench(demo_assets, warm_workers, tmp_path_factory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    classification = next(path for path in demo_assets.tasks.values() if (path / "labels.json").exists())
    text = next(path for path in demo_assets.tasks.values() if not (path / "labels.json").exists())
    first = {"name": "part", "kind": "classification", "data": str(classification)}
    raw = {
        "base_model": {"path": str(demo_assets.base_model), "dtype": "float32"},
        "adapter": {"type": "curlora", "r": 8},
        "training": {"max_steps": 24, "max_length": 48, "learning_rate": 1e-2},
        "resources": {"workers": 2},
        "tasks": [
            first,
            first | {"name": "word", "head": "verbalizer", "prompt": "{text}\nPart:"},
            {"name": "text", "kind": "language-modeling", "data": str(text)},
        ],
        "retention": [{"name": "other", "data": str(demo_assets.retention), "window": 48}],
        "evaluation": {"samples": {"prompts": ["This function returns"], "max_new_tokens": 8}},
        "tracking": None,
        "storage": str(root / "runs"),
    }
    return Bench(root, raw, warm_workers)


@pytest.fixture(scope="session")
def reference(bench) -> dict:
    """The undisturbed run, by the command line: two workers under ZeRO-2, lineage in a SQLite store."""
    store = {"uri": f"sqlite:///{bench.root}/mlflow.db", "experiment": "integration"}
    return bench.run(bench.config("reference", tracking=store))
