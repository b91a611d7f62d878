"""What a tick decides: once for every domain, with a reason, and never the same training twice."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from cluster import decisions as schedule_decisions
from cluster import tick
from cluster.jobs import Job
from cluster.loop import Loop, next_times
from pipelines.cli.app import main
from pipelines.config.loading import parse_config
from pipelines.data.sources import digest_of
from pipelines.errors import ConfigError, Unavailable
from pipelines.notify.outbox import post
from pipelines.runs.directory import RunDirectory
from pipelines.runs.lease import acquire_lease
from tests.conftest import minimal, write_jsonl
from tests.unit.test_start import finish


class Jobs:
    """A cluster that takes jobs and says what the test wants of them."""

    def __init__(self):
        self.sent, self.status, self.away = [], {}, False

    def is_this_machine(self) -> bool:
        return True

    def submit(self, config):
        if self.away:
            raise Unavailable("the cluster is away")
        name = f"{config.name}-{len(self.sent) + 1}"
        self.sent.append(config)
        self.status[name] = "RUNNING"
        return self.job(name), True

    def job(self, name: str):
        status = self.status.get(name)
        return Job(name, "run", status, None, None, "Traceback\nOutOfMemoryError: too large") if status else None


@pytest.fixture
def jobs():
    return Jobs()


@pytest.fixture
def registry(monkeypatch):
    """Who is champion, as the model registry would say."""
    found = SimpleNamespace(champion=None)
    monkeypatch.setattr("pipelines.lineage.registry.champion", lambda uri, name: found.champion)
    return found


@pytest.fixture
def raw(tmp_path, model, tokenizer) -> dict:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "inbox").mkdir()
    domains = {
        "inbox": str(tmp_path / "inbox"),
        "template": {"kind": "language-modeling", "documents": "joined"},
        "quiet_period": "10m",
        "max_attempts": 2,
    }
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "register_as": "model"}
    base = {"path": str(tmp_path / "base"), "dtype": "float32"}
    return minimal(
        tmp_path,
        "",
        tasks=[],
        base_model=base,
        domains=domains,
        tracking=tracking,
        gate={},
        training={"max_length": 16},
    )


@pytest.fixture
def config(raw):
    return parse_config(raw)


@pytest.fixture
def look(config, jobs, registry):
    """One tick; its sentences."""
    return lambda **options: tick.tick(config, lambda: jobs, **options).did


@pytest.fixture
def add(tmp_path):
    """Put a complete domain into the inbox."""

    def put(name: str, text: str = "the film is good and the plot is warm", **splits):
        folder = tmp_path / "inbox" / name
        folder.mkdir(exist_ok=True)
        rows = [{"text": f"{text} {name}"}] * 20
        for split, content in ({"train": rows, "test": rows} | splits).items():
            write_jsonl(folder / f"{split}.jsonl", content)
        (folder / "_SUCCESS").touch()
        return folder

    return put


def decisions(config) -> list[tuple[str, str]]:
    return [(entry["domain"], entry["kind"]) for entry in schedule_decisions.history(config)]


def finish_job(jobs: Jobs, registry, promoted: bool = True) -> RunDirectory:
    """The job at work ends as a chain does, and its last adapter becomes champion."""
    chain, name = jobs.sent[-1], list(jobs.status)[-1]
    run = finish(chain.model_dump())
    gate = {"passed": promoted, "reasons": [] if promoted else ["forgetting 0.5 is above the limit 0.02"]}
    version = {"uri": f"models:/model/{len(jobs.sent)}", "promoted": promoted}
    run.write_json("results.json", replace(run.results(), gate=gate, registry=version))
    if promoted:
        step = run.results().steps[-1].directory
        digests = {task.name: digest_of(task, "train") for task in chain.tasks}
        registry.champion = SimpleNamespace(
            version=len(jobs.sent), run_uri=run.uri, step_directory=step, digests=digests
        )
    jobs.status[name] = "SUCCEEDED"
    return run


def test_a_complete_domain_is_copied_and_trained_once(look, config, jobs, add, tmp_path):
    add("news")
    assert "news: accepted; the chain continues from the base" in look()
    assert look() == ["news: job unit-news-" + jobs.sent[0].name.split("-")[-1] + "-1 is at work"]
    (chain,) = jobs.sent
    (task,) = chain.tasks
    assert (task.name, task.kind) == ("news", "language-modeling")
    assert task.data.startswith(str(tmp_path / "runs" / "unit.domains" / "data" / "news-"))
    assert chain.domains is None


def test_the_next_domain_continues_from_the_champion_and_is_scored_beside_its_tasks(look, config, jobs, registry, add):
    add("news")
    look()
    add("law")
    assert "law: waits for the job that is at work" in look()
    first = finish_job(jobs, registry)
    told = look()
    assert "news: finished; the gate: passed; models:/model/1 is champion now" in told
    chain = jobs.sent[-1]
    assert chain.start_from == f"{first.uri}/{first.results().steps[-1].directory}"
    assert [task.name for task in chain.tasks] == ["news", "law"]
    finish_job(jobs, registry)
    look()
    assert look() == ["nothing new among 2 domains"]
    assert [domain for domain, kind in decisions(config) if kind == "submitted"] == ["news", "law"]


def test_what_the_gate_refuses_is_not_continued_from_and_not_tried_again(look, config, jobs, registry, add):
    add("news")
    look()
    finish_job(jobs, registry, promoted=False)
    (told,) = look()
    assert "refused (forgetting 0.5 is above the limit 0.02); models:/model/1 stays a candidate" in told
    assert look() == ["nothing new among 1 domains"]
    add("law")
    look()
    assert jobs.sent[-1].start_from is None
    assert [task.name for task in jobs.sent[-1].tasks] == ["law"]


def test_a_bad_domain_is_refused_with_the_place_to_mend_and_blocks_nobody(look, config, jobs, add, tmp_path):
    folder = add("bad", train=[{"text": 7}, {"txt": "x"}])
    os.utime(folder, (1, 1))  # it came first
    add("good")
    told = look()
    refusal = next(line for line in told if line.startswith("bad: refused"))
    assert str(tmp_path / "inbox" / "bad") in refusal
    assert [chain.tasks[-1].name for chain in jobs.sent] == ["good"]
    assert not list((tmp_path / "runs" / "unit.domains" / "data").glob("bad-*"))
    assert not any(line.startswith("bad") for line in look())  # not again, until it changes
    add("bad")
    assert "bad: waits for the job that is at work" in look()


def test_names_and_links_are_refused_before_anything_is_read(look, config, jobs, add, tmp_path):
    add("a b")
    (add("linked") / "extra.jsonl").symlink_to("/etc/passwd")
    told = "\n".join(look())
    assert "is not a safe name" in told
    assert "linked: refused: extra.jsonl is a symbolic link" in told
    assert not jobs.sent
    assert all(name.count(".") == 5 for name in os.listdir(tmp_path / "runs" / "unit.domains" / "decisions"))


def test_a_crash_after_the_decision_submits_what_was_decided(look, config, jobs, add):
    add("news")
    jobs.away = True
    with pytest.raises(Unavailable):
        look()
    assert decisions(config) == [("news", "accepted")]
    jobs.away = False
    look()
    assert decisions(config) == [("news", "accepted"), ("news", "submitted")]
    accepted = schedule_decisions.history(config)[0]["config"]
    assert jobs.sent[0].model_dump(mode="json") == accepted


def test_a_job_that_breaks_off_is_sent_again_and_then_given_up_until_somebody_says_again(look, config, jobs, add):
    add("news")
    look()
    jobs.status[list(jobs.status)[-1]] = "FAILED"
    assert "is trained by job" in look()[0]
    assert jobs.sent[0] == jobs.sent[1]  # the same run, which goes on where it was
    jobs.status[list(jobs.status)[-1]] = "FAILED"
    assert "failed: 2 jobs failed (OutOfMemoryError: too large)" in look()[0]
    assert look() == ["nothing new among 1 domains"]
    schedule_decisions.again(config, "news")
    assert any("accepted" in line for line in look())
    assert len(jobs.sent) == 3


def test_rows_that_the_champion_has_learned_are_not_trained_again(look, config, jobs, registry, add):
    folder = add("news")
    look()
    finish_job(jobs, registry)
    look()
    moment = time.time() + 5
    os.utime(folder / "train.jsonl", (moment, moment))  # touched, not changed
    assert look() == ["news: unchanged: version 1 has learned these very rows"]
    assert look() == ["nothing new among 1 domains"]
    add("news", text="the actor is dull and the joke is bad")
    look()
    assert [task.name for task in jobs.sent[-1].tasks] == ["news"]
    assert jobs.sent[-1].start_from is not None


def test_a_lost_ledger_costs_no_training(look, config, jobs, registry, add, tmp_path):
    add("news")
    look()
    finish_job(jobs, registry)
    look()
    RunDirectory(f"{config.run_uri}.domains").remove("decisions")
    assert "has learned these very rows" in look()[0]
    assert len(jobs.sent) == 1


def test_a_domain_that_is_being_written_waits(look, config, jobs, add):
    (add("news") / "_SUCCESS").unlink()
    assert look() == ["news: is not complete yet"]
    assert not jobs.sent


def test_a_fault_of_the_configuration_is_no_domains_fault(raw, jobs, registry, add, tmp_path):
    add("news")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw | {"storage": "./runs"}))
    found = CliRunner().invoke(main, ["tick", str(tmp_path / "c.yaml")])
    assert found.exit_code == 2
    assert "storage: './runs' is relative" in found.output
    registry.champion = SimpleNamespace(version=3, run_uri=str(tmp_path / "gone"), step_directory="x", digests={})
    config = parse_config(raw)
    with pytest.raises(ConfigError, match=r"version 3 is the champion, but its run .* is gone"):
        tick.tick(config, lambda: jobs)
    assert decisions(config) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"domains": None}, "tasks: is empty"),
        ({"tracking": None}, "tracking.register_as: is null"),
        ({"gate": None}, "gate: is null"),
        ({"domains": {"inbox": "/x", "template": {"kind": "text"}}}, "domains.template: kind: unknown kind 'text'"),
        (
            {"domains": {"inbox": "/x", "template": {"kind": "language-modeling", "trust_remote_code": True}}},
            "domains.template: trust_remote_code",
        ),
        (
            {"domains": {"inbox": "/x", "template": {"kind": "language-modeling", "data": "/y"}}},
            "data comes from the domain's folder",
        ),
        (
            {"domains": {"inbox": "/x", "template": {"kind": "language-modeling"}, "quiet_period": "soon"}},
            "quiet_period",
        ),
    ],
)
def test_impossible_schedules_name_field_and_remedy(raw, tmp_path, changes, expected):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw | changes))
    found = CliRunner().invoke(main, ["tick", str(tmp_path / "c.yaml")])
    assert found.exit_code == 2, found.output
    assert expected in found.output


def test_pause_dry_run_and_two_ticks_at_once(look, config, jobs, add):
    add("news")
    assert look(dry_run=True) == ["news: is complete; it would be checked, and trained when its turn comes"]
    schedule_decisions.pause(config, True)
    assert look() == ["paused; resume with --resume"]
    schedule_decisions.pause(config, False)
    with acquire_lease(schedule_decisions.schedule_folder(config)):
        assert look() == ["another tick is at work"]
    assert not jobs.sent
    assert decisions(config) == []


def test_history_says_what_was_decided_and_why(config, jobs, registry, look, add, raw, tmp_path):
    add("news")
    look()
    finish_job(jobs, registry, promoted=False)
    look()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    lines = CliRunner().invoke(main, ["schedule", str(tmp_path / "c.yaml"), "--history"]).output.splitlines()
    assert lines[0].split("  ")[1:3] == ["news", "accepted"]
    assert "finished: refused; models:/model/1; forgetting 0.5 is above the limit" in lines[-1]


LOOK = """
import sys, yaml
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
from click.testing import CliRunner
from pipelines.cli.app import main
result = CliRunner().invoke(main, ["tick", sys.argv[1]])
assert result.exit_code == 0, result.output
heavy = ("torch", "numpy", "ray", "mlflow", "datasets", "transformers", "pandas", "pyarrow")
slow = [m for m in heavy if m in sys.modules]
read = [path for path in opened if "/inbox/" in path or "/decisions/" in path]
print(result.output.strip(), slow, read)
"""


def test_a_look_at_a_thousand_known_domains_imports_nothing_slow_and_reads_no_content(raw, config, tmp_path):
    from cluster.inbox import scan

    for number in range(1000):
        folder = tmp_path / "inbox" / f"domain-{number}"
        folder.mkdir()
        (folder / "train.jsonl").write_text("{}\n")
        (folder / "test.jsonl").write_text("{}\n")
    ledger = tmp_path / "runs" / "unit.domains" / "decisions"
    ledger.mkdir(parents=True)
    for number, domain in enumerate(scan(config.domains.inbox, "_SUCCESS")):
        (ledger / f"{number:017d}.{domain.key}.{domain.stamp}.finished.abcdef.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", LOOK, str(tmp_path / "c.yaml")]
    assert subprocess.check_output(command, text=True).strip() == "nothing new among 1000 domains [] []"


def test_cron_in_its_time_zone_and_what_a_restart_catches_up(raw, tmp_path):
    def config(**changes):
        return parse_config(
            raw | {"domains": raw["domains"] | {"cron": "0 3 * * *", "timezone": "Asia/Tokyo"} | changes}
        )

    assert {(moment.hour, moment.utcoffset().total_seconds()) for moment in next_times(config())} == {(3, 9 * 3600)}
    folder = schedule_decisions.schedule_folder(config())
    for last, catch_up, due in (
        (None, "once", True),
        (None, "skip", False),
        ({"at_work": False, "time": time.time()}, "once", False),
        ({"at_work": False, "time": time.time() - 90000}, "once", True),
        ({"at_work": False, "time": time.time() - 90000}, "skip", False),
        ({"at_work": True, "time": time.time()}, "skip", True),  # somebody has to look after the job
    ):
        folder.remove("last_tick.json")
        if last:
            folder.write_json("last_tick.json", last)
        assert Loop(config(catch_up=catch_up), [], print).is_due() is due, (last, catch_up)
    with pytest.raises(ConfigError, match="is not a schedule"):
        next_times(config(cron="every day"))


def test_a_tick_that_fails_does_not_end_the_loop(raw, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw | {"gate": None}))
    said = []
    Loop(parse_config(raw), [str(tmp_path / "c.yaml")], said.append).look()
    assert said == ["tick ended with exit code 2"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    Loop(parse_config(raw), [str(tmp_path / "c.yaml")], said.append).look()
    assert "nothing new among 0 domains" in said[-1]
    assert json.loads((tmp_path / "runs" / "unit.domains" / "last_tick.json").read_text())["at_work"] is False


def test_decisions_and_what_a_run_could_not_deliver_are_told_once(raw, jobs, registry, add, tmp_path):
    """A command that fails until it may: the run's message is taken over, the domain's refusal told again only
    after it was taken up again."""
    told, may = tmp_path / "told", tmp_path / "may"
    code = "import sys, os; text = sys.stdin.read(); os.path.exists(sys.argv[2]) or sys.exit('away'); "
    code += "open(sys.argv[1], 'a').write(text + chr(10))"
    command = [sys.executable, "-c", code, str(told), str(may)]
    config = parse_config(raw | {"notify": {"command": command, "attempts": 1}})
    add("broken", train=[{"words": "no text"}])
    add("good")

    def look() -> list[str]:
        return tick.tick(config, lambda: jobs).did

    assert any("is not delivered (exit code 1: away)" in line for line in look())
    run = finish_job(jobs, registry)
    post(run, config.notify, "promotion", [1], "good is the champion")
    assert any("promotion-" in line for line in look())
    may.touch()
    for _ in range(2):
        look()
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert [event["event"] for event in events] == ["refusal", "promotion"]
    assert events[0]["domain"] == "broken" and "text" in events[0]["reasons"][0]
    schedule_decisions.again(config, "broken")
    look()
    assert len(told.read_text().splitlines()) == 3


# -- drift
@pytest.fixture
def drifting(raw, jobs, registry, add, tmp_path):
    """A schedule with a champion, and a way to write the sample and look; the real model scores the texts."""
    add("news")
    sample = tmp_path / "recent.jsonl"
    told = tmp_path / "told.jsonl"
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"
    notify = {"command": [sys.executable, "-c", code, str(told)], "events": ["drift"]}
    drift = {"sample": str(sample), "max_perplexity_ratio": 1.0}

    def make(**changes):
        config = parse_config(raw | {"notify": notify, "domains": raw["domains"] | {"drift": drift | changes}})

        def look(texts: list[str] | None = None, **options) -> list[str]:
            if texts:
                write_jsonl(sample, [{"text": text} for text in texts])
            return tick.tick(config, lambda: jobs, **options).did

        return config, look

    make.told = lambda: [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    return make


def texts_by_perplexity(run: RunDirectory, step: str) -> list[list[str]]:
    """Samples of 20 texts that the champion finds ever harder."""
    from pipelines.config.tasks import LanguageModelingTask
    from pipelines.inference.predict import nll_of_texts

    task = LanguageModelingTask(name="drift", kind="language-modeling", data="x")
    samples = [
        [f"{text} {number}" for number in range(20)] for text in ("the film is good", "dull joke", "warm slow plot")
    ]
    return sorted(samples, key=lambda texts: nll_of_texts(run, step, task, texts)[0])


def test_drift_is_measured_once_a_sample_told_once_and_relative_to_the_champions_first(drifting, jobs, registry):
    config, look = drifting()
    assert look(["a text"] * 3)[0] == "drift: there is no champion yet"
    run = finish_job(jobs, registry)
    easy, middle, hard = texts_by_perplexity(run, registry.champion.step_directory)
    assert "its reference from now on" in look(middle)[0]
    assert look() == ["nothing new among 1 domains"]  # the same text is not scored again
    assert "within the limit 1" in look(easy)[0]
    assert "above the limit 1" in look(hard)[0]
    assert look() == ["nothing new among 1 domains"]
    (message,) = drifting.told()
    assert (message["event"], message["version"]) == ("drift", 1)
    assert message["ratio"] == pytest.approx(message["perplexity"] / message["reference"]) and message["ratio"] > 1
    registry.champion.version = 2  # another champion has a reference of its own
    assert "its reference from now on" in look()[0]
    assert len(jobs.sent) == 1
    measured = RunDirectory(f"{config.run_uri}.domains").list("drift")
    assert [name.split(".")[1] for name in measured] == ["1", "1", "1", "2"]


def test_above_the_limit_the_sample_is_trained_as_a_domain_if_asked(drifting, jobs, registry):
    _, look = drifting(retrain=True)
    look(["a text"] * 3)
    run = finish_job(jobs, registry)
    easy, _, hard = texts_by_perplexity(run, registry.champion.step_directory)
    look(easy)
    told = look(hard)
    assert "it is trained as domain 'recent'" in told[0]
    chain = jobs.sent[-1]
    assert chain.start_from.startswith(run.uri) and [task.name for task in chain.tasks] == ["news", "recent"]
    rows = {
        split: (Path(chain.tasks[-1].data) / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test")
    }
    assert sorted(json.loads(line)["text"] for lines in rows.values() for line in lines) == sorted(hard)
    assert len(rows["test"]) == 2
    assert any("is at work" in line for line in look())
    assert len(jobs.sent) == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "cannot be read"),
        ([{"words": "x"}], "has no field 'text'; set domains.drift.text to one of: words"),
        ([{"text": 7}], "holds other things than text"),
        ([{"text": " "}], "is empty in all rows"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_said_and_hinders_no_domain(
    drifting, jobs, registry, add, rows, said, tmp_path
):
    _, look = drifting()
    look(["a text"])
    finish_job(jobs, registry)
    add("law")
    (tmp_path / "recent.jsonl").unlink()
    if rows:
        write_jsonl(tmp_path / "recent.jsonl", rows)
    found = look()
    assert said in found[0] and "domains.drift.sample" in found[0]
    assert [task.name for task in jobs.sent[-1].tasks] == ["news", "law"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample": ""}, "domains.drift.sample: found ''"),
        ({"sample": "x", "max_perplexity_ratio": 0.9}, "domains.drift.max_perplexity_ratio: found 0.9"),
        ({"sample": "x", "domain": "../up"}, "domains.drift.domain: '../up' is not a safe name"),
        ({"sample": "x", "retrain": True, "text": "prompt"}, "drift.text is 'prompt', but the template trains 'text'"),
        ({"sample": "x", "ratio": 2}, "unknown key 'ratio'"),
    ],
)
def test_impossible_drift_sections_name_field_and_remedy(raw, changes, said):
    with pytest.raises(ConfigError) as error:
        parse_config(raw | {"domains": raw["domains"] | {"drift": changes}})
    assert said in str(error.value)


def test_a_template_with_answers_cannot_be_trained_on_prompts(raw):
    template = {"kind": "generation", "prompt": "{text}", "completion": "{answer}"}
    with pytest.raises(ConfigError, match="the template is for generation; set retrain: false"):
        drift = {"sample": "x", "retrain": True}
        parse_config(raw | {"domains": raw["domains"] | {"template": template, "drift": drift}})
