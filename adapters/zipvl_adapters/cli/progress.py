"""Progress on stderr: a live bar on a terminal, one line a step elsewhere, so that stdout holds results alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Says what is being done, and counts."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def say(self, what: str) -> None:
        """Show `what` as the step being done now."""
        self._progress.update(self._task, description=what)
        if not self._progress.console.is_terminal:
            print(what, file=sys.stderr, flush=True)

    def advance(self, steps: int) -> None:
        """Count further answers, or whatever is counted."""
        self._progress.advance(self._task, steps)


@contextmanager
def reporting(total: int, unit: str = "answers") -> Iterator[Reporter]:
    """Show progress towards `total` of `unit` while the block runs."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield Reporter(progress, total)
