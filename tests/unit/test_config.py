"""The configuration: every problem at once, each with field, value and remedy."""

import re
import typing
from pathlib import Path

import pytest

from pipelines.config.loading import load_config, parse_config
from pipelines.config.paths import CONFIGS
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import Section
from pipelines.config.tasks import TASKS
from pipelines.errors import ConfigError
from tests.conftest import minimal

TEST_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def problems_of(raw) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    return [str(problem) for problem in error.value.problems]


def test_unknown_key_names_the_nearest_valid_one(tmp_path):
    raw = minimal(tmp_path, tmp_path, training={"learnig_rate": 1e-3})
    assert problems_of(raw) == ["training: unknown key 'learnig_rate', did you mean 'learning_rate'?"]


def test_all_problems_are_reported_at_once(tmp_path):
    raw = minimal(tmp_path, tmp_path, adapter={"selection": "invers"}, training={"epochs": -1}, resorces={})
    raw["tasks"].append({"name": "b", "kind": "clasification", "data": "x"})
    found = "\n".join(problems_of(raw))
    assert "did you mean 'inverse'" in found
    assert "training.epochs: found -1" in found
    assert "unknown key 'resorces', did you mean 'resources'?" in found
    assert "tasks.1.kind: unknown kind 'clasification', did you mean 'classification'?" in found


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden", "x" * 65])
def test_names_cannot_leave_the_storage(tmp_path, name):
    assert any("safe name" in line for line in problems_of(minimal(tmp_path, tmp_path, name=name)))


def test_two_sources_cannot_share_a_name(tmp_path):
    raw = minimal(tmp_path, tmp_path, retention=[{"name": "reviews", "data": "x"}])
    assert "share the name(s) reviews" in problems_of(raw)[0]


def test_a_batch_must_feed_every_worker(tmp_path):
    raw = minimal(tmp_path, tmp_path, training={"batch_size": 2}, resources={"workers": 4})
    assert "raise batch_size or lower workers" in problems_of(raw)[0]


def test_verbalizer_needs_a_prompt(tmp_path):
    raw = minimal(tmp_path, tmp_path)
    raw["tasks"][0]["head"] = "verbalizer"
    assert "needs a prompt" in problems_of(raw)[0]


def test_overrides_reach_fields_and_lists_and_read_exponents(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"name: x\nbase_model: {{path: {tmp_path}}}\ntraining: {{learning_rate: 3e-3}}\n"
        "tasks: [{name: a, kind: language-modeling, data: ./here}]\n"
    )
    config = load_config(file, ["training.head_learning_rate=5e-2", "tasks.0.name=renamed", "adapter.r=4"])
    assert config.training.learning_rate == 3e-3
    assert config.training.head_learning_rate == 5e-2
    assert (config.tasks[0].name, config.adapter.r) == ("renamed", 4)


@pytest.mark.parametrize("override", ["training.epochs", "tasks.7.name=x", "training.epochs.deep.er=1"])
def test_impossible_override_is_bad_input(tmp_path, override):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"name: x\nbase_model: {{path: {tmp_path}}}\ntasks: [{{name: a, kind: language-modeling, data: x}}]\n"
    )
    with pytest.raises(ConfigError):
        load_config(file, [override])


