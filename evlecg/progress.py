"""How a job tells what it is doing, without knowing who listens.

Jobs take a `Progress` and never print. `Progress` itself is silent (libraries, tests); `ConsoleProgress` draws
bars on a terminal and writes plain lines elsewhere, always on stderr, so that stdout stays machine-readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

PLAIN_EVERY_S = 10.0  # how often a task that is not on a terminal writes a line

Advance = Callable[..., None]


class Progress:
    """Says nothing: the default of every job."""

    def info(self, message: str) -> None:
        """A line that tells the user something."""

    def detail(self, message: str) -> None:
        """A line shown under `-v` only."""

    def warn(self, message: str) -> None:
        """A line that the user should not miss."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A few rows that belong together; the first column names them."""

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """A stretch of counted work: `with p.task("render", n) as advance: advance(1, loss="0.3")`.

        Args:
            description: what is being done, a few words.
            total: how many units there are, None where unknown.
        """
        yield lambda n=1, **shown: None


class ConsoleProgress(Progress):
    """Rich bars on a terminal, plain lines elsewhere.

    Args:
        verbosity: -1 warnings only, 0 normal, 1 details too.
    """

    def __init__(self, verbosity: int = 0) -> None:
        from rich.console import Console

        self.verbosity = verbosity
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.started_s = time.monotonic()

    def info(self, message: str) -> None:
        if self.verbosity >= 0:
            self.console.print(message, markup=False)

    def detail(self, message: str) -> None:
        if self.verbosity >= 1:
            self.console.print(message, markup=False, style="dim")

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", markup=False, style="yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table

        if self.verbosity < 0:
            return
        from rich.markup import escape

        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(columns):
            shown.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, row))
        self.console.print(shown)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        if self.verbosity < 0:
            yield lambda n=1, **shown: None
        elif self.console.is_terminal:
            with self._bar(description, total) as advance:
                yield advance
        else:
            yield self._lines(description, total)

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with RichProgress(*columns, console=self.console) as bar:
            task = bar.add_task(description, total=total, shown="")

            def advance(n: int = 1, **shown: object) -> None:
                bar.update(task, advance=n, shown="  ".join(f"{key} {value}" for key, value in shown.items()))

            yield advance

    def _lines(self, description: str, total: int | None) -> Advance:
        done = 0
        start_s = said_s = time.monotonic()

        def advance(n: int = 1, **shown: object) -> None:
            nonlocal done, said_s
            done += n
            now_s = time.monotonic()
            if now_s - said_s < PLAIN_EVERY_S and done != total:
                return
            said_s = now_s
            extra = "".join(f"  {key} {value}" for key, value in shown.items())
            self.info(f"{description}: {done}/{total if total is not None else '?'}  {now_s - start_s:.0f} s{extra}")
            sys.stderr.flush()

        return advance
