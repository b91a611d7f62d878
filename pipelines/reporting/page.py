"""What a run looks like: figures, and one self-contained page.

Everything is read from the run directory (`results.json`, the steps' `metrics.json`, `config.yaml`) and can be written
again at any time. The page loads nothing: styles are in its template, charts are inline SVG data. Whatever text comes
from a configuration or from data is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

from pipelines.errors import RunDirectoryError
from pipelines.lineage.ancestry import from_run
from pipelines.lineage.mlflow_records import flatten
from pipelines.reporting.ancestry_figure import draw_ancestry
from pipelines.reporting.drawing import render
from pipelines.reporting.figures import FIGURES, draw_matrix, draw_perplexity, draw_tasks, draw_training, shading
from pipelines.reporting.formatting import NONE, duration, number, signed, size, whole
from pipelines.reporting.html import change_cell, code_tag, heat_cells, image_tag, number_cells, table_tag
from pipelines.reporting.summary import MANY, direction, headlines, histories, is_joint, row_labels
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import current_steps

TEMPLATE = Path(__file__).parent / "templates" / "report.html"


class ReportError(RuntimeError):
    """There is nothing to report yet."""


def write_figures(run: RunDirectory) -> list[str]:
    """Write `figures/*.png`; returns their paths in the run. What a run has no data for is not drawn.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(results, steps)
        if figure is not None:
            run.write_bytes(f"figures/{name}.png", render(figure, "png"))
            written.append(f"figures/{name}.png")
    return written


def _load(run: RunDirectory) -> tuple[dict, list[dict]]:
    results = run.results()
    if results is None:
        raise ReportError(f"run '{run.name}' has no results yet; start it with `curlora run`")
    return results, [metrics for _, metrics in current_steps(run)]


