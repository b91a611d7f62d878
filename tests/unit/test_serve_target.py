"""What `curlora serve` makes of its source, and what it refuses before anything is loaded."""

import hashlib
import socket

import pytest
import yaml
from click.testing import CliRunner

from pipelines.cli.app import main
from pipelines.cli.serve import _lines
from pipelines.errors import ConfigError
from pipelines.serve.target import TOKEN, is_loopback, plan_of
from tests.conftest import make_tokenizer
from tests.unit.serving import register, write_base, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    root = tmp_path_factory.mktemp("runs")
    tracking = {"uri": store, "experiment": "x", "register_as": "bot"}
    return write_run(root, write_base(root / "base", make_tokenizer()), "one", 1, tracking=tracking)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)


def test_a_run_a_configuration_and_a_model_mean_the_same_adapters(run, store, client, tmp_path):
    register(client, "bot", run, "champion")
    storage = run.uri.rpartition("/")[0]
    named = plan_of("one", storage, None, {})
    assert (named.storage, named.registry, named.run) == (storage, (store, "bot"), run.uri)
    assert named == plan_of(run.uri, "elsewhere", None, {}) == plan_of("models:/bot@champion", "elsewhere", store, {})
    raw = run.config().model_dump() | {"serve": {"port": 8123, "canary": 0.2}}
    raw["base_model"]["dtype"] = "auto"
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(raw))
    planned = plan_of(str(tmp_path / "my.yaml"), "elsewhere", None, {"canary": 0.05})
    assert planned.base == named.base, "auto is what the run was begun with"
    assert (planned.registry, planned.run) == (named.registry, named.run)
    assert (planned.settings.port, planned.settings.canary) == (8123, 0.05)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ghost", "ghost: is no run, neither as a path nor below"),
        ("ghost.yaml", "ghost.yaml: cannot be read"),
        ("models:/bot/3", "write models:/<name>@champion"),
        ("models:/bot@candidate", "write models:/<name>@champion"),
        ("models:/nobody@champion", "no version of 'nobody' is champion"),
    ],
)
def test_sources_that_mean_nothing(run, store, source, expected):
    done = CliRunner().invoke(main, ["serve", source, "--uri", store])
    assert done.exit_code == 2 and expected in done.output and done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--host", "0.0.0.0"], f"serve.host: 0.0.0.0 can be reached by others; set {TOKEN}"),
        (["--host", "example.org"], "can be reached by others"),
        (["--canary", "2"], "canary"),
        (["--port", "0"], "port"),
    ],
)
def test_options_that_cannot_be(run, options, expected):
    done = CliRunner().invoke(main, ["serve", run.uri, *options])
    assert done.exit_code == 2 and expected in done.output


def test_a_port_that_is_taken_is_named_before_anything_starts(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", run.uri, "--port", str(port)])
    assert done.exit_code == 2
    assert f"serve.port: 127.0.0.1:{port} cannot be listened on (Address already in use)" in done.output


def test_the_terminal_says_what_serves_and_what_does_not():
    state = {"status": "ready", "serving": {"champion": {"name": "models:/bot/3"}}, "registry": "no server answers"}
    state["failing"] = {"champion": {"version": 4, "reason": "it is damaged"}}
    assert _lines(state) == {
        "server": "ready",
        "champion": "models:/bot/3",
        "champion (failing)": "version 4 does not load: it is damaged",
        "registry": "no server answers",
    }


def test_beyond_loopback_a_token_is_needed_and_only_its_digest_is_passed_on(run, monkeypatch):
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="at least 16"):
        plan_of(run.uri, ".", None, {})
    monkeypatch.setenv(TOKEN, "a-token-of-many-letters")
    plan = plan_of(run.uri, ".", None, {"host": "0.0.0.0"})
    assert plan.token == hashlib.sha256(b"a-token-of-many-letters").hexdigest()
    assert "a-token-of-many-letters" not in repr(plan)


def test_loopback_is_known():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org")))


def test_a_run_without_a_finished_step_has_nothing_to_serve(run, tmp_path):
    import shutil

    shutil.copytree(run.uri, tmp_path / "empty")
    (tmp_path / "empty" / "results.json").unlink()
    with pytest.raises(ConfigError, match="no finished step"):
        plan_of(str(tmp_path / "empty"), ".", None, {})
