"""Gradients in flat buckets that are summed over ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
ALIGNMENT = 32
"""Elements that a gradient starts at a multiple of: kernels read and write whole words of aligned tensors only."""


class _Bucket:
    """Neighboring gradients, as views of one tensor."""

    def __init__(self, members: list[int], params: Sequence[nn.Parameter]) -> None:
        self.members = members
        first, sizes = params[members[0]], [params[index].numel() for index in members]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self.flat = torch.zeros(sum(padded), dtype=first.dtype, device=first.device)
        self.views = {
            index: part[:size].view_as(params[index])
            for index, size, part in zip(members, sizes, self.flat.split(padded), strict=True)
        }
        self.waiting = set(members)
        """Whose gradient is not complete."""
        self.sent: Tensor | None = None
        self.work: dist.Work | None = None


class GradientBuckets:
    """Averages the gradients of parameters over ranks.

    Gradients are accumulated where they are sent from. In the last backward pass of an optimizer step a bucket is sent
    when all of its gradients are complete, and always after the buckets before it, so that every rank sends them in one
    order. Buckets follow the backward pass: last used, first sent.

    Parameters that a step did not reach would hold back their bucket and all after it. From the next step on they have
    buckets of their own, behind the others; what is incomplete or empty there is sent or left out when the backward
    pass is over. No graph is searched for them: which parameters a batch reaches depends on its kind, which is equal on
    all ranks, so all ranks move the same.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        world_size: int,
        dtype: torch.dtype = torch.float32,
        fill_missing: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Take over the gradients of `params`, of one dtype, in the order of their use in the forward pass.

        Args:
            dtype: in which gradients are added up.
            fill_missing: parameters that no micro-step reached get a zero gradient; else none.
        """
        self.params = list(params)
        self.world_size, self.dtype = world_size, dtype
        self.fill_missing, self.bucket_bytes = fill_missing, bucket_bytes
        self.optional: set[int] = set()
        """Parameters that some step did not reach."""
        self._reached: set[int] = set()
        self._sending = False
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrived, index))
            for index, param in enumerate(self.params)
        ]
        self._lay_out()
        self.reset()

    def expect_missing(self, indices: Iterable[int]) -> None:
        """Before the first step: parameters that a step of the run that is continued did not reach. Gradients are then
        added up in the same order as without the interruption."""
        self.optional |= set(indices)
        self._lay_out()
        self.reset()

    def begin(self, last: bool) -> None:
        """Before every backward pass; `last` is that of an optimizer step."""
        self._sending = last

    def finish(self) -> None:
        """After the last backward pass: all gradients are averages over ranks. Gradients may also have been set from
        outside, instead of by backward passes."""
        for index, param in enumerate(self.params):
            if param.grad is not None and param.grad is not self._view(index):
                self._reached.add(index)
        while self._next < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                if bucket.sent is not bucket.flat:
                    bucket.flat.copy_(bucket.sent)
                bucket.flat /= self.world_size
            bucket.sent = bucket.work = None
        for index, param in enumerate(self.params):
            param.grad = self._view(index) if self.fill_missing or index in self._reached else None
        self._sending = False

    def reset(self) -> None:
        """After the update: gradients are zero again."""
        missed = set(range(len(self.params))) - self._reached - self.optional
        if self._reached and missed:
            self.optional |= missed
            self._lay_out()
        self._reached.clear()
        self._next = 0
        torch._foreach_zero_([bucket.flat for bucket in self.buckets])
        for bucket in self.buckets:
            bucket.waiting = set(bucket.members)
            for index, view in bucket.views.items():
                self.params[index].grad = view

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for param in self.params:
            param.grad = None

    def _lay_out(self) -> None:
        self.buckets: list[_Bucket] = []
        for param in self.params:
            param.grad = None  # the last that holds the old buckets
        order = range(len(self.params))[::-1]
        for optional in (False, True):
            members = [index for index in order if (index in self.optional) == optional]
            self.buckets += [_Bucket(part, self.params) for part in self._cut(members)]
        self._home = {index: bucket for bucket in self.buckets for index in bucket.members}

    def _cut(self, members: list[int]) -> list[list[int]]:
        """Consecutive parameters in groups of about `bucket_bytes`."""
        groups: list[list[int]] = []
        size = self.bucket_bytes
        for index in members:
            if size >= self.bucket_bytes:
                groups.append([])
                size = 0
            groups[-1].append(index)
            size += self.params[index].numel() * self.params[index].element_size()
        return groups

    def _view(self, index: int) -> Tensor:
        return self._home[index].views[index]

    def _arrived(self, index: int, _: nn.Parameter) -> None:
        """A backward pass has added its share to a gradient."""
        self._reached.add(index)
        if not self._sending:
            return
        bucket = self._home[index]
        if bucket.work is not None:
            raise RuntimeError(
                "a gradient grew after it was sent to the other ranks: the backward pass reached a parameter twice"
            )
        bucket.waiting.discard(index)
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._send()

    def _send(self) -> None:
        """Send the next bucket, if it has anything."""
        bucket = self.buckets[self._next]
        self._next += 1
        reached = [index for index in bucket.members if index in self._reached]
        outside = [index for index in reached if self.params[index].grad is not bucket.views[index]]
        if outside:
            torch._foreach_copy_(
                [bucket.views[index] for index in outside], [self.params[index].grad for index in outside]
            )
        if reached:
            bucket.sent = bucket.flat.to(self.dtype)
            bucket.work = dist.all_reduce(bucket.sent, async_op=True)
