"""Operators `sam2fast::<name>`: how one is registered, where its compiled form comes from, which back end runs.

Every operator has one overload for each of its back ends: `reference` (plain PyTorch or Python, the ground truth,
always there), `cpp` (kernels/csrc, built by CMakeLists.txt when the package is installed beside a compiler; CPU) and
`triton` (CUDA; with TRITON_INTERPRET=1 also CPU tensors, for tests). `auto` takes the fastest that fits the tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._ops import OpOverload

Backend = Literal["auto", "reference", "cpp", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

NATIVE_LIBRARY = Path(__file__).with_name("_native.so")
BUILD_REMEDY = (
    "install cmake and a C++20 compiler, then run in the checkout: pip install --no-deps --no-build-isolation -e ."
)

KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What the kernels of floating-point operators take; float64 runs on the reference."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FLOP_FORMULAS: dict[str, Callable[..., int]] = {}
_OPERATORS = torch.library.Library("sam2fast", "FRAGMENT")


@functools.cache
def load_native() -> bool:
    """Load the compiled operators. False where they were not built, or (with a warning) do not fit this torch."""
    if not NATIVE_LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(str(NATIVE_LIBRARY))
    except OSError as error:
        warnings.warn(f"the compiled operators of sam2fast_kernels do not load: {error}; {BUILD_REMEDY}", stacklevel=2)
        return False
    return True


@functools.cache
def _compiled() -> frozenset[str]:
    """Names of the compiled operators."""
    return frozenset(torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if load_native() else ())


def lazy(package: str, path: str) -> Callable:
    """The function `path`, "module:function" in `package`, whose module is imported when it is first called."""
    module, _, function = path.partition(":")

    def run(*args):
        return getattr(importlib.import_module(f".{module}", package), function)(*args)

    return run


def define_native(name: str, signature: str) -> None:
    """Declare `sam2fast::<name>`, a compiled step of a back end that is written in Python; it is no operator for users
    and has neither gradient nor fake implementation."""
    _OPERATORS.define(name + signature)


class Operator:
    """`sam2fast::<name>` and its overloads, each with schema, fake implementation and (if any) autograd formula."""

    def __init__(
        self,
        name: str,
        signature: str,
        *,
        reference: Callable,
        fake: Callable,
        triton: Callable | None = None,
        cpp: tuple[Callable, str] | None = None,
        kernel_dtypes: frozenset[torch.dtype] | None = None,
        flops: Callable[..., int] | None = None,
        slower: str = "",
        compiled: bool = True,
    ) -> None:
        """Register the operator.

        Args:
            signature: the schema without its name, `(Tensor x) -> Tensor`.
            fake: computes shapes and dtypes of the outputs only, for torch.compile and FakeTensorMode.
            triton: launches the Triton kernels; imports them, and Triton, when it is called.
            cpp: where this back end is Python over compiled steps: its function, and one of the steps; None where it is
                compiled as a whole.
            kernel_dtypes: dtypes of the first argument that `cpp` and `triton` take; None for all.
            flops: arithmetic of a call from the shapes of its arguments, see `register_flop_formulas`.
            slower: what a user loses where `auto` falls back to `reference`.
            compiled: whether there is a form for CPUs; without one `reference` is the fastest there.
        """
        self.name = name
        self.overloads: dict[str, OpOverload] = {}
        self._kernel_dtypes = kernel_dtypes
        self._slower = slower
        self._kernels = {"cuda": "triton"} | ({"cpu": "cpp"} if compiled else {})
        self._define("reference", signature, fake, reference)
        run, step = cpp or (None, f"{name}.cpp")
        if f"sam2fast::{step}" in _compiled():
            self._define("cpp", signature, fake, run)
        if triton is not None:
            self._define("triton", signature, fake, triton)
        if flops is not None:
            _FLOP_FORMULAS[name] = flops

    def _define(self, backend: str, signature: str, fake: Callable, run: Callable | None) -> None:
        overload = f"{self.name}.{backend}"
        _OPERATORS.define(overload + signature, tags=(torch.Tag.pt2_compliant_tag,))
        if run is not None:
            _OPERATORS.impl(overload, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sam2fast::{overload}", fake, lib=_OPERATORS)
        self.overloads[backend] = getattr(getattr(torch.ops.sam2fast, self.name), backend)

    def differentiate(self, gradient: Operator, backward: Callable, setup_context: Callable) -> None:
        """Set the autograd formula, `backward(ctx, run, *grads)` with `run` the same back end of `gradient`."""
        for backend in self.overloads:
            torch.library.register_autograd(
                f"sam2fast::{gradient.name}.{backend}", _refuse_second_derivative, lib=_OPERATORS
            )
            torch.library.register_autograd(
                f"sam2fast::{self.name}.{backend}",
                functools.partial(_call_backward, backward, gradient.overloads[backend]),
                setup_context=setup_context,
                lib=_OPERATORS,
            )

    def choose(self, requested: Backend, tensor: Tensor) -> OpOverload:
        """The overload that runs on `tensor`; `auto` without the kernel of its device warns once.

        Raises:
            ValueError: unknown back end, or one that does not run on this tensor or was not built.
        """
        if requested not in BACKENDS:
            raise ValueError(f"unknown back end {requested!r} of sam2fast::{self.name}; valid: {', '.join(BACKENDS)}")
        if requested == "auto":
            requested = self._fastest(tensor)
        elif requested != "reference" and (obstacle := self._obstacle(requested, tensor)):
            raise ValueError(f"back end {requested!r} of sam2fast::{self.name} {obstacle}, or choose 'auto'")
        return self.overloads[requested]

    def _fastest(self, tensor: Tensor) -> str:
        kernel = self._kernels.get(tensor.device.type)
        if kernel is None or (self._kernel_dtypes and tensor.dtype not in self._kernel_dtypes):
            return "reference"
        obstacle = self._obstacle(kernel, tensor)
        if obstacle:
            if not torch.compiler.is_compiling():  # a warning would break the graph
                _warn_once(
                    f"sam2fast::{self.name} runs as plain PyTorch, {self._slower}: back end {kernel!r} {obstacle}"
                )
            return "reference"
        return kernel

    def _obstacle(self, backend: str, tensor: Tensor) -> str | None:
        """Why this back end cannot run on the tensor, and the remedy; None where it can."""
        if self._kernel_dtypes and tensor.dtype not in self._kernel_dtypes:
            takes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._kernel_dtypes))
            return f"takes {takes}, not {str(tensor.dtype).removeprefix('torch.')}: use 'reference'"
        device = tensor.device.type
        if backend == "cpp":
            if device != "cpu":
                return f"runs on the CPU, the tensors are on {device}: move them"
            return None if "cpp" in self.overloads else f"was not built; {BUILD_REMEDY}"
        if "triton" not in self.overloads:
            return "does not exist: use 'reference'"
        if not _HAS_TRITON:
            return "needs Triton: pip install triton"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"runs on CUDA, the tensors are on {device}: move them, or set TRITON_INTERPRET=1 to test it slowly"
        return None


def _call_backward(backward: Callable, run: OpOverload, ctx, *grads):
    return backward(ctx, run, *grads)


def register_flop_formulas() -> None:
    """Let torch.utils.flop_counter.FlopCounterMode count these operators. Importing it imports Triton, so not by
    default."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FLOP_FORMULAS.items():
        operator = getattr(torch.ops.sam2fast, name)
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


def compile_obstacle(device: torch.device) -> str | None:
    """What torch.compile lacks on a device, and the remedy; None where it can run."""
    if device.type == "cuda":
        return None if _HAS_TRITON else "needs Triton: pip install triton"
    found = any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))
    return None if found else "needs a C++ compiler: install g++"


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("the operators of sam2fast_kernels have no second derivative; use plain PyTorch for it")


@functools.cache
def _warn_once(message: str) -> None:
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:
        warnings.warn(message, stacklevel=5)
