"""Scores of a fixed model on 1, 2 and 3 real processes over gloo, in lockstep as under ZeRO-3, and by a plain loop."""

import importlib.util
import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from pipelines.config.loading import parse_config
from pipelines.data.benchmarks import load_benchmark
from pipelines.data.encoding import Encoder
from pipelines.data.samples import parts_of, questions_of
from pipelines.data.sets import evaluation_set
from pipelines.data.sources import load_split, records
from pipelines.distributed.world import World
from pipelines.evaluation.benchmarks import evaluate_benchmark
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.samples import answer
from tests.conftest import write_jsonl

CPU = torch.device("cpu")


HARNESS = importlib.util.find_spec("lm_eval") is not None
QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\nTopic:"
doc_to_choice: [World, Sports, Business, Science]
doc_to_target: label
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}\\nIt"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
"""


@pytest.fixture(scope="module")
def config(shared, tmp_path_factory):
    """Every kind over a few rows of real data, on the small pretrained model."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = [json.loads(line) for line in (shared / "data" / "agnews" / "test.jsonl").read_text().splitlines()[:23]]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    names = ["World", "Sports", "Business", "Science"]
    words = {"kind": "classification", "head": "verbalizer", "prompt": "{text}\nTopic:", "labels": names}
    tasks = [
        words | {"name": "words"},
        {"name": "choose", "kind": "multiple-choice", "prompt": "{text}\nTopic:", "choices": names},
        {"name": "write", "kind": "generation", "prompt": "{text}\nIt", "completion": "{label}", "max_new_tokens": 6},
        {"name": "read", "kind": "language-modeling"},
        {"name": "stream", "kind": "language-modeling", "documents": "joined"},
    ]
    raw = {
        "name": "x",
        "base_model": {"path": str(shared / "models" / "tiny-llama"), "dtype": "float32"},
        "training": {"max_length": 64},
        "evaluation": {"samples": {"prompts": ["The capital of", "She said"], "per_task": 2, "max_new_tokens": 12}},
    }
    if HARNESS:
        for name, text in {"quiz": QUIZ, "written": WRITTEN}.items():
            (folder / f"{name}.yaml").write_text(text)
        raw["retention"] = [
            {"name": name, "suite": "lm-eval", "tasks": [str(folder / f"{name}.yaml")]} for name in ("quiz", "written")
        ]
    return parse_config(raw | {"tasks": [task | {"data": str(folder)} for task in tasks]})


def work(rank: int, size: int, port: int, config: dict, batch_tokens: int, target: str) -> None:
    """One process, all kinds, in lockstep where there are others; rank 0 writes cells and outcomes."""
    import transformers

    torch.set_num_threads(1)
    group = None
    if size > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        group = torch.distributed.group.WORLD
    config = parse_config(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.base_model.path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.base_model.path)
    found = {}
    for task in config.tasks:
        evaluation = evaluation_set(task, tokenizer, config, 512)
        result = evaluate(model, evaluation, World(rank, size, CPU, size > 1, group), batch_tokens, "task", "key")
        if result is not None:
            found[task.name] = {"cell": result[0].to_json(), "outcomes": result[1]}
    for benchmark in config.benchmarks:
        world = World(rank, size, CPU, size > 1, group)
        loaded = load_benchmark(benchmark)
        result = evaluate_benchmark(model, loaded, tokenizer, 512, world, batch_tokens, "key")
        if result is not None:
            found[benchmark.name] = {"cell": result[0].to_json(), "outcomes": result[1]}
    questions = questions_of(config)
    asked = parts_of(questions, tokenizer, config, 512)
    samples = answer(model, questions, asked, World(rank, size, CPU, size > 1, group), batch_tokens)
    if rank == 0:
        found["samples"] = [sample.to_json() for sample in samples]
        Path(target).write_text(json.dumps(found))
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(config, tmp_path_factory) -> dict:
    """(workers, tokens a batch) → results."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for size, batch_tokens in ((1, 8192), (1, 1), (2, 700), (3, 300)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        target = tmp_path_factory.mktemp("out") / "found.json"
        arguments = (size, port, config.model_dump(), batch_tokens, str(target))
        if size == 1:
            threads = torch.get_num_threads()
            work(0, *arguments)
            torch.set_num_threads(threads)
            found[size, batch_tokens] = json.loads(target.read_text())
            continue
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * size
        found[size, batch_tokens] = json.loads(target.read_text())
    return found


def test_sample_answers_do_not_depend_on_workers_or_batch_size(results):
    wanted = results[1, 8192]["samples"]
    assert len(wanted) == 2 + 2 * 5
    assert all(found["samples"] == wanted for found in results.values())


def test_scores_do_not_depend_on_workers_or_batch_size(config, results):
    wanted = results[1, 8192]
    for found in results.values():
        for name in (task.name for task in config.tasks):
            result = found[name]
            cell, expected = result["cell"], wanted[name]["cell"]
            assert cell["count"] == expected["count"]
            assert cell["tokens"] == expected["tokens"]
            if cell["metric"] == "nll":
                assert cell["nll"] == pytest.approx(expected["nll"], abs=1e-4)
                assert cell["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
            else:
                assert cell["value"] == expected["value"]
                predictions = [outcome["prediction"] for outcome in result["outcomes"]]
                assert predictions == [outcome["prediction"] for outcome in wanted[name]["outcomes"]]


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed; pip install 'curlora[lm-eval]'")
@pytest.mark.parametrize("name", ["quiz", "written"])
def test_benchmarks_do_not_depend_on_workers_or_batch_size(results, name):
    wanted = results[1, 8192][name]
    assert wanted["cell"]["count"] == 23
    if name == "written":
        assert len({outcome["prediction"] for outcome in wanted["outcomes"]}) > 1
    for found in results.values():
        assert found[name]["outcomes"] == wanted["outcomes"]


def test_text_scores_are_those_of_a_plain_loop(config, results):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.base_model.path, dtype=torch.float32).eval()
    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(config.base_model.path), 64)
    texts = [row["text"] for row in records(load_split(config.task("read"), "test"))]
    documents = [[*ids, encoder.end] for ids in encoder.documents(texts)]
    streams = {"read": documents, "stream": [[token for document in documents for token in document]]}
    for name, parts in streams.items():
        total = count = 0
        for ids in parts:
            scored = 1
            while scored < len(ids):  # windows of 64 that move on by 32
                stop = min(len(ids), 64 if scored == 1 else scored + 32)
                seen = torch.tensor([ids[max(0, stop - 64) : stop]])
                with torch.no_grad():
                    chances = model(input_ids=seen).logits[0].log_softmax(-1)
                new = range(scored - stop, 0)  # counted from the window's end
                total -= sum(chances[position - 1, ids[stop + position]].item() for position in new)
                count, scored = count + len(new), stop
        cell = results[1, 8192][name]["cell"]
        assert cell["tokens"] == count
        assert cell["nll"] == pytest.approx(total / count, abs=1e-4)
