"""Progress: a bar for work that turns out to take long, nothing for work that does not."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds of work before a bar appears."""


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items; show a rich progress bar on stderr once they have taken more than a couple of seconds."""
    start, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if bar is None and done < total and time.monotonic() - start > PATIENCE:
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(description, total=total)
                bar.start()
            if bar is not None and task is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
