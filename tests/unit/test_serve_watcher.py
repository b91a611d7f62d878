"""Adapters by name, and the watch on a real registry: what a promotion, a rollback and a broken version do."""

import shutil
import threading
import time

import pytest
import transformers

from pipelines.inference.predict import predict
from pipelines.lineage import registry
from pipelines.lineage.logged_models import Adapter, learned_tasks, write_model
from pipelines.runs.identity import base_fingerprint
from pipelines.serve.catalogue import Catalogue, UnknownModel
from pipelines.serve.contract import AdapterError
from pipelines.serve.engine import Engine, Limits
from pipelines.serve.shared_model import SharedModel
from pipelines.serve.sources import step_of_run
from pipelines.serve.watcher import Watcher
from tests.conftest import make_tokenizer
from tests.unit.serving import Answer, ask, greedy_alone, register, write_base, write_run

PROMPT = [40, 3, 41, 12]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs on one base: name → run."""
    root = tmp_path_factory.mktemp("runs")
    base = write_base(root / "base", make_tokenizer())
    return {name: write_run(root, base, name, number) for number, name in enumerate(("one", "two", "three"), 1)}


@pytest.fixture
def catalogue(runs):
    yield from _catalogue(runs, most=8)


def _catalogue(runs, most):
    config = runs["one"].config()
    base = transformers.AutoModelForCausalLM.from_pretrained(config.base_model.path).eval()
    engine = Engine(SharedModel(base), make_tokenizer(), Limits(4096, 8, 64))
    storage = runs["one"].uri.rpartition("/")[0]
    yield Catalogue(engine, config, base_fingerprint(config.base_model), storage, 64, most)
    engine.close()


@pytest.fixture
def watch(catalogue, store, client, request):
    """A watcher of a model of the test's own, and a function that registers a run under an alias."""
    name = request.node.name.partition("[")[0]
    told = []
    watcher = Watcher(store, name, catalogue, 0.05, lambda *what: told.append(what))
    watcher.promote = lambda run, alias="champion": register(client, name, run, alias)
    watcher.heard, watcher.client = told, client
    yield watcher
    watcher.close()


def _says(catalogue, name: str, tokens: int = 12) -> list[int]:
    answer = Answer()
    with catalogue.using(name) as served:
        catalogue.engine.submit([ask(served.key, PROMPT, tokens)], [answer])
        return answer.wait().tokens


def _alone(run, tokens: int = 12) -> list[int]:
    """What the last step of a run says without any server."""
    from pathlib import Path

    base = transformers.AutoModelForCausalLM.from_pretrained(run.config().base_model.path).eval()
    return greedy_alone(base, Path(run.path(run.results().steps[-1].directory)), PROMPT, tokens)


# -- names
def test_names_choose_the_adapter(catalogue, runs):
    said = {name: _says(catalogue, f"{name}/mood") for name in runs}
    assert said == {name: _alone(run) for name, run in runs.items()}
    assert len({tuple(tokens) for tokens in [*said.values(), _says(catalogue, "base")]}) == 4
    assert _says(catalogue, "two/1") == said["two"], "a step has its position as name, too"
    assert catalogue.count == 3, "each adapter is loaded once"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("champion", "use one of: base, <run>/<step>"),
        ("ghost/mood", "no model 'ghost/mood'"),
        ("one/ghost", "no finished step 'ghost'; finished: mood"),
        ("../one/mood", "no model"),
        ("one/../../secret", "no model"),
        ("x" * 500, r"xxx\.\.\.'"),
    ],
)
def test_names_of_nothing_are_answered_with_what_there_is(catalogue, name, expected):
    with pytest.raises(UnknownModel, match=expected):
        catalogue.acquire(name)


def test_room_is_made_by_the_adapter_unused_for_longest(runs):
    for catalogue in _catalogue(runs, most=2):
        first = catalogue.acquire("one/mood")
        _says(catalogue, "two/mood")
        assert _says(catalogue, "three/mood") == _alone(runs["three"])
        assert catalogue.engine.model.names == {first.key, catalogue.acquire("three/mood").key}, "one is in use"
        assert _says(catalogue, "two/mood") == _alone(runs["two"]), "more than the limit, rather than a refusal"
        catalogue.release(first)


def test_an_adapter_of_another_base_or_with_damaged_files_is_refused(catalogue, runs, tmp_path):
    other = write_base(tmp_path / "base", make_tokenizer())
    (other / "config.json").write_text((other / "config.json").read_text().replace("10000.0", "9000.0"))
    foreign = write_run(tmp_path, other, "foreign", 1)
    with pytest.raises(AdapterError, match="was trained on base"):
        catalogue.place("champion", step_of_run(foreign, None))
    shutil.copytree(runs["one"].uri, tmp_path / "runs" / "cut")
    cut = type(foreign)(str(tmp_path / "runs" / "cut"))
    file = cut.path(cut.results().steps[0].directory) + "/adapter/adapter_model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(100)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing or damaged"):
        catalogue.place("champion", step_of_run(cut, None))
    assert catalogue.aliases == {} and catalogue.count == 0


def test_tasks_are_answered_as_predict_answers_them(catalogue, runs):
    from dataclasses import replace

    from tests.unit.serving import ROWS

    with catalogue.using("two/mood") as served, catalogue.using("one/mood"):
        for task in ("mood", "topic", "choose", "write"):
            rows = [{k: row[k] for k in ("text", "choices")} for row in ROWS[:6]]

            def answer(task=task, rows=rows):
                with catalogue.engine.model.alone(served.key) as model:
                    return replace(served.loaded.trained, model=model).answer(task, rows)

            found = catalogue.engine.call(answer).result()
            assert found == predict(runs["two"], task, rows)
            if task in ("topic", "write"):
                assert found != predict(runs["one"], task, rows), "adapters that agree would prove nothing"


