"""What a person sees while a command works: progress bars and notes, all on stderr.

stdout stays free for the result (a table, or one JSON document with `--json`). When stderr is no
terminal, a bar becomes a line now and then and one at its end; with `quiet` only warnings are printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich takes half of the time of `--help`, which prints nothing through it
    from rich.console import Console

_SHOW_AFTER_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal
_SECONDS_BEFORE_BUSY_IS_TOLD = 10.0  # shorter work has its own line when it begins
_LOUD_LIBRARIES = (
    *("torch.utils._pytree", "torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes"),
    *("torchao", "onnxscript"),
)


@dataclass
class _Settings:
    quiet: bool = False
    live: Console | None = None  # the console of a bar that is on screen


_settings = _Settings()


def set_quiet(quiet: bool) -> None:
    """Print warnings only."""
    _settings.quiet = quiet


@contextmanager
def quiet(quiet: bool) -> Iterator[None]:
    """The same within the block; afterwards it is as it was before."""
    before, _settings.quiet = _settings.quiet, quiet
    try:
        yield
    finally:
        _settings.quiet = before


@contextmanager
def library_logs_silenced() -> Iterator[None]:
    """Within the block torch and torchao do not log notes about their own internals, which are not about the model."""
    import logging

    before = {name: logging.getLogger(name).level for name in _LOUD_LIBRARIES}
    for name in before:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def stderr() -> Console:
    """The console of progress and prose: a bar's own while it is on screen, so that notes stand above it."""
    from rich.console import Console

    return _settings.live or Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line of prose for the person who runs the command."""
    if not _settings.quiet:
        _print(text)


def table(renderable: Any) -> None:
    """A table of what was found on the way (rich's), for the person who runs the command."""
    if not _settings.quiet:
        stderr().print(renderable)


def warn(text: str) -> None:
    """Something that must be seen, also with --quiet."""
    _print(text, mark="warning: ", style="bold yellow")


def error(text: str) -> None:
    """Why the command could not do its work."""
    _print(text, mark="error: ", style="bold red")


def _print(text: str, *, mark: str = "", style: str = "") -> None:
    try:
        from rich.text import Text

        # As Text and not as markup: messages hold paths and keys, and `nets.py:fire:` is no emoji.
        stderr().print(Text.assemble((mark, style), text), soft_wrap=True)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError):  # no file or memory is left to load what prints in colour
        sys.stderr.write(f"{mark}{text}\n")


Advance = Callable[..., None]


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A progress bar. Yields `advance(count=1, status="")`; `status` is shown at the bar's end."""
    if _settings.quiet:
        yield lambda count=1, status="": None
        return
    console = stderr()
    started = time.monotonic()
    if not console.is_terminal:
        lines = _Lines(description, total, told_at=started)
        yield lines.advance
        seconds = time.monotonic() - started
        if seconds >= _SHOW_AFTER_SECONDS:
            note(f"{description}: done in {seconds:.1f} s {lines.status}".rstrip())
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar, _shown_on(console):
        task = bar.add_task(description, total=total, status="")

        def advance(count: int = 1, status: str = "") -> None:
            bar.update(task, advance=count)
            if status:
                bar.update(task, status=status)

        yield advance


@contextmanager
def busy(description: str) -> Iterator[None]:
    """A spinner for work of unknown length; without a terminal the same line as a bar's, once it took its time."""
    console = stderr()
    if _settings.quiet or not console.is_terminal or _settings.live is not None:
        started = time.monotonic()
        yield
        if not console.is_terminal and time.monotonic() - started >= _SECONDS_BEFORE_BUSY_IS_TOLD:
            note(f"{description}: done in {time.monotonic() - started:.1f} s")
        return
    from rich.text import Text

    with console.status(Text(description)), _shown_on(console):
        yield


@dataclass
class _Lines:
    """Progress where there is no terminal: a line now and then, so that a log shows that the work goes on."""

    description: str
    total: int
    told_at: float
    done: int = 0
    status: str = ""

    def advance(self, count: int = 1, status: str = "") -> None:
        self.done += count
        self.status = status or self.status
        now = time.monotonic()
        if now - self.told_at >= _SECONDS_BETWEEN_LINES:
            self.told_at = now
            note(f"{self.description}: {self.done} of {self.total} {self.status}".rstrip())


@contextmanager
def _shown_on(console: Console) -> Iterator[None]:
    before, _settings.live = _settings.live, console
    try:
        yield
    finally:
        _settings.live = before
