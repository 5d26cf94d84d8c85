"""What the benchmarks share: one core, medians of processor seconds, and peak memory in a child process of its own.

Wall time would say how busy the machine is: threads that wait for each other on shared cores take many times as long.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{library}_NUM_THREADS"] = "1"


def alternate(repeats: int, **sides: Callable[[], Any]) -> dict[str, float]:
    """Median processor seconds of each side, run in turn so that a busy machine is busy for all; one round first to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, run in sides.items():
            start = process_time()
            run()
            seconds[name].append(process_time() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def peak_megabytes(prepare: Callable[..., Callable[[], Any]], *args: Any) -> tuple[float, float]:
    """Resident memory of a fresh process: before the work that `prepare(*args)` returns, and the peak that the work adds.

    What torch allocates is invisible to tracemalloc; the operating system sees all of it. Its ru_maxrss will not do: a child
    begins with its parent's. Linux only, as VmHWM and its reset are.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(there, prepare, args))
    child.start()
    there.close()
    answer = here.recv()
    child.join()
    return answer


def _child(pipe: Any, prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    work = prepare(*args)
    pipe.send(peak_here(work))


def peak_here(work: Callable[[], Any]) -> tuple[float, float]:
    """As `peak_megabytes`, of this process, where what ran before is still there."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _megabytes("VmRSS")
    work()
    return before, _megabytes("VmHWM") - before


def _megabytes(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:"))
