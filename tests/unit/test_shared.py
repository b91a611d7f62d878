"""What a job would not find again is named before anything is sent; doctor warns of open clusters and lonely disks."""

import http.server
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from cluster import jobs
from cluster.jobs import job_id, load_for_cluster, runtime_env
from pipelines.config.loading import parse_config
from pipelines.errors import ConfigError
from pipelines.preflight import portability
from pipelines.preflight.machine import _jobs_api, examine
from tests.conftest import minimal

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def raw(tmp_path, reviews):
    return minimal(tmp_path, reviews, tracking=None)


@pytest.fixture
def load(tmp_path):
    def call(raw, one_machine=True):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
        return load_for_cluster(tmp_path / "c.yaml", [], one_machine)

    return call


def problems(load, raw, **options) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        load(raw, **options)
    return {problem.field: problem.message for problem in error.value.problems}


def test_everything_relative_is_named_with_its_field(load, raw, tmp_path, monkeypatch, reviews):
    monkeypatch.chdir(tmp_path)
    raw |= {"storage": "./runs", "start_from": "runs/old/a", "tracking": {"uri": "sqlite:///mlflow.db"}}
    raw["base_model"] = {"path": "./base"}
    raw["tasks"][0]["data"] = "reviews"
    found = problems(load, raw)
    assert list(found) == ["storage", "start_from", "tracking.uri", "base_model.path", "tasks.0.data"]
    assert all("deleted with the job" in message for message in found.values())


def test_a_disk_of_this_machine_serves_a_cluster_that_is_this_machine_and_no_other(load, raw, monkeypatch):
    assert load(raw).storage == raw["storage"]
    found = problems(load, raw, one_machine=False)
    assert list(found) == ["storage", "base_model.path", "tasks.0.data"]
    assert "is on a local disk of this machine" in found["storage"]
    monkeypatch.setattr(portability, "local_disk", lambda path: None)  # a network file system
    assert load(raw, one_machine=False).storage == raw["storage"]


def test_buckets_servers_and_hub_ids_are_shared(load, raw):
    raw |= {"storage": "s3://bucket/runs", "tracking": {"uri": "http://mlflow:5000"}}
    raw |= {"base_model": {"path": "Qwen/Qwen2.5-0.5B"}}
    raw["tasks"][0]["data"] = "nyu-mll/glue"
    assert load(raw, one_machine=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tracking", {"uri": "https://user:secret@mlflow.example"}),
        ("storage", "s3://key:secret@bucket/runs"),
        ("base_model", {"path": "hf_" + "a" * 34}),
    ],
)
def test_secrets_in_a_configuration_are_refused_and_not_repeated(load, raw, field, value):
    found = problems(load, raw | {field: value})
    assert any("contains a password or token" in message for message in found.values())
    assert all("secret@" not in message for message in found.values() if "password" in message)


def test_a_deepspeed_file_travels_in_the_configuration(load, raw, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = load(raw | {"deepspeed": str(tmp_path / "ds.json")})
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


def test_a_jobs_name_follows_from_its_configuration_and_its_environment_from_nothing(raw):
    first, same, other = (parse_config(raw | change) for change in ({}, {}, {"training": {"seed": 1}}))
    assert job_id(first, 1) == job_id(same, 1)
    assert job_id(first, 1) not in (job_id(first, 2), job_id(other, 1))
    assert runtime_env() == runtime_env()
    assert set(runtime_env()["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}  # no secret travels with a job


def test_a_job_carries_the_checkout_without_what_is_large_or_another_machines(monkeypatch):
    monkeypatch.setattr(jobs, "CODE", Path(__file__).resolve().parents[2])
    assert runtime_env()["working_dir"] == str(jobs.CODE)
    assert ".venv/" in runtime_env()["excludes"]


def test_a_job_of_an_installed_package_carries_no_code(monkeypatch, tmp_path):
    """What lies beside it in site-packages is not sent, a stray pyproject.toml of another package or not."""
    monkeypatch.setattr(jobs, "CODE", tmp_path)
    assert runtime_env().keys() == {"env_vars"}
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert runtime_env().keys() == {"env_vars"}


@pytest.fixture(params=[200, 401])
def dashboard(request):
    """Something that answers as a dashboard without (200) or with a token (401) does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", request.param
    server.shutdown()


def test_doctor_warns_of_a_cluster_that_asks_for_no_token(dashboard):
    address, status = dashboard
    finding = _jobs_api(address)
    assert finding.level == ("warning" if status == 200 else "ok")
    assert status != 200 or "RAY_AUTH_MODE=token" in finding.text


def test_doctor_warns_of_storage_that_is_not_shared(raw, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    path = str(tmp_path / "c.yaml")
    alone = {finding.subject: finding for finding in examine(path)}
    assert alone["storage"].level == "ok"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    cluster = {finding.subject: finding for finding in examine(path)}
    assert cluster["storage"].level == "warning"
    assert "a local disk of this machine" in cluster["storage"].text
    assert cluster["jobs API"].level == "error"


def test_a_job_carries_every_module_of_the_checkout(tmp_path):
    """Packed by Ray's own packager: a folder that is excluded anywhere, such as runs/, must not be one of ours."""
    from ray._private.runtime_env.packaging import create_package

    names = ("pyproject.toml", "curlora", "pipelines", "cluster")
    for name in names:
        (tmp_path / "checkout").mkdir(exist_ok=True)
        source = REPOSITORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / "checkout" / name)
    for left in ("runs/demo/results.json", "mlruns/0/meta.yaml", "build/lib/pipelines/old.py"):
        (tmp_path / "checkout" / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / left).touch()
    create_package(str(tmp_path / "checkout"), tmp_path / "job.zip", include_gitignore=True, excludes=jobs.EXCLUDES)
    with zipfile.ZipFile(tmp_path / "job.zip") as packed:
        held = {name for name in packed.namelist() if not name.endswith("/")}
    modules = {str(f.relative_to(REPOSITORY)) for name in names[1:] for f in (REPOSITORY / name).rglob("*.py")}
    assert modules <= held
    assert not [name for name in held if name.startswith(("runs/", "mlruns/", "build/"))]
