"""The model card of an adapter: README.md beside its weights, with tasks, scores, lineage and how to load it.

A card is read elsewhere: it names the base by its hub id, or by the name of its folder, and no path of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from pipelines.config.paths import public_name
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import RunDirectoryError
from pipelines.lineage.ancestry import rows_in_words, training_data
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import newest_cells
from pipelines.runs.step_record import Cell, StepRecord

CARD = "README.md"
FORMS = ("adapter", "lora", "merged")
KINDS = {"curlora": "CURLoRA", "lora": "LoRA"}


def model_card(
    form: str, run: str, config: PipelineConfig, records: Sequence[StepRecord], name: str | None = None
) -> str:
    """The card as Markdown with the metadata of the Hugging Face hub.

    Args:
        form: `adapter` (as it was trained), `lora` (converted), `merged` (a full model).
        run: name of the run.
        records: of the step and of its ancestors, newest first; row 0 may be the last.
        name: hub id of the repository that the card is in; None: it is in a folder.
    """
    step = records[0]
    base, is_on_hub = public_name(config.base_model.path)
    kind = KINDS.get(config.adapter.type, config.adapter.type)
    what = f"A full model with a {kind} adapter (rank {config.adapter.r}) of `{base}` merged into it"
    if form != "merged":
        converted = f", converted from {kind}" if form == "lora" and config.adapter.type != "lora" else ""
        what = f"A {'LoRA' if form == 'lora' else kind} adapter for `{base}`{converted} (rank {config.adapter.r})"
    learned = _learned(records)
    count = f"{len(learned)} tasks learned one after another" if len(learned) > 1 else f"the task {learned[0]}"
    if len(step.tasks) > 1:
        count = f"{len(learned)} tasks"
    parts = [
        *_metadata(form, base if is_on_hub else None, config.adapter.type),
        f"# {run}: step {step.position}, {step.label}",
        f"{what}, trained on {count} (strategy {config.strategy.name}) by curlora.",
        "## Tasks and scores",
        "\n".join(_scores(config, records)),
        "## Lineage",
        "\n".join(_lineage(base, records)),
        "## How to load it",
        _loading(form, base, is_on_hub, config, name),
    ]
    return "\n\n".join(parts) + "\n"


def ancestry_of(run: RunDirectory, directory: str) -> list[StepRecord]:
    """The records of a finished step and of its ancestors, newest first, as far as their runs still exist."""
    records = []
    try:
        for _, _, record in run.ancestors(directory):
            records.append(record)
    except RunDirectoryError:
        pass  # an earlier run was deleted: the card begins where the records do
    return records


def _metadata(form: str, hub_id: str | None, kind: str) -> Iterator[str]:
    tags = ["curlora", "continual-learning", *(["lora"] if "lora" in (form, kind) else [])]
    lines = [
        "---",
        *([f"base_model: {hub_id}"] if hub_id else []),
        f"library_name: {'transformers' if form == 'merged' else 'peft'}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
    ]
    yield "\n".join(lines)


def _learned(records: Sequence[StepRecord]) -> list[str]:
    """Every task of the lineage, in the order of training, each once."""
    return list(dict.fromkeys(name for record in reversed(records) for name in record.tasks))


def _scores(config: PipelineConfig, records: Sequence[StepRecord]) -> Iterator[str]:
    """A row per learned task: its score after this step, and right after its own training; then retained text."""
    kinds = {task.name: task.kind for task in config.tasks}
    now = {cell.name: cell for cell in newest_cells(records[0])}
    yield "| task | kind | metric | score | right after its training |"
    yield "|---|---|---|---|---|"
    for name in _learned(records):
        own = next(record for record in records if name in record.tasks)
        then = next((cell for cell in newest_cells(own) if cell.name == name), None)
        cell = now.get(name)
        metric = (cell or then).metric if cell or then else "–"
        yield f"| {name} | {kinds.get(name, '–')} | {metric} | {_value(cell)} | {_value(then)} |"
    retained = [cell for cell in now.values() if cell.role == "retention"]
    first = {cell.name: cell for cell in newest_cells(records[-1])} if records[-1].position == 0 else {}
    if retained:
        yield ""
        yield "| retained text | perplexity | of the base |"
        yield "|---|---|---|"
    for cell in retained:
        before = first.get(cell.name)
        yield f"| {cell.name} | {_number(cell.perplexity)} | {_number(before.perplexity if before else None)} |"
    benchmarks = [cell for cell in now.values() if cell.role == "benchmark"]
    if benchmarks:
        yield ""
        yield "| benchmark | metric | score | of the base |"
        yield "|---|---|---|---|"
    for cell in benchmarks:
        yield f"| {cell.name} | {cell.metric} | {_value(cell)} | {_value(first.get(cell.name))} |"


def _value(cell: Cell | None) -> str:
    return _number(cell.value if cell else None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _lineage(base: str, records: Sequence[StepRecord]) -> Iterator[str]:
    """From the base down to this step."""
    steps = list(takewhile(lambda record: record.position, records))
    bottom = next((record.parent for record in reversed(steps) if record.grew_from_base), None)
    yield f"1. base `{base}`" + (f", fingerprint `{bottom}`" if bottom else "")
    for number, record in enumerate(reversed(steps), 2):
        data = "; ".join(
            f"{task}: {rows_in_words(found)}, digest `{found['digest']}`"
            for task, found in training_data(record).items()
        )
        where = "imported" if record.origin else f"trained on {data}" if data else "trained"
        yield f"{number}. {record.label}, fingerprint `{record.fingerprint}`, {where}"


def _loading(form: str, base: str, is_on_hub: bool, config: PipelineConfig, name: str | None) -> str:
    folder, here = (name, "") if name else ("FOLDER", "`FOLDER` is this folder")
    copy = f"`BASE` is the folder of your copy of `{base}`"
    note = "" if is_on_hub else f"{'; '.join(filter(None, (copy, here)))}. "
    named = base if is_on_hub else "BASE"
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    if form == "merged":
        code = f'{head}model = AutoModelForCausalLM.from_pretrained("{folder}")\n{tokenizer}'
        return (f"{here}.\n\n" if here else "") + f"```python\n{code}\n```"
    with_curlora = form == "adapter" and config.adapter.type == "curlora"
    register = "import curlora  # pip install curlora: its adapter type\n" if with_curlora else ""
    code = (
        f"{register}from peft import PeftModel\n{head}"
        f'base = AutoModelForCausalLM.from_pretrained("{named}", dtype="{config.base_model.dtype}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder}")\n{tokenizer}'
    )
    more = f"With `pip install 'curlora[pipelines]'`, a chain goes on from it: `start_from: {folder}`"
    if form == "adapter" and config.adapter.type in KINDS:
        more += "; `curlora export RUN --as lora` (or `merged`) makes what needs no curlora"
    return f"{note}With PEFT:\n\n```python\n{code}\n```\n\n{more}."