# -- the page
def write_report(run: RunDirectory) -> str:
    """Write `report.html`, one page that needs no network; returns its path in the run.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    config = run.read_bytes("config.yaml").decode()
    sections = [
        _header(results, steps),
        _section_numbers(results),
        _section_matrix(results),
        _section_histories(results),
        _section_extras(results),
        _section_curves(results, steps),
        _section_cost(results, steps),
        _section_gate(results),
        _section_ancestry(run, results, steps),
        f'<h2>Configuration</h2>\n<p class="soft">As resolved when the run started.</p>\n<pre>{escape(config)}</pre>',
        f"<footer>Written from {escape(run.uri)}. The numbers are those of results.json beside this page.</footer>",
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{results['run']} – continual learning report"), body="\n".join(filter(None, sections))
    )
    run.write_bytes("report.html", page.encode())
    return "report.html"


def _header(results: dict, steps: list[dict]) -> str:
    adapter, status = results["adapter"], results["status"]
    rank = f" of rank {adapter['r']}" if adapter.get("r") is not None else ""
    sequence = "".join(f"<li><code>{escape(name)}</code></li>" for name in results["tasks"])
    ended = f" · last step {_moment(steps[-1]['finished'])}" if steps else ""
    return (
        f"<h1>{escape(results['run'])} "
        f'<span class="status {escape(status)}">{escape(status)}</span></h1>\n'
        f'<p class="soft">{escape(str(results["base_model"]))} · adapter {escape(str(adapter["type"]))}{rank} · '
        f"strategy {escape(results['strategy'])}{ended}</p>\n"
        f'<ul class="sequence" aria-label="sequence of tasks">{sequence}</ul>\n'
        f'<p class="lead">{escape(story(results))}</p>'
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def story(results: dict) -> str:
    """The run in a few plain sentences."""
    count, done = len(results["tasks"]), sum(1 for step in results["steps"] if step["seconds"])
    how = "together, in one step" if is_joint(results) else "one after another"
    text = [f"{count} task{'s' if count > 1 else ''}, trained {how}." if count > 1 else "One task."]
    if results.get("start_from"):
        earlier = sum(row == 0 for row in results["learned_at"].values())
        text.append(f"The chain goes on from an earlier run, which had learned {earlier} of them.")
    if done < len(results["steps"]):
        text.append(f"{done} of {len(results['steps'])} steps are done so far.")
    if results["learning_accuracy"] is not None:
        text.append(f"Right after its own training a task scored {number(results['learning_accuracy'])} on average.")
    if results["nll_learning"] is not None:
        verb = "lowered" if results["nll_learning"] >= 0 else "raised"
        gain = number(abs(results["nll_learning"]))
        text.append(f"Training on a text task {verb} its loss by {gain} nats a token on average.")
    kept = [
        _kept(results["backward_transfer"], "the earlier tasks", "points of score"),
        _kept(results["nll_backward_transfer"], "the earlier text tasks", "nats a token"),
    ]
    if any(kept):
        text.append(f"By the end {' and '.join(filter(None, kept))}, on average.")
    ratio = results["perplexity_ratio"]
    if ratio is not None:
        change = 100 * (ratio - 1)
        verb = "rose" if change >= 0 else "fell"
        text.append(f"Perplexity on text that no task trains on {verb} by {abs(change):.1f}\u00a0%.")
    return " ".join(text)


def _kept(transfer: float | None, who: str, unit: str) -> str:
    if transfer is None:
        return ""
    return f"{who} had {'lost' if transfer < 0 else 'gained'} {number(abs(transfer))} {unit}"


def _section_numbers(results: dict) -> str:
    titles = {"learned": "What was learned", "forgotten": "What was forgotten", "cost": "What it cost"}
    items, parts = headlines(results), ["<h2>In numbers</h2>"]
    for group, title in titles.items():
        cards = "".join(
            f'<div class="card"><span>{escape(item.label)}</span><b>{escape(item.value)}</b>'
            f"<small>{escape(item.sentence)}</small></div>"
            for item in items
            if item.group == group
        )
        if cards:
            parts.append(f'<h3>{title}</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _section_matrix(results: dict) -> str:
    tasks, shades = results["tasks"], shading(results)
    text = (
        "<h2>Score matrix</h2>\n<p>Each row is a moment: the untouched base, then the model after every step. Each "
        "column is a task, scored on its test split. Brighter is better in every column; a frame marks the score "
        "right after the task's own training. Read a column downwards to see a task being forgotten. "
        f"{NONE} was not measured.</p>"
    )
    if len(tasks) > 4 * MANY:
        alt = f"Heat map of {len(results['scores'])} rows by {len(tasks)} tasks; the numbers are in results.json."
        return text + image_tag(draw_matrix(results, []), alt)
    head = "".join(
        f'<th scope="col">{escape(name)}<small>{escape(results["metric"][name])}<br>'
        f"{direction(results['metric'][name])}</small></th>"
        for name in tasks
    )
    body = [
        f'<tr><th scope="row">{escape(label)}</th>{heat_cells(results, t, shades[t])}</tr>'
        for t, label in enumerate(row_labels(results))
    ]
    table = (
        f'<table class="heat"><thead><tr><th scope="col">after</th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
    )
    return f'{text}\n<div class="scroll">{table}</table></div>'


def _section_histories(results: dict) -> str:
    rows = []
    for item in histories(results):
        cells = [number(value) for value in (item.majority, item.base, item.learned, item.best, item.final)]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        name = f'<th scope="row">{escape(item.name)}<small>{escape(item.metric)}</small></th>'
        rows.append(f"<tr>{name}{numbers}{change_cell(item.change)}</tr>")
    headers = ("task", "majority", "base", "learned", "best", "final", "change")
    return (
        "<h2>Forgetting by task</h2>\n<p><b>Majority</b> is what always answering the commonest class scores, "
        "<b>base</b> the model before training, <b>learned</b> right after the task's own training, <b>best</b> the "
        "best from there on. <b>Change</b> is final against learned, negative = forgotten (for losses too).</p>\n"
        + table_tag(headers, rows)
    )


def _section_extras(results: dict) -> str:
    """What answers that the model writes score in the metrics beside the chosen one."""
    extras = results.get("extras") or {}
    if not extras:
        return ""
    rows = []
    for name, series in extras.items():
        for metric in next(filter(None, series)):
            values = [found.get(metric) if found else None for found in series]
            chosen = ", the task's metric" if metric == results["metric"][name] else ""
            title = f'<th scope="row">{escape(name)}<small>{escape(metric)}{chosen}</small></th>'
            rows.append(f"<tr>{title}{number_cells(values, 3)}</tr>")
    return (
        "<h2>Written answers</h2>\n<p>What the model writes, against the reference: <b>rouge_l</b> by the longest "
        "common subsequence of words, <b>token_f1</b> by the words in common, <b>exact_match</b> by equality, the "
        "last two without case, punctuation and articles. Higher is better.</p>\n"
        + table_tag(("task", *row_labels(results)), rows)
    )


def _section_curves(results: dict, steps: list[dict]) -> str:
    parts = [
        "<h2>Each task along the sequence</h2>\n<p>Dashed until a task is trained, solid afterwards. A line that "
        "falls (or rises, for a loss) after its large marker is forgetting.</p>",
        image_tag(draw_tasks(results, steps), _tasks_alt(results)),
    ]
    perplexity = draw_perplexity(results, steps)
    if perplexity is not None:
        parts.append(
            "<h2>General language</h2>\n<p>Perplexity on text that no task trains on. The dotted line is the base; a "
            "rise means that the adapter costs the model some of its general language.</p>"
        )
        parts += [image_tag(perplexity, _perplexity_alt(results)), _perplexity_table(results)]
    training = draw_training(results, steps)
    if training is not None:
        done = [step for step in steps if step["position"]]
        note = f" The last {MANY} of {len(done)} steps." if len(done) > MANY else ""
        parts.append(f"<h2>Training</h2>\n<p>Training loss of each step against its optimizer steps.{note}</p>")
        parts.append(image_tag(training, _training_alt(steps)))
    return "\n".join(parts)


def _tasks_alt(results: dict) -> str:
    changes = [f"{item.name} from {number(item.learned)} to {number(item.final)}" for item in histories(results)]
    return "Lines of each task's score after every step. From right after training to the end: " + "; ".join(changes)


def _perplexity_alt(results: dict) -> str:
    ends = [
        f"{name} from {number(values[0], 2)} to {number(values[-1], 2)}"
        for name, values in results["perplexity"].items()
    ]
    return "Perplexity after every step: " + "; ".join(ends)


def _training_alt(steps: list[dict]) -> str:
    ends = [
        f"{', '.join(step['tasks'])} ends at {number(step['training']['final_loss'])}"
        for step in steps
        if step.get("training")
    ]
    return "Training loss of every step: " + "; ".join(ends)


def _perplexity_table(results: dict) -> str:
    labels = row_labels(results)
    rows = []
    for name, values in results["perplexity"].items():
        losses = results["nll"].get(name, [])
        rows.append(f'<tr><th scope="row">{escape(name)}<small>perplexity</small></th>{number_cells(values, 2)}</tr>')
        rows.append(f'<tr><th scope="row"><small>NLL, nats a token</small></th>{number_cells(losses, 4)}</tr>')
    return table_tag(("corpus", *labels), rows)


def _section_cost(results: dict, steps: list[dict]) -> str:
    heads = any(step.get("head_parameters") for step in steps)
    headers = ["step", "total", "train", "evaluate", "overhead", "tokens/s", "peak memory", "adapter", "trainable"]
    rows = []
    for step in steps:
        seconds, speed = step["seconds"], step.get("training", {}).get("tokens_per_second")
        cells = [duration(seconds.get(name)) for name in ("total", "train", "evaluate", "overhead")]
        cells += [whole(speed), size(step.get("peak_memory_bytes")), size(step.get("adapter_bytes"))]
        cells += [whole(step.get(name)) for name in ("trainable_parameters", "head_parameters")[: 1 + heads]]
        label = "base" if not step["position"] else f"{step['position']} {_label(step)}"
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    total = [duration(results["seconds"].get(name)) for name in ("total", "train", "evaluate", "overhead")]
    foot = f'<tr><th scope="row">whole chain</th>{"".join(f"<td>{cell}</td>" for cell in total)}</tr>'
    return (
        "<h2>Cost</h2>\n<p><b>Overhead</b> is what was neither training nor evaluation: starting workers, loading the "
        "base, publishing. <b>Peak memory</b> is the largest of all workers.</p>\n"
        + table_tag([*headers, "heads"] if heads else headers, rows, foot)
    )


def _label(step: dict) -> str:
    return step["tasks"][0] if len(step["tasks"]) == 1 else "joint"


def _section_gate(results: dict) -> str:
    """Verdict with reasons, each comparison with the champion, and what became of the registered version."""
    gate, registered = results.get("gate"), results.get("registry")
    if not gate:
        return f"<h2>Registry</h2>\n{_registered(registered)}" if registered else ""
    verdict = {True: "passed", False: "refused", None: "undecided"}[gate["passed"]]
    against = gate.get("against")
    whom = (
        f"Compared with the champion, version {against['version']} of {escape(against['name'])}, on the same test "
        "examples. A loss counts if it is over its limit and a one-sided paired test gives p &lt; 0.05."
        if against
        else "Not compared with a champion: the limits that the configuration sets, held against this chain."
    )
    reasons = gate["reasons"] or ["nothing speaks against this adapter"]
    items = "".join(f"<li>{escape(str(reason))}</li>" for reason in [*reasons, *gate.get("notes", [])])
    return (
        f'<h2>Gate <span class="status {verdict}">{verdict}</span></h2>\n<p>{whom}</p>\n<ul>{items}</ul>'
        f"{_comparisons(gate.get('comparisons', []))}{_registered(registered)}"
    )


def _comparisons(comparisons: Sequence[dict]) -> str:
    if not comparisons:
        return ""
    rows = []
    for item in comparisons:
        verdict = '<td class="worse">▼ refused</td>' if item["refused"] else "<td>accepted</td>"
        p = NONE if item["p"] is None else f"{item['p']:.2g}"
        cells = [number(item["champion"]), number(item["candidate"]), signed(-item["loss"]), number(item["limit"]), p]
        title = f'<th scope="row">{escape(item["name"])}<small>{escape(item["metric"])}</small></th>'
        rows.append(f"<tr>{title}{''.join(f'<td>{cell}</td>' for cell in cells)}{verdict}</tr>")
    headers = ("task or corpus", "champion", "candidate", "gain", "loss allowed", "p", "verdict")
    note = '<p class="soft">Gain on retained text is relative (of perplexity); p only where the limit is exceeded.</p>'
    return f"\n{note}\n{table_tag(headers, rows)}"


def _registered(registered: dict | None) -> str:
    if not registered:
        return ""
    role = "and made the champion" if registered["promoted"] else "as a candidate that was not promoted"
    text = f"Registered in MLflow as <code>{escape(registered['uri'])}</code> {role}."
    failure = registered.get("hook_failure")
    return f"\n<p>{text}</p>" + (f'\n<p class="worse">{escape(failure)}</p>' if failure else "")


def _section_ancestry(run: RunDirectory, results: dict, steps: list[dict]) -> str:
    items = []
    for step in steps:
        facts = _base_facts(results, step) if step["position"] == 0 else _step_facts(step)
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in facts)
        title = row_labels(results)[0] if step["position"] == 0 else f"{step['position']} {_label(step)}"
        kind = ' class="base"' if step["position"] == 0 else ""
        items.append(f"<li{kind}><b>{escape(title)}</b><dl>{pairs}</dl></li>")
    return (
        "<h2>Ancestry</h2>\n<p>Which adapter grew from which, on which data. A fingerprint covers the base, the "
        "parent step, every setting and the training data: equal fingerprints mean the same recipe.</p>\n"
        f"{_ancestry_figure(run)}"
        f'<details open><summary>Every step with its settings</summary><ol class="chain">{"".join(items)}</ol>'
        "</details>"
    )


def _ancestry_figure(run: RunDirectory) -> str:
    """The last finished step's whole ancestry; nothing before the first one, or where an earlier run is gone."""
    steps = [metrics for _, metrics in current_steps(run) if metrics["position"]]
    if not steps:
        return ""
    try:
        ancestry = from_run(run, run.find_step(steps[-1]["fingerprint"]))
    except RunDirectoryError as error:
        return f'<p class="soft">Not drawn: {escape(str(error))}.</p>'
    grown = " → ".join(link.title for link in ancestry.links)
    return image_tag(draw_ancestry(ancestry), f"Ancestry: {grown}")


