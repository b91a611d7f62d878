"""`start_from` a plain PEFT adapter: found, checked against base and `adapter:`, imported as a step."""

import json
import shutil

import peft
import pytest
import torch
import yaml
from click.testing import CliRunner

from curlora import CurloraConfig
from pipelines.chain.adapter_folder import doubt, import_folder
from pipelines.chain.plan import make_plan, stored_problems
from pipelines.chain.start import find_start
from pipelines.cli.app import main
from pipelines.config.loading import parse_config
from pipelines.errors import ConfigError
from pipelines.lineage import store as mlflow_store
from pipelines.lineage.ancestry import as_text, from_mlflow, from_run
from pipelines.promotion.publish import sync
from pipelines.runs.directory import RunDirectory
from pipelines.runs.start import record_start
from tests.conftest import make_model, minimal
from tests.unit.sample_run import write_base_row, write_step

LORA = {"type": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
MINE = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM"
    ),
    "curlora": lambda: CurloraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
SECTIONS = {
    "lora": LORA,
    "dora": LORA | {"options": {"use_dora": True}},
    "curlora": {"type": "curlora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "ia3": {
        "type": "ia3",
        "target_modules": ["k_proj", "down_proj"],
        "options": {"feedforward_modules": ["down_proj"]},
    },
}


@pytest.fixture
def base(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder_of(base, tmp_path):
    """A folder as PEFT's `save_pretrained` leaves it, with weights that say something."""

    def make(kind: str, name: str = "my-lora"):
        import transformers

        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), MINE[kind]())
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def raw(base, reviews, tmp_path):
    return minimal(
        tmp_path,
        reviews,
        base_model={"path": str(base), "dtype": "float32"},
        tracking=None,
        start_from=str(tmp_path / "my-lora"),
        adapter=LORA,
    )


def problems(raw) -> list[str]:
    try:
        config = parse_config(raw)
        run = RunDirectory(config.run_uri)
        return [str(problem) for problem in stored_problems(config, run, make_plan(config, run))]
    except ConfigError as error:
        return [str(problem) for problem in error.problems]


@pytest.mark.parametrize("kind", MINE)
def test_an_adapter_of_peft_fits_the_section_that_describes_it(raw, folder_of, kind):
    folder_of(kind)
    assert problems(raw | {"adapter": SECTIONS[kind]}) == []


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "curlora", "r": 4}, "set adapter.type: lora"),
        ({"type": "lora", "r": 8, "alpha": 8}, "set adapter.r: 4"),
        ({"type": "lora"}, "set adapter.alpha: 8"),
        (LORA | {"target_modules": "all-linear"}, 'set adapter.target_modules: ["q_proj", "v_proj"]'),
        (LORA | {"target_modules": ["q_proj"]}, 'set adapter.target_modules: ["q_proj", "v_proj"]'),
        (LORA | {"options": {"use_rslora": True}}, "adapter.options.use_rslora: is True, but the adapter of"),
    ],
)
def test_another_section_is_refused_with_the_value_to_set(raw, folder_of, section, expected):
    folder_of("lora")
    assert expected in "\n".join(problems(raw | {"adapter": section})).replace("'", '"')


