"""Commands on the results of a run: `report`, `predict`, `export`, `push`, `lineage`, `connectivity`, `sync` and
`delete`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from pipelines.cli.helpers import open_run
from pipelines.errors import ConfigError, LineageError, Problem


@click.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def delete(run: str, storage: str, yes: bool) -> None:
    """Delete RUN with all adapters and results. Its records in MLflow are kept.

    \b
    Example:  curlora delete demo
    """
    from pipelines.runs.lease import acquire_lease

    directory = open_run(run, storage)
    if not yes:
        click.confirm(f"Delete {directory.uri} with all its adapters?", abort=True)
    with acquire_lease(directory):
        directory.remove("config.yaml")  # first: without it, the folder is no run
    directory.remove("")
    click.echo(f"deleted {directory.uri}")


@click.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
def report(run: str, storage: str) -> None:
    """Write the report page and the figures of RUN again.

    \b
    Example:  curlora report demo
    """
    from pipelines.reporting.page import ReportError, write_figures, write_report

    directory = open_run(run, storage)
    try:
        write_figures(directory)
        write_report(directory)
        click.echo(f"{directory.uri}/report.html")
    except ReportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


@click.command()
@click.argument("run")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--uri", help="MLflow tracking URI; default: that of the run.")
def sync(run: str, storage: str, uri: str | None) -> None:
    """Send RUN to MLflow. Sends what is missing there, and nothing twice.

    \b
    Example:  curlora sync demo --uri http://127.0.0.1:5000
    """
    from pipelines.promotion.publish import sync as send

    try:
        runs, target, warned = send(
            open_run(run, storage), uri, note=lambda text: click.echo(f"warning: {text}", err=True)
        )
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    for line in warned:
        click.echo(f"error: {line}", err=True)
    if warned:
        sys.exit(1)
    click.echo(f"{len(runs)} MLflow runs are up to date in {target}")


@click.command()
@click.argument("adapter")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw it into a .png, .svg or .pdf file.")
@click.option("--uri", help="MLflow of a models:/ name; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
def lineage(adapter: str, as_json: bool, figure: Path | None, uri: str | None, storage: str) -> None:
    """Show the ancestors of ADAPTER down to the base.

    Each step is listed with its data, settings and scores. ADAPTER is a run (its last step), RUN/STEP, the folder of a
    step, models:/NAME@champion or models:/NAME/3.

    \b
    Example:  curlora lineage models:/support-bot@champion --figure lineage.png
    """
    from pipelines.lineage.ancestry import as_text, find

    try:
        found = find(adapter, storage, uri or os.environ.get("MLFLOW_TRACKING_URI"))
    except LineageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if figure:
        from pipelines.reporting.ancestry_figure import write_ancestry

        write_ancestry(found, figure)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else as_text(found))


@click.command()
@click.argument("run")
@click.option(
    "--points", type=click.IntRange(2), default=5, show_default=True, help="Points per line, with both ends."
)
@click.option("--max-examples", type=click.IntRange(1), help="Test rows per task; default: as many as RUN scored.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def connectivity(run: str, points: int, max_examples: int | None, storage: str, as_json: bool) -> None:
    """Measure the loss between consecutive adapters of RUN.

    Evaluates all tasks at points on the straight line from each adapter to the next (mode connectivity).

    \b
    Example:  curlora connectivity domains-tiny
    """
    from pipelines.inference.connectivity import write

    directory = open_run(run, storage)
    found = write(directory, points, max_examples)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for line in found:
        click.echo(f"{line['from']} → {line['to']}")
        for name, values in line["loss"].items():
            click.echo(f"  {name:<20}" + "".join(f"{value:9.4f}" for value in values))
    click.echo(f"{directory.uri}/figures/connectivity.png")


@click.command()
@click.argument("run")
@click.option(
    "--as",
    "form",
    type=click.Choice(["adapter", "lora", "merged"]),
    required=True,
    help="The adapter as it was trained, as a LoRA adapter, or a full model.",
)
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option("--step", help="Task name, position or fingerprint; default: the last finished step.")
@click.option("--max-rank", type=click.IntRange(1), help="Refuse an adapter of a higher rank, as its server would.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
def export(run: str, form: str, target: Path, step: str | None, max_rank: int | None, storage: str) -> None:
    """Write an adapter of RUN, as LoRA adapter or merged model.

    `adapter` is what the step has published. The LoRA adapter is exact, and any server of LoRA adapters can load it.

    \b
    Example:  curlora export demo --as lora --to ./demo-lora --step scipy
    """
    from pipelines.inference.export import export_step

    click.echo(export_step(open_run(run, storage), step, form, target, max_rank=max_rank))


@click.command()
@click.argument("run")
@click.option("--to", "hub_id", required=True, help="Model repository on the hub, owner/name; created if need be.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["adapter", "lora", "merged"]),
    default="adapter",
    show_default=True,
    help="The adapter as it was trained, as a LoRA adapter, or a full model.",
)
@click.option("--step", help="Task name, position or fingerprint; default: the last finished step.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
def push(run: str, hub_id: str, form: str, step: str | None, private: bool, storage: str) -> None:
    """Push an adapter of RUN to the Hugging Face hub.

    Tokenizer and model card go with it. The token is that of the environment variable HF_TOKEN, the hub that of
    HF_ENDPOINT.

    \b
    Example:  curlora push demo --to me/demo-lora --as lora
    """
    from pipelines.inference.push import push_step

    click.echo(push_step(open_run(run, storage), step, form, hub_id, private))


@click.command()
@click.argument("run")
@click.option("--task", required=True, help="Task of the run whose kind and prompt are used.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="Input text; one --text per field of the task, in order.",
)
@click.option("--file", "file", type=click.Path(path_type=Path), help="JSONL file with the fields of the task.")
@click.option("--step", help="Task name, position, fingerprint or base; default: the last finished step.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row.")
@click.option("--storage", default="./runs", show_default=True, help="Folder of the runs.")
def predict(run: str, task: str, texts, file: Path | None, step: str | None, as_json: bool, storage: str) -> None:
    """Apply the trained model of RUN to new text.

    Prints a class, a choice, an answer or the perplexity of the text, depending on the task.

    \b
    Example:  curlora predict demo --task scipy --text "Compute the inverse of a matrix."
    """
    if bool(texts) == bool(file):
        raise ConfigError([Problem("", "give either --text or --file")])
    directory = open_run(run, storage)
    import transformers

    from pipelines.inference import predict as using

    transformers.utils.logging.disable_progress_bar()
    rows = using.rows_of_file(file) if file else using.rows_of_texts(directory, task, texts)
    for found in using.predict(directory, task, rows, step):
        click.echo(json.dumps(found, ensure_ascii=False) if as_json else _in_words(found))


def _in_words(prediction: dict) -> str:
    """A prediction as one line of text."""
    if "nll" in prediction:
        if prediction["nll"] is None:
            return "too short to be scored"
        numbers = f"perplexity {prediction['perplexity']:.2f}, NLL {prediction['nll']:.4f} nats per token"
        return f"{numbers}, {prediction['tokens']} tokens"
    return str(prediction.get("label", prediction["prediction"]))
