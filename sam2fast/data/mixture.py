"""Which dataset a step trains on.

`Mixture` is what the trainer uses. `official_order` and `repeat_indices` give the orders of the official trainer
(training/dataset of facebookresearch/sam2), for comparison with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..config import StageConfig

_CHUNK = 4096


class Mixture:
    """Item of `stage.data` that each step uses: a pure function of (stage, seed, step), equal on all ranks.

    `alternate` keeps to the items' weights as closely as whole steps can at every step (1:1 is 0, 1, 0, 1, ...);
    `probability` draws each step by itself.

    Args:
        seed: of the run.
        stage_index: place of the stage in the recipe; stages draw differently.
    """

    def __init__(self, stage: StageConfig, seed: int, stage_index: int):
        weights = np.array([item.weight for item in stage.data])
        self._shares = weights / weights.sum()
        self._mode, self._seed = stage.mixture, [seed, stage_index]
        self._order = np.empty(0, np.int16)

    def item(self, step: int) -> int:
        """Index of the item that step `step` (from 0) uses."""
        return int(self._order_to(step + 1)[step])

    def _order_to(self, steps: int) -> np.ndarray:
        while len(self._order) < steps:
            more = self._alternate() if self._mode == "alternate" else self._draw()
            self._order = np.concatenate([self._order, more.astype(np.int16)])
        return self._order

    def _alternate(self) -> np.ndarray:
        """Each step takes the item that is furthest behind its share; the first of several."""
        behind = len(self._order) * self._shares - np.bincount(self._order, minlength=len(self._shares))
        order = np.empty(_CHUNK, np.int64)
        for step in range(_CHUNK):
            behind += self._shares
            order[step] = np.argmax(np.round(behind, 9))  # rounding noise must not decide between equals
            behind[order[step]] -= 1
        return order

    def _draw(self) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(len(self._order),)))
        return rng.choice(len(self._shares), size=_CHUNK, p=self._shares)


def official_order(num_batches: Sequence[int], probabilities: Sequence[float], seed: int = 42) -> list[int]:
    """Order in which the official `MixedDataLoader` visits its loaders in an epoch.

    Each step draws a loader by probability; one that is found exhausted is not drawn again.

    Args:
        num_batches: of each loader in the epoch.
        probabilities: of each loader.
    """
    generator = torch.Generator().manual_seed(seed)
    remaining, shares = list(num_batches), torch.tensor(probabilities)
    order = []
    while shares.any():
        loader = int(shares.multinomial(1, generator=generator))
        if remaining[loader]:
            remaining[loader] -= 1
            order.append(loader)
        else:
            shares[loader] = 0
    return order


def repeat_indices(factors: Sequence[float], epoch: int, seed: int = 0) -> list[int]:
    """Dataset indices of an epoch where item i appears `factors[i]` times on average (official `RepeatFactorWrapper`),
    in ascending order."""
    return torch.repeat_interleave(torch.arange(len(factors)), repeat_counts(factors, epoch, seed)).tolist()


def repeat_counts(factors: Sequence[float] | torch.Tensor, epoch: int, seed: int = 0) -> torch.Tensor:
    """How often each item appears in an epoch, int64 [N]: the whole part of its factor always, the rest by a draw per
    epoch (official `RepeatFactorWrapper`)."""
    wanted = torch.as_tensor(factors, dtype=torch.float32)
    draws = torch.rand(len(wanted), generator=torch.Generator().manual_seed(seed + epoch))
    return (wanted.trunc() + (draws < wanted.frac())).long()
