"""Folds: contrast pairs dealt out so that nothing is scored on what it was made from, and labels permuted as a null.

Prompts that belong together - the two of a pair, and whatever has the same text - stay in one fold, and change sides together
when labels are permuted. Sides of different size are no pairs: there, labels are permuted over all prompts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import ContrastPairs, normalised


@dataclass(frozen=True, eq=False)
class Sides:
    """The prompts of contrast pairs, positive ones first."""

    side: Float[Tensor, " prompt"]
    """1 for a positive prompt, -1 for a negative one."""
    cluster: Int[Tensor, " prompt"]
    """Which prompts belong together."""
    paired: bool

    @classmethod
    def of(cls, pairs: ContrastPairs) -> "Sides":
        positive, negative = len(pairs.positive), len(pairs.negative)
        side = torch.cat([torch.ones(positive), -torch.ones(negative)]).double()
        head = list(range(positive + negative))

        def root(i: int) -> int:
            while head[i] != i:
                i = head[i]
            return i

        first: dict[str, int] = {}
        for i, prompt in enumerate((*pairs.positive, *pairs.negative)):
            head[root(i)] = root(first.setdefault(normalised(prompt), i))
        if positive == negative:
            for i in range(positive):
                head[root(positive + i)] = root(i)
        _, cluster = torch.tensor([root(i) for i in head]).unique(return_inverse=True)
        return cls(side, cluster, positive == negative)

    def folds(self, k: int, *, seed: int, of: str = "the pairs") -> Int[Tensor, " prompt"]:
        """Which of k folds each prompt is in, both sides in each.

        Raises:
            ValueError: fewer than two folds, or too few prompts that do not belong together.
        """
        clusters = int(self.cluster.max()) + 1
        order = torch.randperm(clusters, generator=torch.Generator().manual_seed(seed))
        if not self.paired:  # positives first, so that each fold gets its share of either side
            positive = torch.isin(order, self.cluster[self.side > 0])
            order = torch.cat([order[positive], order[~positive]])
        fold_of = torch.empty(clusters, dtype=torch.long)
        fold_of[order] = torch.arange(clusters) % max(k, 1)
        fold = fold_of[self.cluster]
        sides = [len(set(fold[self.side == side].tolist())) for side in (1, -1)]
        if k < 2 or min(sides) < k:
            raise ValueError(
                f"expected at least 2 folds and, on each side of {of}, as many prompts that do not belong together (pairs and "
                f"equal texts do); got {k} folds and sides that fill {sides[0]} and {sides[1]}."
            )
        return fold

    def permuted(self, n: int, *, seed: int) -> Float[Tensor, "permutation prompt"]:
        """The sides as they would be if labels meant nothing, n times."""
        generator = torch.Generator().manual_seed(seed)
        if not self.paired:
            return torch.stack([self.side[torch.randperm(len(self.side), generator=generator)] for _ in range(n)])
        flips = torch.randint(2, (n, int(self.cluster.max()) + 1), generator=generator).double() * 2 - 1
        return flips[:, self.cluster] * self.side


def p_values(found: Float[Tensor, " *place"], null: Float[Tensor, " permutation *place"]) -> Float[Tensor, " *place"]:
    """The share of permutations, the unpermuted one among them, that come out as high: (1 + #{null >= found}) / (1 + n)."""
    return (1 + (null >= found - 1e-12).sum(0)) / (1 + len(null))
