"""Processes: one script, alone or under torchrun, each process with the whole model and its share of the corpus.

    with joined():                                   # torchrun --nproc-per-node 2 script.py
        x = store(source, texts, "activations")
        y = store(target, texts, "activations")
        fit_streamed(x, y, (9, 18))                  # the same map in every process

Every process makes the same calls and sees the same folders. If one fails, its process ends with the error, the launcher ends
the others, and one that is left waiting gives up after the timeout of torch.distributed. Alone, nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, if it started this one: gloo for tensors on the CPU, and nccl, where there
    is CUDA, for those on this process's device. What was initialised before stays as it is."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group()
    yield
    # Not after an error: to leave the group can mean to wait for processes that wait for this one.
    dist.destroy_process_group()


def rank() -> int:
    """Which process this is, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int) -> range:
    """Which of n pieces of work fall to this process: every k-th, of k processes."""
    return range(rank(), n, dist.get_world_size() if dist.is_initialized() else 1)


def summed(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all processes, on the device of x. Returns when all have come here."""
    if not dist.is_initialized():
        return x
    total = x.clone() if "cpu" in dist.get_backend_config() else x.cuda()  # a group of nccl alone has nothing for the CPU
    dist.all_reduce(total)
    return total.to(x.device)
