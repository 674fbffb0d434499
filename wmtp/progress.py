"""Progress of long work on stderr: a bar with its estimated end on a terminal, plain lines in a log, silence on ranks other than 0."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

Level = Literal["quiet", "info", "debug"]
LEVELS: tuple[Level, ...] = ("quiet", "info", "debug")
CADENCE = 10.0  # seconds between two lines of one bar in a log
SETTLED = 1.0  # seconds before which the rate is that of a start, and its estimate an alarm

_level: Level = "info"
_live = False  # a terminal has room for one live bar; a bar inside it writes plain lines above it

T = TypeVar("T")


def set_level(level: Level) -> None:
    """quiet: nothing; info: lines of `say`, bars; debug: lines of `detail` too. Errors do not pass through here and are always seen."""
    global _level
    if level not in LEVELS:
        raise ValueError(f"log level: found {level!r}, expected one of {', '.join(LEVELS)}")
    _level = level


def _audible(level: Level) -> bool:
    return os.environ.get("RANK", "0") == "0" and LEVELS.index(_level) >= LEVELS.index(level)


def say(text: str) -> None:
    """One line for everyone who follows the run."""
    if _audible("info"):
        print(text, file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """One line for those who asked for level debug."""
    if _audible("debug"):
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """'8 s', '3 min 05 s', '2 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bar:
    """`with Bar("judge", total) as bar: ... bar.advance()`; without a total there is a count and a rate but no estimated end."""

    def __init__(self, description: str, total: int | None = None, unit: str = ""):
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._note = ""
        self._rich: Any = None

    def __enter__(self) -> Self:
        global _live
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._audible = _audible("info")
        if self._audible and not _live and sys.stderr.isatty():
            self._rich = _terminal_bar()
            self._rich.start()
            self._task = self._rich.add_task(self.description, total=self.total, note="")
            _live = True
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more are done; `note` (a loss, a pass rate) stands behind the figures until the next one replaces it."""
        self.done += n
        self._note = note or self._note
        if self._rich:
            self._rich.update(self._task, advance=n, note=self._note)
        elif self._audible and time.monotonic() - self._last_line >= CADENCE:
            self._line()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _live
        if self._rich:
            self._rich.stop()
            _live = False
        elif self._audible:
            self._line("done" if kind is None else "stopped")

    def _line(self, end: str = "") -> None:
        now = time.monotonic()
        self._last_line = now
        print(f"{self.description}: {self.figures(now - self._started, end)}", file=sys.stderr, flush=True)

    def figures(self, elapsed: float, end: str = "") -> str:
        """'12/200 (6 %), 3.4 problems/s, about 55 s left, until 14:02:11, loss 2.1'; `end` replaces the estimate by the time taken."""
        parts = [f"{self.done}/{self.total} ({100 * self.done // self.total} %)" if self.total else f"{self.done} {self.unit}".rstrip()]
        rate = self.done / elapsed if elapsed > 0 else 0.0
        if rate:
            shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            parts.append(f"{shown} {self.unit}/s" if self.unit else f"{shown}/s")
        if end:
            parts.append(f"{end} in {duration(elapsed)}")
        elif rate and self.total and self.done < self.total and elapsed >= SETTLED:
            left = (self.total - self.done) / rate
            parts.append(f"about {duration(left)} left, until {time.strftime('%H:%M:%S', time.localtime(time.time() + left))}")
        return ", ".join([*parts, self._note] if self._note else parts)


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))


def track(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yields the items of `iterable` under a bar; `total` is its length where it has one and none is given."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Bar(description, total, unit) as bar:
        for item in iterable:
            yield item
            bar.advance()
