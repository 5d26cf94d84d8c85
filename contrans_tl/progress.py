"""Progress: a bar for work that turns out to take long, nothing for work that does not."""

import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds of work before a bar appears."""


_TERMINAL = Lock()
"""Held by the one bar that is shown: work in several threads, or within other work, shows no second one."""


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items; show a rich progress bar once they have taken more than a couple of seconds, where there is a terminal
    or a notebook (with ipywidgets, without which rich only warns) to show it in."""
    start, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            late = done < total and time.monotonic() - start > PATIENCE
            if bar is None and late and _TERMINAL.acquire(blocking=False):
                bar, task = _bar(description, total)
            if bar is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
            _TERMINAL.release()


def _bar(description: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    bar = Progress(console=console, transient=True, disable=not shown)
    task = bar.add_task(description, total=total)
    bar.start()
    return bar, task
