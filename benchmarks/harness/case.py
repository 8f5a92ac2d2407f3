"""What a benchmark case is: inputs, providers that compute the same thing, and the check that they do."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam2fast_kernels import library

Outputs = dict[str, Tensor]
Run = Callable[[Any], Outputs]
"""Computes the named outputs of one case from its inputs."""

FACTOR = 4
"""Masks are this many times larger a side than logits, as in SAM 2."""

SIDE = 256
"""Side of the logits of SAM 2 at 1024 x 1024."""


class Shape(NamedTuple):
    """N objects with M candidate masks each, logits of `side` x `side`."""

    text: str
    objects: int
    candidates: int
    side: int

    @property
    def full_size_bytes(self) -> int:
        """One float32 tensor of all candidates at the resolution of the masks."""
        return 4 * self.objects * self.candidates * (FACTOR * self.side) ** 2


@dataclass(frozen=True)
class Provider:
    """One way to compute a case."""

    prepare: Callable[[], Run]
    """Called once for each shape, so that what it compiles fits that shape."""
    full_size_tensors: float = 0
    """Float32 tensors [N, M, H, W] alive at its peak, for refusing what does not fit into memory."""
    obstacle: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device here, or None."""


class Case(ABC):
    """Shapes, modes and providers of one benchmark. `fwd` keeps what the backward pass needs, as training does."""

    name: str
    about: str
    modes: tuple[str, ...]
    shapes: tuple[str, ...]
    check_shape: str
    """A small shape with odd sides, on which every provider is checked first."""
    has_candidates = True
    baseline = "eager"
    providers: dict[str, Provider]
    measure: Callable[[Run, Any, Sequence[str], torch.device], dict[str, float]] | None = None
    """Milliseconds of each mode from one pass, where modes are not the passes of `timing.time_once`."""
    tolerance = 1e-4
    """Largest error of an output, relative to the largest value of its reference."""

    def shape(self, text: str) -> Shape:
        """Read a shape of the command line.

        Raises:
            ValueError: not of the form that this case has.
        """
        form, example = ("NxM", "8x3") if self.has_candidates else ("N", "8")
        pattern = r"([1-9]\d*)x([1-9]\d*)" if self.has_candidates else r"([1-9]\d*)()"
        match = re.fullmatch(rf"{pattern}(?:@([1-9]\d*))?", text)
        if match is None:
            raise ValueError(
                f"unknown shape {text!r} of case {self.name}: write {form}, for instance {example}, or {form}@SIDE "
                f"for logits of another side than {SIDE}, for instance {example}@32"
            )
        objects, candidates, side = match.groups()
        return Shape(text, int(objects), int(candidates or 1), int(side or SIDE))

    @property
    def differentiable(self) -> bool:
        return self.modes != ("fwd",)

    @abstractmethod
    def make_inputs(self, shape: Shape, device: torch.device) -> Any:
        """The same inputs for every provider, from a fixed seed."""

    def dtype(self, inputs: Any) -> torch.dtype:
        """What the results of a row are recorded under."""
        return inputs.logits.dtype

    def backward(self, inputs: Any, outputs: Outputs) -> Tensor:
        """Gradient of the logits."""
        raise NotImplementedError

    @abstractmethod
    def reference(self, inputs: Any) -> Outputs:
        """What the outputs (and `gradient`) should be, in float64 where they are floating point."""

    def observe(self, run: Run, inputs: Any) -> Outputs:
        """Outputs of a provider, and `gradient`."""
        outputs = run(inputs)
        if not self.differentiable:
            return outputs
        gradient = self.backward(inputs, outputs)
        return {name: value.detach() for name, value in outputs.items()} | {"gradient": gradient}

    def fault(self, provider: str, observed: Outputs, expected: Outputs) -> str | None:
        """What is wrong with the outputs of a provider, or None."""
        for name, want in expected.items():
            error = (observed[name].double() - want.double()).abs().max().item()
            largest = want.double().abs().max().item()
            if not error <= self.tolerance * largest:  # NaN is a fault too
                return f"{name} is off by {error:.3g}, the largest value being {largest:.3g}"
        return None

    def model_flops(self, inputs: Any) -> int | None:
        """Arithmetic of the baseline in mode `full`, which the rates of all providers count; None: no rates."""
        return None

    def limit_ms(self, inputs: Any, device: str) -> float | None:
        """Computed time of mode `full` on a device of `limits`, if its kernels reached their limits; None: unknown."""
        return None

    def remarks(self, milliseconds: dict[tuple[str, str, str], float]) -> list[str]:
        """Lines below the table, from the medians by shape, mode and provider."""
        return []

    @abstractmethod
    def ideal_bytes(self, inputs: Any, mode: str) -> int:
        """Every input read once and every output written once, whatever a provider really moves."""


def cpp_obstacle(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on the CPU only"
    return None if library.load_native() else f"was not built; {library.BUILD_REMEDY}"


def triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA only; its interpreter on a CPU is not worth timing"
    return None if importlib.util.find_spec("triton") else "needs Triton: pip install triton"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, specialized for the shapes that it sees first."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)
