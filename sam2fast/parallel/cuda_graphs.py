"""Micro-steps as CUDA graphs: forward pass, losses and gradients of one kind of batch, recorded once and replayed.

An eager step starts thousands of kernels, 5 us of the host's time each; a replay is one launch. A kind is what the
caller's Python branches on, together with the shapes of the inputs. It runs eagerly when it is first seen, since most
of the time of a recording is lost on a kind that never comes back. The second time it runs eagerly too, and is then
recorded: right before, so that every constant table exists, every Triton kernel is compiled and every library has its
workspace, which may not happen inside a recording; and beside a step that counts, so that a recording changes nothing.
From the third time on it is replayed.

Batches are copied into static inputs, gradients are added to static buffers, and loss terms leave in a static tensor.
One graph is alive at a time, from its replay to the end of the micro-step: all share the static tensors and one pool of
memory. That pool is as large as the activations of the largest step, and an eager step needs as much beside it.

torch.manual_seed before a micro-step has the same effect on a replay as on an eager step: the generator of the device
is part of every recording, and hands its seed and offset to each replay.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import Config, ConfigError, UserError
from ..performance import RecomputePolicy, automatic_budget
from .ddp import TorchEngine
from .engine import resolve_kind

MAX_GRAPHS = 64
"""Graphs that are kept, the least recently replayed dropped first. The default prompts have 52 kinds for clips of 8
frames with the same number of objects. A recording keeps memory of the driver for each of its kernels, so that fewer
are kept where the device has no room; see `Capture.crowded`."""


class Capture(Protocol):
    """Records work."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` does, without doing it; returns what does it."""

    def crowded(self) -> bool:
        """Whether recordings leave too little memory for an eager step."""