def test_relative_paths_become_absolute_once(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    raw = minimal(tmp_path, "./data", storage="./runs", tracking={"uri": "sqlite:///mlflow.db"})
    config = parse_config(raw)
    monkeypatch.chdir("/")
    again = parse_config(config.model_dump())
    assert config == again
    assert config.tasks[0].data == str(tmp_path / "data")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_environment_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    assert parse_config(minimal(tmp_path, "${SOMEWHERE}/d")).tasks[0].data == f"{tmp_path}/d"
    assert problems_of(minimal(tmp_path, "${NOT_SET_ANYWHERE}/d")) == [
        "${NOT_SET_ANYWHERE}: this environment variable is not set"
    ]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\t- x"])
def test_broken_yaml_is_one_clear_problem(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert len(error.value.problems) == 1


def test_shipped_configurations_are_valid_and_name_nothing_outside_themselves(monkeypatch):
    for variable in ("CURLORA_DEMO", "CURLORA_DEMO_BASE"):
        monkeypatch.setenv(variable, "/somewhere/of-its-own")
    files = {file.stem: file for file in CONFIGS.glob("*.yaml")}
    assert files.keys() == {"demo", "demo-smollm2", "paper-gpt2-large", "paper-mistral-7b", "llama-70b"}
    for name, file in files.items():
        config = load_config(file)
        assert config.name == name
        for given in [config.base_model.path, *(source.data for source in [*config.tasks, *config.retention])]:
            assert given.startswith("/somewhere/") or re.fullmatch(r"[\w-]+/[\w.-]+", given), given


@pytest.mark.parametrize("file", sorted(TEST_CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_of_the_tests_are_valid_and_bear_the_name_of_their_file(file, monkeypatch):
    monkeypatch.setenv("SMOLLM2", "/somewhere")
    assert load_config(file).name == file.stem


def test_sequences_are_in_their_published_orders():
    orders = {
        "standard-cl-order1": "dbpedia amazon yahoo agnews",
        "standard-cl-order2": "dbpedia amazon agnews yahoo",
        "standard-cl-order3": "yahoo amazon agnews dbpedia",
        "long-15": "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    }
    for name, order in orders.items():
        assert " ".join(task.name for task in load_config(TEST_CONFIGS / f"{name}.yaml").tasks) == order
    assert {task.kind for task in load_config(TEST_CONFIGS / "mixed.yaml").tasks} == set(TASKS)


def test_the_ten_lines_of_the_readme_are_valid(tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "pipelines" / "docs" / "tasks.md").read_text()
    lines = readme.split("```yaml\n")[1].split("```")[0]
    assert len(lines.strip().splitlines()) <= 10
    (tmp_path / "mine.yaml").write_text(lines)
    assert len(load_config(tmp_path / "mine.yaml").tasks) == 5


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"kind": "generation", "prompt": "{q}"}, "prompt and completion belong together"),
        ({"kind": "generation", "prompt": "{q}", "completion": "{a}", "messages": "m"}, "give either"),
        ({"kind": "generation"}, "give either"),
        ({"kind": "multiple-choice", "prompt": "{q}", "choices": ["a"]}, "needs at least two choices"),
        ({"kind": "generation", "prompt": "{q", "completion": "{a}"}, "unbalanced braces"),
        ({"kind": "generation", "promt": "{q}"}, "did you mean 'prompt'?"),
        ({"kind": "language-modeling", "documents": "seperate"}, "did you mean 'separate'?"),
    ],
)
def test_tasks_that_make_no_sense(tmp_path, task, expected):
    found = problems_of(minimal(tmp_path, tmp_path, tasks=[{"name": "t", "data": "x"} | task]))
    assert expected in "\n".join(found)


def sections_below(section: type[Section]) -> list[type[Section]]:
    return [section, *(nested for child in section.__subclasses__() for nested in sections_below(child))]


@pytest.mark.parametrize("section", sections_below(Section)[1:], ids=lambda section: section.__name__)
def test_every_field_of_the_configuration_explains_itself_in_a_sentence(section):
    assert section.__dict__.get("__doc__"), "a section says what it is for"
    for name, field in section.model_fields.items():
        text = field.description or ""
        assert re.fullmatch(r"\S.{7,}\.", text), f"{name}: '{text}' is no sentence"
        optional = type(None) in typing.get_args(field.annotation)
        assert not optional or "null" in text, f"{name}: what does null mean?"


def test_all_sections_of_a_configuration_are_walked():
    nested = {
        part
        for field in PipelineConfig.model_fields.values()
        for part in [field.annotation, *typing.get_args(field.annotation)]
        if isinstance(part, type) and issubclass(part, Section)
    }
    assert nested and nested < set(sections_below(Section))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limits": 3}, "retention.0: unknown key 'limits', did you mean 'limit'?"),
        ({"suite": "lm_eval"}, "retention.0.suite: found 'lm_eval', did you mean 'lm-eval'?"),
        ({"limit": True}, "retention.0.limit: found true, expected a number"),
        ({"tasks": ["a", "a"]}, "retention.0.tasks: a is given twice; name each task once"),
        ({"name": "../x"}, "retention.0.name: "),
    ],
)
def test_an_entry_of_retention_with_a_suite_is_a_benchmark(tmp_path, change, expected):
    entry = {"name": "bench", "suite": "lm-eval", "tasks": ["arc_easy"]}
    (problem,) = problems_of(minimal(tmp_path, tmp_path, retention=[entry | change]))
    assert problem.startswith(expected)


def test_a_corpus_beside_a_benchmark_is_still_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = {"name": "bench", "suite": "lm-eval", "tasks": ["arc_easy", "own.yaml"]}
    raw = minimal(tmp_path, tmp_path, retention=[{"name": "wiki", "data": str(tmp_path)}, bench])
    config = parse_config(raw)
    assert ([c.name for c in config.corpora], [b.name for b in config.benchmarks]) == (["wiki"], ["bench"])
    assert config.benchmarks[0].tasks == ["arc_easy", str(tmp_path / "own.yaml")]
    assert problems_of(minimal(tmp_path, tmp_path, retention=[{"name": "wiki", "dat": "x"}])) == [
        "retention.0.data: is missing; it has no default",
        "retention.0: unknown key 'dat', did you mean 'data'?",
    ]
