"""The first minute: the schema that editors read, and the configuration that `curlora init` writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from pipelines.cli.app import main
from pipelines.config.loading import load_config, read_yaml
from pipelines.config.names import STRATEGIES
from pipelines.config.paths import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
HEADER = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)
EXAMPLE = {"name": "x", "base_model": {"path": "y"}, "tasks": [{"name": "a", "kind": "classification", "data": "x"}]}
WRITTEN = [*CONFIGS.glob("*.yaml"), *(ROOT / "tests" / "configs").glob("*.yaml")]


@pytest.fixture(scope="module")
def schema() -> dict:
    called = CliRunner().invoke(main, ["schema"])
    assert called.exit_code == 0, called.output
    return json.loads(called.output)


@pytest.fixture(scope="module")
def validator(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def sections(part) -> list[dict]:
    """Every mapping of properties below a part of the schema."""
    if isinstance(part, list):
        return [found for item in part for found in sections(item)]
    if not isinstance(part, dict):
        return []
    own = [part["properties"]] if "description" in part and "properties" in part else []
    return own + [found for value in part.values() for found in sections(value)]


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
def test_every_configuration_of_this_project_is_valid(validator, file):
    assert [error.message for error in validator.iter_errors(read_yaml(file))] == []


def test_every_field_is_explained(schema):
    found = sections(schema)
    assert len(found) > 15
    unexplained = [name for section in found for name, field in section.items() if not field.get("description")]
    assert unexplained == []


@pytest.mark.parametrize(
    "change",
    [
        {"trainig": {}},
        {"training": {"learning_rate": "fast"}},
        {"training": {"learning_rate": -1}},
        {"adapter": {"selection": "invers"}},
        {"strategy": {"name": "replya"}},
        {"strategy": {"name": "replay", "strength": 3}},
        {"strategy": {"name": "ewc", "strength": "strong"}},
        {"tasks": [{"name": "a", "kind": "clasification", "data": "x"}]},
        {"tasks": [{"name": "a", "kind": "classification", "data": "x", "txt": "y"}]},
    ],
)
def test_what_a_run_would_refuse_is_underlined(validator, change):
    assert validator.is_valid(EXAMPLE)
    assert not validator.is_valid(EXAMPLE | change)


def test_all_strategies_and_their_options_are_known(schema, validator):
    strategy = schema["$defs"]["StrategyConfig"]
    assert set(strategy["properties"]["name"]["enum"]) == set(STRATEGIES)
    assert validator.is_valid(EXAMPLE | {"strategy": {"name": "ewc", "strength": 3}})
    assert re.search(r"^ewc: λ.*\(≥ 0\)$", strategy["properties"]["strength"]["description"], re.MULTILINE)
    assert "default" not in schema["$defs"]["AdapterConfig"]["properties"]["r"], "it depends on the type"


def test_the_first_line_of_the_readmes_example_names_a_schema_that_it_satisfies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    example = next(block.split("```")[0] for block in readme.split("```yaml\n")[1:] if "name: support-bot" in block)
    (name,) = HEADER.findall(example)
    assert example.startswith("# yaml-language-server"), "an editor reads the first line"
    assert f"curlora schema --to {name}" in readme
    assert CliRunner().invoke(main, ["schema", "--to", name]).exit_code == 0
    jsonschema.Draft7Validator(json.loads((tmp_path / name).read_text())).validate(yaml.safe_load(example))


def test_init_writes_a_configuration_that_passes_a_dry_run(tmp_path, monkeypatch, validator):
    from tests.conftest import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    called = CliRunner().invoke(main, ["init", "mine", "--base", "./base"])
    assert called.exit_code == 0, called.output
    assert "cd mine && curlora run chain.yaml --dry-run" in called.output
    monkeypatch.chdir(tmp_path / "mine")
    text = Path("chain.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=./curlora.schema.json\n")
    assert json.loads(Path("curlora.schema.json").read_text())["title"]
    assert validator.is_valid(yaml.safe_load(text))
    config = load_config("chain.yaml")
    assert config.base_model.path == str(tmp_path / "base")
    assert [task.kind for task in config.tasks] == ["classification", "classification", "language-modeling"]
    called = CliRunner().invoke(main, ["run", "chain.yaml", "--dry-run", "--set", "adapter.r=4"])
    assert called.exit_code == 0, called.output
    assert "warning" not in called.output, "the example data has no flaw"


def test_init_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text("mine")
    called = CliRunner().invoke(main, ["init", "--base", "some/model"])
    assert called.exit_code == 2 and "has chain.yaml already" in called.output
    assert os.listdir() == ["chain.yaml"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_documented_completion_prints_a_script(shell):
    code = "import sys; sys.argv = ['curlora']; from pipelines.cli.app import main; main(prog_name='curlora')"
    environment = os.environ | {"_CURLORA_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "curlora" in done.stdout and "complet" in done.stdout
    assert f"{shell}_source" in (ROOT / "README.md").read_text()


def test_completion_finds_commands_and_options():
    code = "import sys; sys.argv = ['curlora']; from pipelines.cli.app import main; main(prog_name='curlora')"
    environment = os.environ | {"_CURLORA_COMPLETE": "bash_complete", "COMP_WORDS": "curlora sch", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"plain,schedule", "plain,schema"}