class CudaCapture:
    """Records the kernels that are started, on a stream of its own, into one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._step_bytes = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        gc.collect()  # nothing of an earlier step may die, and free its memory, in the middle
        reserved = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        self._step_bytes = max(self._step_bytes, reserved - torch.cuda.memory_reserved())
        graph = torch.cuda.CUDAGraph()
        # thread_local: the threads of NCCL and of the loaders go on talking to the driver.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def crowded(self) -> bool:
        """Whether less is free than the eager step before the last recording gave back."""
        return torch.cuda.mem_get_info()[0] < self._step_bytes


@dataclass
class _Recording:
    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    values: Tensor
    names: tuple[str, ...]
    """Of the loss terms in `values` [K], which every replay overwrites."""
    reached: frozenset[int]
    """Parameters that get a gradient."""
    constants: object
    """Kept alive, as the recording reads them."""


_Results = tuple[tuple[str, ...], Tensor, frozenset[int]]
"""Names and values [K] of the loss terms, and the parameters that got a gradient."""


class GraphedSteps:
    """Runs the micro-steps of an engine: eagerly at first, then as graphs."""

    def __init__(
        self,
        engine: TorchEngine,
        compute: Callable[[Hashable, Mapping[str, Tensor]], dict[str, Tensor]],
        capture: Capture,
        constants: Callable[[], object] = lambda: None,
        limit: int = MAX_GRAPHS,
        record_at: int = 2,
    ) -> None:
        """Wrap an engine.

        Args:
            compute: loss terms of a kind of batch and its inputs, scalars of one dtype; `total` is what is trained.
                What it does may depend on the kind and on the shapes of the inputs, never on their values.
            constants: tensors that `compute` reads beside inputs, parameters and buffers.
            limit: recordings that are kept.
            record_at: the eager run of a kind that it is recorded beside.
        """
        self._run = self._replayed = 0
        self._engine, self._compute, self._capture, self._constants = engine, compute, capture, constants
        self._limit, self._record_at = limit, record_at
        self._seen: Counter[Hashable] = Counter()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._static: dict[Hashable, Tensor] = {}
        self._grads = [torch.zeros_like(param) for param in engine.params]
        self._reached: set[int] = set()
        self._begun = False

    def run(self, kind: Hashable, inputs: Mapping[str, Tensor], boundary: bool) -> dict[str, Tensor]:
        """Add the gradients of a micro-step; at the `boundary`, the last of an optimizer step, give the sums to the
        engine.

        Args:
            inputs: on the device or, best in pinned memory, on the host.

        Returns:
            The loss terms.

        Raises:
            UserError: memory does not suffice, or a kind of batch cannot be recorded.
        """
        self._run += 1
        if not self._begun:
            torch._foreach_zero_(self._grads)
            self._reached.clear()
        key = (kind, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        recording = self._recordings.get(key)
        if recording is None:
            names, values, reached = self._run_eagerly(key, kind, inputs)
        else:
            names, values, reached = self._replay(key, recording, inputs)
        self._reached |= reached
        self._begun = not boundary
        if boundary:
            self._hand_over()
        return dict(zip(names, values.unbind(), strict=True))

    def replayed_share(self) -> float:
        """Of the micro-steps since the last call."""
        share = self._replayed / max(1, self._run)
        self._run = self._replayed = 0
        return share

    def _record(
        self, kind: Hashable, inputs: Mapping[str, Tensor], names: tuple[str, ...], reached: frozenset[int]
    ) -> _Recording:
        """Record a kind of batch that has just run on inputs like these with results of these names."""
        static = {name: self._static_input(name, x) for name, x in inputs.items()}
        values = torch.zeros(len(names), device=self._engine.ranks.device)

        def work() -> None:
            found = self._accumulate(kind, static)
            assert (found[0], found[2]) == (names, reached), "a recording that differs from the eager step before it"
            values.copy_(found[1])

        try:
            replay = self._capture(work)
        except RuntimeError as error:
            # What a failed recording leaves of the allocator and the stream is not specified: no way on from here.
            raise UserError(
                f"a training step cannot be recorded as a CUDA graph: {error}; set model.cuda_graphs=false (the run "
                "then continues from its last checkpoint)"
            ) from error
        return _Recording(replay, static, values, names, reached, self._constants())

    def _run_eagerly(self, key: Hashable, kind: Hashable, inputs: Mapping[str, Tensor]) -> _Results:
        moved = {name: x.to(self._engine.ranks.device, non_blocking=True) for name, x in inputs.items()}
        try:
            names, values, reached = self._accumulate(kind, moved)
        except torch.OutOfMemoryError as error:
            if not self._recordings:
                raise
            raise UserError(
                "out of memory in an eager step beside CUDA graphs, whose memory is as large as that of a step: raise "
                f"model.recompute, or set model.cuda_graphs=false ({error})"
            ) from error
        self._seen[key] += 1
        if self._seen[key] == self._record_at:
            self._recordings[key] = self._record(kind, moved, names, reached)
            while len(self._recordings) > self._limit or len(self._recordings) > 1 and self._capture.crowded():
                dropped, _ = self._recordings.popitem(last=False)
                del self._seen[dropped]
        return names, values, reached

    def _replay(self, key: Hashable, recording: _Recording, inputs: Mapping[str, Tensor]) -> _Results:
        self._recordings.move_to_end(key)
        for name, x in inputs.items():
            recording.inputs[name].copy_(x, non_blocking=True)
        recording.replay()
        self._replayed += 1
        return recording.names, recording.values.clone(), recording.reached

    def _accumulate(self, kind: Hashable, inputs: Mapping[str, Tensor]) -> _Results:
        """Add gradients to the static ones, in one pass over them and without the nodes that accumulate gradients,
        which would remember the stream of an earlier step."""
        terms = self._compute(kind, inputs)
        grads = torch.autograd.grad(terms["total"], self._engine.params, allow_unused=True)
        reached = [index for index, grad in enumerate(grads) if grad is not None]
        torch._foreach_add_([self._grads[index] for index in reached], [grads[index] for index in reached])
        return tuple(terms), torch.stack([value.detach() for value in terms.values()]), frozenset(reached)

    def _static_input(self, name: str, like: Tensor) -> Tensor:
        """One for all recordings with inputs of this shape, of which one runs at a time."""
        key = (name, like.shape, like.dtype)
        if key not in self._static:
            self._static[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._static[key]

    def _hand_over(self) -> None:
        """Gradients of parameters that no micro-step has reached are missing, or zero where the engine fills them."""
        for index, (param, grad) in enumerate(zip(self._engine.params, self._grads, strict=True)):
            param.grad = grad if index in self._reached or self._engine.fill_missing else None
        self._engine.finish_gradients()


def check_config(config: Config, recompute: str, device: torch.device) -> None:
    """Raises:
    ConfigError: what the configuration, with this policy of recomputation, has beside model.cuda_graphs does not go
        with it.
    """
    if obstacle := _obstacle(config, recompute, device):
        raise ConfigError(f"model.cuda_graphs {obstacle}, or set model.cuda_graphs=false")


def _obstacle(config: Config, recompute: str, device: torch.device) -> str | None:
    """What is in the way, and the remedy."""
    model = config.model
    if device.type != "cuda":
        return f"needs a GPU, and this run is on the device {device.type!r}: set device=cuda"
    if resolve_kind(config.engine) != "torch":
        return "works with the torch engine alone, the hooks of others cannot be recorded: set engine.kind=torch"
    if config.precision == "float16":
        return "has no loss scale, which precision=float16 needs: set precision=bfloat16"
    if model.offload_activations:
        return "cannot record transfers to the host: set model.offload_activations=false"
    policy = RecomputePolicy() if automatic_budget(recompute) is not None else RecomputePolicy.parse(recompute)
    switches = model.performance
    if policy.memory and model.memory_dropout > 0 and not (switches.fused_dropout and switches.fused_memory_attention):
        return (
            f"cannot recompute PyTorch's own dropout ({recompute!r} of model.recompute), whose generator has its state "
            "on the host: set model.performance.fused_dropout=true and model.performance.fused_memory_attention=true"
        )
    if policy.trunk and model.drop_path > 0 and not switches.skip_dropped_paths:
        return (
            f"cannot recompute timm's stochastic depth ({recompute!r} of model.recompute): set "
            "model.performance.skip_dropped_paths=true"
        )
    return None
