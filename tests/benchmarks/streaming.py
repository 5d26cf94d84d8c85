"""Streamed fits: the memory that a map of 200,000 rows takes beside one of 20,000.

Both are `fit_streamed`, ridge chosen on held-out texts, on shards of synthetic rows on disk. Peak memory is what the fit adds
to a fresh process that has opened the stores; seconds are of the processor, the reading and checking of shards included.

    python tests/benchmarks/streaming.py [--quick]
"""

from measure import peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from contrans_tl.models import ModelId
from contrans_tl.moments import fit_streamed
from contrans_tl.shards import TEXTS_PER_SHARD, StoredActivations, _Shards
from contrans_tl.tokens import Encoding

WORDS = 16
"""Rows of a text."""
# For the processes that are measured: what is freed goes back to the system at once. What the C library would keep for later
# varies by 10 MB from run to run.
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)


def write(folder: Path, rows: int, d_source: int, d_target: int) -> list[Path]:
    """The stores of a source and a target layer: a noisy linear map of rows whose directions fall in size."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(d_source, d_source, generator=g) * torch.logspace(0, -2, d_source)[:, None]
    linear = torch.randn(d_source, d_target, generator=g) / d_source**0.5
    n_texts = rows // WORDS
    about = {"layers": (0,), "rows": "words", "prepend_bos": False, "texts_hash": f"{rows} rows", "n_texts": n_texts}
    sides = []
    for name, d_model in (("source", d_source), ("target", d_target)):
        model = ModelId(name, None, name, 1, d_model, "raw")
        sides.append(_Shards.below(folder, model, torch.float32, texts_per_shard=TEXTS_PER_SHARD, **about))
    entries: list[dict[int, Any]] = [{}, {}]
    for number in range(sides[0].n_shards):
        texts = min(TEXTS_PER_SHARD, n_texts - number * TEXTS_PER_SHARD)
        x = 3 + torch.randn(texts * WORDS, d_source, generator=g) @ mixing
        y = x @ linear + 0.3 * torch.randn(len(x), d_target, generator=g)
        places = [{end: end for end in range(WORDS)}] * texts
        for side, values, written in zip(sides, (x, y), entries, strict=True):
            written[number] = side.write(number, [Encoding((), ())], places, values[:, None])
    return [side.index(written).folder for side, written in zip(sides, entries, strict=True)]


def prepare(folders: list[Path]) -> Any:
    """For the memory measurement, in a process of its own."""
    return partial(fit_streamed, *map(StoredActivations.load, folders), (0, 0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    sizes, d_source, d_target = ((2_000, 20_000), 64, 80) if quick else ((20_000, 200_000), 512, 640)
    peaks = []
    print(f"streamed fit, {d_source} -> {d_target}, shards of {TEXTS_PER_SHARD} texts of {WORDS} rows")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            folders = write(Path(name), rows, d_source, d_target)
            fit = prepare(folders)
            start = process_time()
            report = fit().fit
            seconds = process_time() - start
            assert report.rows == rows, f"expected {rows} rows, fitted {report.rows}"
            before, added = peak_megabytes(prepare, folders)
        held = rows * (d_source + d_target) * 4 / 2**20
        print(f"  {rows} rows ({held:.0f} MB on disk): {seconds:.1f} s, R2 {report.r2:.3f}, ridge {report.ridge:.0e}, ", end="")
        print(f"peak {added:.1f} MB beside {before:.0f} MB")
        peaks.append(added)
    print(f"  peak memory, {sizes[1]} rows over {sizes[0]}: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
