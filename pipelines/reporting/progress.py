"""Shows the progress of a chain from the run's events: one bar for the chain, one for the running task.

Without a terminal (in a log file or a job's output) it prints a line every few seconds instead.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipelines.reporting.formatting import number, whole
from pipelines.runs.event import Event

LINE_SECONDS = 5.0


class ChainProgress:
    """Context manager; call it with each event of the run."""

    def __init__(self, console: Console, steps: int, title: str):
        self.console, self.steps, self.title = console, steps, title
        self.done = 0
        self.last_line, self.last_text = 0.0, ""
        self.bars: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)

    def __enter__(self) -> ChainProgress:
        if self.bars:
            self.bars.start()
            self.chain = self.bars.add_task(f"[bold]{self.title}", total=self.steps, text="starting workers")
            self.task = self.bars.add_task("", total=1, text="", visible=False)
        else:
            self._line(f"{self.title}: starting workers")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler:
            handler(event)

    # -- events

    def _on_started(self, event: Event) -> None:
        self.done = event.done
        self._chain("")

    def _on_step_started(self, event: Event) -> None:
        self._chain(f"task {event.position}/{self.steps}: {event.task}")
        if self.bars:
            self.bars.update(self.task, description=event.task, completed=0, total=1, text="", visible=True)

    def _on_training(self, event: Event) -> None:
        step, steps = event.step, event.steps
        left = event.seconds_left
        speed = f" · {whole(event.tokens_per_second)} tokens/s" if event.tokens_per_second else ""
        text = f"step {step}/{steps} · loss {number(event.loss)}{speed} · {number(left, 0)} s left"
        if self.bars:
            self.bars.update(self.task, description=event.task, completed=step, total=steps, text=text)
        elif time.time() - self.last_line > LINE_SECONDS:
            self._line(f"{event.task}: {text}")

    def _on_loading(self, event: Event) -> None:
        self._activity("loading the base model")

    def _on_preparing(self, event: Event) -> None:
        self._activity(f"preparing {event.task}")

    def _on_validating(self, event: Event) -> None:
        self._activity(f"validating {event.task}")

    def _on_stopped_early(self, event: Event) -> None:
        self._line(event.text, always=True)

    def _on_writing(self, event: Event) -> None:
        self._activity("the base writes text to be kept", event)

    def _on_evaluating(self, event: Event) -> None:
        self._activity(f"evaluating {event.name}", event)

    def _on_sampling(self, event: Event) -> None:
        self._activity("answering sample prompts", event)

    def _on_resumed(self, event: Event) -> None:
        self._line(f"{event.task}: goes on from the checkpoint after step {event.step}", always=True)

    def _on_segment_lost(self, event: Event) -> None:
        self._line(f"workers lost ({event.error}); starting them again", always=True)

    def _on_hang(self, event: Event) -> None:
        self._line(event.error, always=True)

    def _on_published(self, event: Event) -> None:
        self.done = event.position
        scores = ", ".join(f"{cell.name} {number(cell.value)}" for cell in event.cells)
        self._chain("")
        self._line(f"task {event.position}/{self.steps} {event.task} done: {scores}", always=True)

    def _on_search(self, event: Event) -> None:
        self._line(event.text, always=True)

    def _on_reporting(self, event: Event) -> None:
        self._chain("writing report and lineage")

    def _on_warning(self, event: Event) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(event.text)}", highlight=False)

    def _activity(self, what: str, event: Event | None = None) -> None:
        """Show what the workers do, and how much of it is done: a second bar, or a line now and then."""
        counted = event is not None and event.count
        text = f"{whole(event.done)} of {whole(event.count)}" if counted else ""
        if counted and event.seconds_left is not None:
            text += f" · {number(event.seconds_left, 0)} s left"
        self._chain(what)
        if self.bars and counted:
            self.bars.update(
                self.task, description=what, completed=event.done, total=event.count, text=text, visible=True
            )
        elif not self.bars and time.time() - self.last_line > LINE_SECONDS:
            self._line(f"{what}: {text}" if text else what)

    def _chain(self, text: str) -> None:
        if self.bars:
            self.bars.update(self.chain, completed=self.done, text=text)

    def _line(self, text: str, always: bool = False) -> None:
        if always or not (self.bars or text == self.last_text):  # a worker repeats what it does as a sign of life
            self.last_line, self.last_text = time.time(), text
            self.console.print(escape(text), highlight=False)
