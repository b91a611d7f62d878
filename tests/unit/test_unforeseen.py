"""An error that nobody expected is one line with the place of its traceback; --verbose raises it."""

import re
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipelines.cli import app


@click.command()
@click.option("--verbose", is_flag=True)
def broken(verbose: bool) -> None:
    raise KeyError("something\nunforeseen")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(app._Commands, "get_command", lambda self, ctx, name: broken)

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["curlora", *arguments])
        return CliRunner().invoke(app.main, arguments)

    return call


def test_it_is_one_line_with_the_file_of_its_traceback(run):
    done = run("broken")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: KeyError: ")
    log = Path(re.search(r"with (\S+\.log)$", line)[1])
    assert "test_unforeseen.py" in log.read_text() and "Traceback" in log.read_text()
    log.unlink()


def test_verbose_raises_it(run):
    assert isinstance(run("broken", "--verbose").exception, KeyError)


def test_a_wrong_option_is_still_a_usage_error(run):
    done = run("broken", "--no-such-option")
    assert done.exit_code == 2 and "No such option" in done.stderr


def test_without_a_place_for_the_log_it_says_how_to_see_more(run, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(app.tempfile, "NamedTemporaryFile", full)
    (line,) = run("broken").stderr.splitlines()
    assert line.endswith("; --verbose shows where")
