"""Export: the time and memory that a folder in several files takes, beside a plain copy of it.

The folder is a Llama's of seeded bytes, in shards of 1 GB: what its logits would be is of no interest here, that its weights go
through a small buffer is. Peak memory is what the export adds to a fresh process that has imported all it needs.

    python tests/benchmarks/export.py [--quick]
"""

from measure import peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from contrans_tl import ConceptVector
from contrans_tl.export import ModelFolder, export_folder
from contrans_tl.export.target import INDEX, skeleton

MB = 2**20


def write(folder: Path, config: Any, shard: int) -> int:
    """A folder of bfloat16 weights in files of at most `shard` bytes; the size of the largest."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = [0]
    for name, weight in skeleton(config).named_parameters():
        size = 2 * weight.numel()
        if sizes[-1] and sizes[-1] + size > shard:
            files.append({})
            sizes.append(0)
        files[-1][name] = tuple(weight.shape)
        sizes[-1] += size
    numbers, places = np.random.default_rng(0), {}
    for number, (shapes, total) in enumerate(zip(files, sizes, strict=True), start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for weight, shape in shapes.items():
            start, end = end, end + 2 * int(np.prod(shape))
            header[weight] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            places[weight] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, total, 64 * MB):
                file.write(numbers.bytes(min(64 * MB, total - start)))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": places}))
    return max(sizes)


def prepare(vectors: torch.Tensor, folder: Path, out: Path) -> Any:
    """For the memory measurement, in a process of its own, with all that is imported while it works."""
    concept = ConceptVector(vectors, (1, 2), "seeded", ModelFolder.open(folder).model)
    return partial(export_folder, concept, folder, out, strength=0.5, layers=[1, 2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    narrow = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 8}
    layers, vocabulary, shard = (12, 8192, 32 * MB) if quick else (9, 16384, 1024 * MB)
    config = LlamaConfig(**(narrow if quick else wide), num_hidden_layers=layers, vocab_size=vocabulary)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "target"
        largest = write(folder, config, shard)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"export of {size / MB:.0f} MB in {len(list(folder.glob('*.safetensors')))} files of up to {largest / MB:.0f} MB")
        vectors = torch.randn(2, config.hidden_size, generator=torch.Generator().manual_seed(0))
        export = prepare(vectors, folder, root / "steered")
        seconds: dict[str, list[float]] = {"copy": [], "export": []}
        for _ in range(2):
            for side, work in (("copy", partial(shutil.copytree, folder, root / "copy")), ("export", export)):
                start = perf_counter()
                work()
                seconds[side].append(perf_counter() - start)
                shutil.rmtree(root / ("copy" if side == "copy" else "steered"))
        for side, taken in seconds.items():
            print(f"  {side}: {min(taken):.2f} s, {size / MB / min(taken):.0f} MB/s")
        print(f"  seconds, export over copy: {min(seconds['export']) / min(seconds['copy']):.2f}")
        before, added = peak_megabytes(prepare, vectors, folder, root / "steered")
        print(f"  peak memory: {added:.1f} MB beside {before:.0f} MB, {added * MB / largest:.3f} of the largest file")
        assert added * MB < 2 * largest, "the export holds weights in memory"


if __name__ == "__main__":
    main()
