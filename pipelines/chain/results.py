"""Builds `results.json` from a run directory."""

from __future__ import annotations

from pipelines.chain.plan import Plan
from pipelines.config.pipeline import PipelineConfig
from pipelines.metrics import score_matrix
from pipelines.metrics.paired import paired_p_value
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.results import BenchmarkScores, Results, SearchSummary, StepSummary
from pipelines.runs.step_record import Cell, Seconds, StepRecord
from pipelines.search.step_search import summaries


def build_results(config: PipelineConfig, plan: Plan, run: RunDirectory, status: str) -> Results:
    """`results.json`: the score matrix and everything computed from it."""
    last = plan.settings[-1]
    names = [task.name for task in config.tasks]
    rows = [run.metrics(plan.base_directory), *(run.metrics(step.directory) for step in plan.steps)]
    cells = [_cells_of(row, plan.cell_keys) for row in rows]
    scores = [[row[name].value if name in row else None for name in names] for row in cells]
    nll = {name: [row[name].nll if name in row else None for row in cells] for name in _texts(config, cells)}
    done = [row for row in rows[1:] if row]
    metric_names = [task.metric for task in config.tasks]
    learned_at = {name: plan.learned_at()[name] for name in names}
    return Results(
        run=config.name,
        status=status,
        base_model=config.base_model.path,
        base_fingerprint=plan.base_fingerprint,
        adapter={"type": last.adapter.type, "r": last.adapter.r},
        strategy=last.strategy.name,
        start_from={"run": plan.start.run_uri, "step": plan.start.directory} if plan.start else None,
        tasks=tuple(names),
        learned_at=learned_at,
        metric=dict(zip(names, metric_names, strict=True)),
        trainable_parameters=done[0].trainable_parameters if done else None,
        head_parameters=sum(row.head_parameters or 0 for row in done),
        adapter_bytes=done[-1].adapter_bytes if done else None,
        scores=scores,
        perplexity={name: [score_matrix.perplexity(v) for v in series] for name, series in nll.items()},
        nll=nll,
        majority={name: next((row[name].majority for row in cells if name in row), None) for name in names},
        extras=_extras(names, cells),
        benchmarks=_benchmarks(config, plan, run, cells),
        **score_matrix.aggregates(scores, metric_names, nll, None if config.is_joint else list(learned_at.values())),
        seconds=_seconds(run, [row for row in rows if row]),
        steps=tuple(_step_summary(step, row) for step, row in zip(plan.steps, rows[1:], strict=True)),
        searches=_searches(config, plan, run),
        samples=tuple(question.key for question in plan.questions) or None,
    )


def _cells_of(row: StepRecord | None, keys: dict[str, str]) -> dict[str, Cell]:
    """name → cell, for the cells that belong to this configuration."""
    return {cell.name: cell for cell in (row.cells if row else ()) if keys.get(cell.name) == cell.key}


def _texts(config: PipelineConfig, cells: list[dict[str, Cell]]) -> list[str]:
    """The retained texts: corpora, and benchmarks that score the likelihood of text."""
    likely = {cell.name for row in cells for cell in row.values() if cell.role == "retention"}
    corpora = {corpus.name for corpus in config.corpora}
    return [source.name for source in config.retention if source.name in corpora | likely]


def _benchmarks(
    config: PipelineConfig, plan: Plan, run: RunDirectory, cells: list[dict[str, Cell]]
) -> dict[str, BenchmarkScores] | None:
    """Benchmark → its scores in every row; None if there is none."""
    ends, found = (plan.base_directory, plan.steps[-1].directory), {}
    for benchmark in config.benchmarks:
        series = [row.get(benchmark.name) for row in cells]
        first = next(filter(None, series), None)
        if first and first.role == "benchmark":
            values = [cell.value if cell else None for cell in series]
            extras = [cell.extras if cell else None for cell in series]
            p = None
            if series[0] and series[-1]:
                outcomes = [run.read_jsonl(f"{directory}/predictions/{benchmark.name}.jsonl") for directory in ends]
                p, _ = paired_p_value(*outcomes)
            found[benchmark.name] = BenchmarkScores(first.metric, first.count, values, extras, p)
    return found or None


def _extras(names: list[str], cells: list[dict[str, Cell]]) -> dict[str, list[dict[str, float] | None]]:
    """Task → its secondary metrics in every row, for the tasks that have any."""
    found = {name: [row[name].extras if name in row else None for row in cells] for name in names}
    return {name: series for name, series in found.items() if any(series)}


def _step_summary(step: StepPlan, row: StepRecord | None) -> StepSummary:
    names = {"task": step.label, "fingerprint": step.fingerprint, "directory": step.directory}
    if row is None:
        return StepSummary(**names)
    speed = row.training.tokens_per_second if row.training else None
    return StepSummary(**names, seconds=row.seconds, tokens_per_second=speed, peak_memory_bytes=row.peak_memory_bytes)


def _searches(config: PipelineConfig, plan: Plan, run: RunDirectory) -> tuple[SearchSummary, ...] | None:
    if not config.search:
        return None
    return summaries(config, run, plan.steps, plan.base_fingerprint)


def _seconds(run: RunDirectory, rows: list[StepRecord]) -> Seconds:
    """Time spent; what is neither training nor evaluation is overhead (start-up, loading, saving)."""
    train = sum(row.seconds.train for row in rows)
    evaluate = sum(row.seconds.evaluate for row in rows)
    segments = sum(event.seconds for _, event in run.events() if event.kind == "segment_finished")
    total = max(segments, sum(row.seconds.total for row in rows))
    return Seconds(train=train, evaluate=evaluate, overhead=total - train - evaluate, total=total)