def test_a_dry_run_takes_it_and_refuses_another_base_by_its_shapes(raw, folder_of, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of("lora")

    def dry_run(raw):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
        return CliRunner().invoke(main, ["run", "c.yaml", "--dry-run"])

    assert dry_run(raw | {"start_from": "./my-lora"}).exit_code == 0
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
    make_model(tokenizer, hidden=32).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    called = dry_run(raw | {"base_model": {"path": str(tmp_path / "wide"), "dtype": "float32"}})
    assert called.exit_code == 2
    assert "name the base that it was trained on" in called.output and "is (4, 16), on" in called.output


def test_a_base_of_another_name_is_a_warning(raw, folder_of, base, tmp_path):
    folder_of("lora")
    config = parse_config(raw)
    assert doubt(config, find_start(config)) is None
    shutil.copytree(base, tmp_path / "other-base")
    config = parse_config(raw | {"base_model": {"path": str(tmp_path / "other-base"), "dtype": "float32"}})
    assert f"says that its base is '{base}', this one is 'other-base'" in doubt(config, find_start(config))


def test_weights_in_a_pickle_are_refused(raw, folder_of):
    folder = folder_of("lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "has adapter_model.bin, a pickle, which is never loaded" in problems(raw)[0]


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_configuration_that_is_none_is_refused(raw, folder_of, content):
    (folder_of("lora") / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in problems(raw)[0]


def test_a_hub_id_is_read_from_the_cache(raw, folder_of, tmp_path, monkeypatch):
    """As `huggingface_hub` has it after a download."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--me--my-lora" / "snapshots" / ("0" * 40)
    shutil.copytree(folder_of("lora"), snapshot)
    (cache / "models--me--my-lora" / "refs").mkdir()
    (cache / "models--me--my-lora" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = parse_config(raw | {"start_from": "me/my-lora"})
    assert config.start_from == "me/my-lora"
    start = find_start(config)
    assert start.run_uri == f"{config.run_uri}/origins/my-lora" and start.named == "me/my-lora"
    assert problems(raw | {"start_from": "me/my-lora"}) == []
    assert "cannot be read from the hub" in problems(raw | {"start_from": "me/nothing"})[0]


def test_it_is_imported_once_and_the_run_goes_on_without_the_folder(raw, folder_of):
    folder = folder_of("lora")
    config = parse_config(raw)
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    run.open_for_writing(config)
    import_folder(config, plan.start)
    record_start(run, plan.start)
    imported = plan.start.run.metrics(plan.start.directory)
    assert imported.fingerprint == plan.steps[0].parent and imported.origin == str(folder)
    published = plan.start.run.read_bytes(f"{plan.start.directory}/adapter/adapter_model.safetensors")
    assert published == (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert make_plan(config, run) == plan
    assert stored_problems(config, run, plan) == []
    plan.start.run.write_bytes(f"{plan.start.directory}/adapter/adapter_model.safetensors", published[:-1])
    assert "is missing or damaged" in str(stored_problems(config, run, plan)[-1])


def test_other_weights_are_another_parent(raw, folder_of):
    folder = folder_of("lora")
    first = make_plan(parse_config(raw)).steps[0]
    shutil.copytree(folder, folder.parent / "copy")
    same = make_plan(parse_config(raw | {"start_from": str(folder.parent / "copy")})).steps[0]
    assert same.fingerprint == first.fingerprint
    state = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    from safetensors.torch import save_file

    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    assert make_plan(parse_config(raw)).steps[0].fingerprint != first.fingerprint


def test_its_origin_is_in_the_lineage_of_the_run_and_of_mlflow(raw, folder_of, tmp_path):
    folder = folder_of("lora")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow_store.initialize(store)
    tracking = {"uri": store, "experiment": "grown", "register_as": "grown"}
    config = parse_config(raw | {"tracking": tracking, "gate": {"max_forgetting": 1.0}})
    run = RunDirectory(config.run_uri)
    plan = make_plan(config, run)
    run.open_for_writing(config)
    import_folder(config, plan.start)
    record_start(run, plan.start)
    write_base_row(run, config, plan)
    write_step(run, config, plan, plan.steps[0])
    from pipelines.chain.results import build_results

    run.write_json("results.json", build_results(config, plan, run, "finished"))
    assert sync(run)[2] == []
    ancestry = from_run(run, plan.steps[0].directory)
    assert [link.title for link in ancestry.links] == ["base", "1 my-lora", "1 reviews"]
    assert f"imported from {folder}" in as_text(ancestry)
    assert from_mlflow(store, "models:/grown@champion") == ancestry
    called = CliRunner().invoke(main, ["lineage", run.uri, "--json"])
    assert json.loads(called.output)["links"][1]["origin"] == str(folder)