# -- the registry
def test_a_promotion_and_the_way_back_reach_new_requests(watch, catalogue, runs):
    watch.look()
    assert catalogue.aliases == {}, "no champion yet"
    first = watch.promote(runs["one"])
    watch.look()
    assert _says(catalogue, "champion") == _alone(runs["one"])
    watch.promote(runs["two"])
    watch.look()
    assert _says(catalogue, "champion") == _alone(runs["two"])
    registry.set_champion(watch.uri, registry.by_number(watch.uri, watch.name, first), "back")
    watch.look()
    watch.look()
    assert _says(catalogue, "champion") == _alone(runs["one"])
    assert watch.heard == [("champion", "swapped")] * 3
    assert catalogue.aliases["champion"].facts()["name"] == f"models:/{watch.name}/1"


def test_a_request_ends_on_the_adapter_it_began_with(watch, catalogue, runs):
    watch.promote(runs["one"])
    watch.look()
    answer = Answer()
    with catalogue.using("champion") as served:
        catalogue.engine.submit([ask(served.key, PROMPT, 50)], [answer])
        answer.pieces.append(answer.queue.get(timeout=60))
        watch.promote(runs["two"])
        watch.look()
        assert _says(catalogue, "champion") == _alone(runs["two"])
        assert answer.wait().tokens == _alone(runs["one"], 50)


def test_a_champion_that_does_not_load_leaves_the_old_one(watch, catalogue, runs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pipelines.serve.watcher.RETRY_SECONDS", (0.0, 0.0))
    watch.promote(runs["one"])
    watch.look()
    shutil.copytree(runs["two"].uri, tmp_path / "two")
    broken = type(runs["two"])(str(tmp_path / "two"))
    file = tmp_path / "two" / broken.results().steps[0].directory / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the right size
    number = watch.promote(broken)
    watch.look()
    assert _says(catalogue, "champion") == _alone(runs["one"])
    assert watch.failures["champion"].version == number and "damaged" in watch.failures["champion"].reason
    watch.look()
    assert [r.levelname for r in caplog.records if "does not load" in r.message] == ["ERROR"], "said once"
    file.write_bytes(content)
    watch.look()
    assert _says(catalogue, "champion") == _alone(runs["two"]) and watch.failures == {}
    assert [outcome for _, outcome in watch.heard] == ["swapped", "failed", "failed", "swapped"]


def test_a_broken_version_is_not_tried_at_every_look(watch, catalogue, runs, tmp_path):
    shutil.copytree(runs["two"].uri, tmp_path / "two")
    watch.promote(type(runs["two"])(str(tmp_path / "two")))
    shutil.rmtree(tmp_path / "two")
    for _ in range(3):
        watch.look()
    assert watch.heard == [("champion", "failed")]
    assert "champion" not in catalogue.aliases


def test_a_champion_whose_run_is_gone_comes_from_mlflows_copy(watch, catalogue, runs, tmp_path):
    shutil.copytree(runs["two"].uri, tmp_path / "two")
    run = type(runs["two"])(str(tmp_path / "two"))
    directory, config = run.results().steps[-1].directory, run.config()
    metrics = run.metrics(directory)
    learned = learned_tasks([(config, metrics)])
    kept = Adapter(run, directory, metrics, config.model_copy(update={"tasks": learned}), metrics.parent)
    write_model(kept, tmp_path / "model")
    expected = _alone(run)
    register(watch.client, watch.name, run, "champion", source=str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "two")
    watch.look()
    assert _says(catalogue, "champion") == expected
    with catalogue.using("champion") as served:
        assert served.loaded.trained.tasks == {"mood", "topic", "choose", "write"}


def test_the_candidate_follows_its_alias_and_leaves_with_it(watch, catalogue, runs, client):
    watch.promote(runs["one"])
    watch.promote(runs["two"], "candidate")
    watch.look()
    assert _says(catalogue, "candidate") == _alone(runs["two"])
    client.delete_registered_model_alias(watch.name, "candidate")
    client.delete_registered_model_alias(watch.name, "champion")
    watch.look()
    assert set(catalogue.aliases) == {"champion"}, "without a successor, the champion goes on"


def test_a_registry_that_is_gone_stops_nothing(watch, catalogue, runs, monkeypatch):
    watch.promote(runs["one"])
    watch.look()
    uri, watch.uri = watch.uri, "http://127.0.0.1:9"
    watch.look()
    assert "no server answers" in watch.unreachable
    assert _says(catalogue, "champion") == _alone(runs["one"])
    watch.uri = uri
    watch.look()
    assert watch.unreachable is None


def test_swaps_while_many_ask_lose_no_request(watch, catalogue, runs):
    numbers = [watch.promote(runs[name]) for name in ("two", "one")]
    watch.look()
    watch.start()
    expected = {tuple(_alone(run)): name for name, run in runs.items()}
    heard, wrong, end = [], [], threading.Event()

    def client() -> None:
        while not end.is_set():
            try:
                heard.append(expected[tuple(_says(catalogue, "champion"))])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in [*numbers, *numbers]:
        registry.set_champion(watch.uri, registry.by_number(watch.uri, watch.name, number), "to and fro")
        now = time.monotonic()
        while catalogue.aliases["champion"].step.version.version != number:
            assert time.monotonic() - now < 30
            time.sleep(0.01)
        time.sleep(0.1)
    end.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and {"one", "two"} <= set(heard)
