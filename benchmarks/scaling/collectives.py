"""Records the collectives that a program starts, on a real process group or on a fake one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sam2fast_kernels.library import register_flop_formulas

Phase = Literal["forward", "backward", "update"]
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
}
"""Operators of c10d and of the functional collectives, without their namespace."""
SILENT = ("wait_tensor", "barrier", "monitored_barrier_")
"""Of the same namespaces, but they move nothing."""


@dataclass(frozen=True)
class Collective:
    """One that was started."""

    kind: str
    """A value of KINDS."""
    dtype: str
    size: int
    """Bytes of the whole buffer: what is reduced, or what is gathered."""
    stride: int
    """Distance of neighbouring ranks of its group."""
    ranks: int
    phase: Phase
    place: float
    """Share of the step's work that was done when it started."""
    overlapped: bool
    """The program goes on before it has ended."""

    def group(self) -> range:
        """The ranks, of which rank 0 is one."""
        return range(0, self.ranks * self.stride, self.stride)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CollectiveRecorder(TorchDispatchMode):
    """Records collectives and the work between them; enter it inside FakeTensorMode, if at all.

    Work is FLOPs / `flop_rate` or bytes / `byte_rate`, whichever takes longer, of every operation. It only serves to
    tell how far a step is. Values that the host reads from fake tensors are 1 and False: DeepSpeed asks whether
    gradients are finite, and looks for its largest one.
    """

    def __init__(self, flop_rate: float = 312e12, byte_rate: float = 2.0e12) -> None:
        super().__init__()
        register_flop_formulas()
        self.collectives: list[Collective] = []
        self.work = 0.0
        self.phase: Phase = "forward"
        self._rates = flop_rate, byte_rate

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        self.phase = phase
        yield

    def clear(self) -> None:
        """Begin a new step."""
        self.collectives, self.work, self.phase = [], 0.0, "forward"

    def step(self) -> list[Collective]:
        """What was recorded since `clear`, with places as shares of all work."""
        return [replace(one, place=one.place / self.work if self.work else 0.0) for one in self.collectives]

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return False if args[0].dtype is torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        namespace, _, operator = name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            if operator not in SILENT:
                self._record(operator, function, args, kwargs)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        self._work(function, args, kwargs, result)
        return result

    def _record(self, operator: str, function: OpOverload, args, kwargs) -> None:
        if operator not in KINDS:
            raise NotImplementedError(f"the collective {function} is not known to the recorder")
        arguments = function._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments}  # an operator is not given these
        given |= dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        ranks = _ranks_of(given)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Of a shard and the whole, the whole counts; lists of shards are as large together.
        sizes = [sum(x.nbytes for x in tree_leaves(value) if isinstance(x, Tensor)) for value in given.values()]
        kind = KINDS[operator]
        size = max(sizes) * (len(ranks) if kind == "all_gather" and operator == "all_gather_into_tensor" else 1)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        overlapped = bool(given.get("async_op", namespace_is_functional(function)))
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        self.collectives.append(Collective(kind, dtype, size, stride, len(ranks), self.phase, self.work, overlapped))

    def _work(self, function: OpOverload, args, kwargs, result) -> None:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made or function.is_view:
            return
        formula = flop_registry.get(function._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in (*read, *made))
        self.work += max(flops / self._rates[0], moved / self._rates[1])


def namespace_is_functional(function: OpOverload) -> bool:
    """Functional collectives return at once; `wait_tensor` waits."""
    return function.namespace == "_c10d_functional"


def _ranks_of(given: Mapping[str, Any]) -> list[int]:
    if "process_group" in given:
        group = dist.ProcessGroup.unbox(given["process_group"])
    else:
        group = torch._C._distributed_c10d._resolve_process_group(given["group_name"])
    return dist.get_process_group_ranks(group)


def totals(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives by kind, group, dtype and phase: number, bytes of their buffers, and what a rank sends."""
    from .network import sent

    rows: dict[tuple, dict[str, Any]] = {}
    for one in collectives:
        key = (one.phase, one.kind, one.dtype, one.ranks, one.stride, one.overlapped)
        names = ("phase", "kind", "dtype", "ranks", "stride", "overlapped")
        row = rows.setdefault(key, {**dict(zip(names, key, strict=True)), "count": 0, "bytes": 0, "sent": 0.0})
        row["count"] += 1
        row["bytes"] += one.size
        row["sent"] += sent(one.kind, one.size, one.ranks)
    return list(rows.values())