def _base_facts(results: dict, step: dict) -> list[tuple[str, str]]:
    return [("model", escape(str(results["base_model"]))), ("fingerprint", code_tag(step["fingerprint"]))]


def _step_facts(step: dict) -> list[tuple[str, str]]:
    """Names and escaped HTML."""
    facts = [("fingerprint", code_tag(step["fingerprint"])), ("grown from", code_tag(step["parent"]))]
    for name, splits in step.get("data", {}).items():
        train = splits["train"]
        facts.append(("trained on", f"{escape(name)}, {train['rows']:,} rows, digest {code_tag(train['digest'])}"))
    setting = step.get("setting", {})
    adapter, training = setting.get("adapter", {}), setting.get("training", {})
    words = [
        f"adapter {adapter.get('type')}, rank {adapter.get('r')}, selection {adapter.get('selection')}",
        f"strategy {setting.get('strategy', {}).get('name')}",
        f"learning rate {training.get('learning_rate')}, batch {training.get('batch_size')}",
        f"seed {training.get('seed')}",
        f"{whole(step.get('training', {}).get('steps'))} optimizer steps",
    ]
    facts.append(("setting", escape("; ".join(words))))
    environment = flatten(step.get("environment", {}))
    facts.append(("environment", escape(", ".join(f"{key} {value}" for key, value in environment.items()))))
    facts.append(("finished", _moment(step["finished"])))
    return facts
