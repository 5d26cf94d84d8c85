"""The grid of layer maps: ours, from one decomposition a source layer, against the paper's solver, one SVD a pair.

Ours chooses the ridge, measures held-out R2 of every pair and carries a vector from every layer to every layer. The paper's
solves F = V S^-1 U^T Y on 80% of the rows of each pair, and multiplies. Both on the same random float32 rows, on one core;
seconds are medians, of the processor.

    python tests/benchmarks/grid.py [--quick]
    python tests/benchmarks/grid.py --device cuda     the whole 32 x 40 grid from bfloat16 rows on one device, wall seconds
"""

import argparse
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

from measure import peak_megabytes  # isort: skip  # first: it settles the number of threads
import numpy as np
import torch

from contrans_tl.reformulation import LayerMaps
from contrans_tl.solvers import products

ROUNDS = 3
"""Of ours, the products and some of the paper's pairs; medians are taken over rounds, and over pairs."""


def rows_of(n: int, d_source: int, d_target: int, sources: int, targets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models see the same 64 latent variables of falling size, through noise."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(n, 64, generator=g) * torch.logspace(0, -1, 64)
    source, target = torch.empty(n, sources, d_source), torch.empty(n, targets, d_target)
    for side in (source, target):
        for layer in range(side.shape[1]):
            d = side.shape[2]
            side[:, layer] = latent @ torch.randn(64, d, generator=g) + 0.3 * torch.randn(n, d, generator=g)
    return source, target


def ours(source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Seconds of each part."""
    vectors, parts = torch.randn(source.shape[1:]), {}
    maps = LayerMaps.fit(source, target)
    grams = torch.ones(2, len(source) ** 2)
    for part, run in (
        ("decompositions", lambda: [maps.decomposition(s) for s in maps.source.layers]),
        ("ridges", lambda: [maps.ridge(s) for s in maps.source.layers]),
        ("target products", lambda: [maps._target_gram(t, torch.float32) for t in maps.target.layers]),
        ("held-out R2", lambda: maps.r2),
        ("carried vectors", lambda: maps.carry(vectors)),
        ("of R2, a pair", lambda: grams[0] @ grams[1]),
    ):
        start = process_time()
        run()
        parts[part] = process_time() - start
    return parts


def grams(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Seconds of the products that nothing can do without: X X^T in float64 and Y Y^T in float32, for every layer."""
    seconds = []
    for side, dtype in ((source, torch.float64), (target, torch.float32)):
        start = process_time()
        for layer in range(side.shape[1]):
            _ = products(side[:, layer].to(dtype))
        seconds.append(process_time() - start)
    return seconds[0], seconds[1]


def papers(source: np.ndarray, target: np.ndarray, vectors: np.ndarray, pairs: int) -> list[float]:
    """Seconds of each of the first pairs of the grid."""
    fitted, seconds = int(0.8 * len(source)), []
    for pair in range(pairs):
        start = process_time()
        s, t = divmod(pair, target.shape[1])
        u, singular, vh = np.linalg.svd(source[:fitted, s], full_matrices=False)
        weight = vh.T @ np.diag(1 / singular) @ u.T @ target[:fitted, t]
        _ = vectors[s] @ weight
        seconds.append(process_time() - start)
    return seconds


def prepare(which: str, shape: tuple[int, int, int, int, int]) -> Any:
    """For the memory measurement, in a process of its own."""
    source, target = rows_of(*shape)
    if which == "ours":
        return partial(ours, source, target)
    return partial(papers, source.numpy(), target.numpy(), np.ones(source.shape[1:], dtype=np.float32), 1)


def report(name: str, shape: tuple[int, int, int, int, int], pairs: int, grid: tuple[int, int]) -> None:
    """Measure a (sub-)grid of this shape, project it to the whole grid, print."""
    source, target = rows_of(*shape)
    vectors = np.ones(source.shape[1:], dtype=np.float32)
    n, d_source, d_target, sources, targets = shape
    ours(source[:100, :1], target[:100, :1])  # warm up
    rounds, solved = [], []
    for _ in range(ROUNDS):  # in turn: the machine's speed varies
        solved += papers(source.numpy(), target.numpy(), vectors, pairs)
        rounds.append((grams(source, target), ours(source, target)))
    theirs = median(solved)
    floor = [median(floor[side] for floor, _ in rounds) for side in (0, 1)]
    parts = {part: median(parts[part] for _, parts in rounds) for part in rounds[0][1]}
    by_source, by_target, whole = grid[0] / sources, grid[1] / targets, grid[0] * grid[1]
    total = (
        (parts["decompositions"] + parts["ridges"] + parts["held-out R2"]) * by_source
        + parts["target products"] * by_target
        + parts["carried vectors"] * max(by_source, by_target)
        + parts["of R2, a pair"] * grid[0] * (grid[1] - targets)
    )
    least = floor[0] * by_source + floor[1] * by_target
    measured = "" if grid == (sources, targets) else f", projected from {sources} x {targets}"
    print(f"\n{name}: n={n}, {d_source} -> {d_target}, {grid[0]} x {grid[1]} layers{measured}")
    print("  ours, measured: " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))
    print(f"  ours {total:.1f} s, the paper's solver {theirs * whole:.1f} s ({theirs:.3f} s a pair)")
    print(f"  the paper's over ours: {theirs * whole / total:.1f} x")
    print(f"  Gram matrices alone {least:.1f} s; ours over them: {total / least:.2f} x")
    for which in ("ours", "paper"):
        before, added = peak_megabytes(prepare, which, shape)
        print(f"  peak memory, {which}: {added:.0f} MB beside {before:.0f} MB of rows and libraries")


def on_device(device: str, shape: tuple[int, int, int, int, int]) -> None:
    """The whole grid on one device: ridges, R2 of every pair, a vector carried from every layer to every layer."""
    n, d_source, d_target, sources, targets = shape
    cuda = device.startswith("cuda")
    source, target = (side.to(device, torch.bfloat16) for side in rows_of(*shape))

    def seconds(run: Any) -> float:
        start = perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return perf_counter() - start

    def whole() -> None:
        maps = LayerMaps.fit(source, target)
        _ = maps.r2, maps.carry(torch.ones(sources, d_source))

    size = 8192 if cuda else 512
    peaks = {}
    for dtype in (torch.float64, torch.float32):
        square = torch.ones(size, size, dtype=dtype, device=device)
        square @ square
        peaks[dtype] = 2 * size**3 / min(seconds(lambda square=square: square @ square) for _ in range(3)) / 1e12
        del square
    _ = LayerMaps.fit(source[:100, :1], target[:100, :1]).r2  # warm up
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(whole)
    # Gram matrices, eigendecompositions (9 n^3, the usual count with vectors), residual operators and their products.
    work = 2 * n**2 * (sources * d_source + targets * d_target) + sources * (9 + 4) * n**3 + 2 * sources * targets * n**2
    print(f"\n{device}: n={n}, {d_source} -> {d_target}, {sources} x {targets} layers, bfloat16 rows")
    print(f"  {taken:.2f} s, {work / taken / 1e12:.3g} TFLOP/s; matrix peak measured at {size}: ", end="")
    print(", ".join(f"{str(dtype).removeprefix('torch.')} {peak:.3g} TFLOP/s" for dtype, peak in peaks.items()))
    if cuda:
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, rows included")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device")
    args = parser.parse_args()
    if args.device:
        for n in (2000, 4000):
            on_device(args.device, (n, 4096, 5120, 32, 40))
        return
    if args.quick:
        report("grid", (200, 256, 320, 3, 4), 2, (3, 4))
        on_device("cpu", (200, 256, 320, 3, 4))
        return
    report("grid", (800, 1024, 1280, 8, 10), 4, (8, 10))
    report("the paper's sizes", (1600, 4096, 5120, 2, 4), 1, (32, 40))


if __name__ == "__main__":
    main()
