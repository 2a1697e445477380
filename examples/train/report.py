"""What is seen while training runs: lines and tables; on a terminal a progress bar below them, elsewhere plain text."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """Writes to standard output."""

    def __init__(self) -> None:
        self._console = Console(force_terminal=sys.stdout.isatty(), markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Write lines as they are."""
        self._console.print(text)

    def row(self, header: Sequence[str], cells: Sequence[str]) -> None:
        """Write one line of a table that grows, its columns as wide as the header, at least 7."""
        self.say("  ".join(cell.rjust(max(7, len(title))) for title, cell in zip(header, cells, strict=True)))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table, the columns aligned."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for cells in [header, *rows]:
            self.say("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))

    @contextmanager
    def progress(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """A bar from `done` to `total`, on a terminal; gives the function that moves it by one."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(name, total=total, completed=done)
            yield lambda: bar.advance(task)
