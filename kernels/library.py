"""The `sam2fast::` operators: how one is registered, where its compiled form comes from, which back end runs.

Back ends: `reference` (plain PyTorch or Python, the ground truth, always there) and `cpp` (kernels/csrc, built by
CMakeLists.txt when the package is installed beside a compiler). `auto` takes the fastest one that is present.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

Backend = Literal["auto", "reference", "cpp"]

NATIVE_LIBRARY = Path(__file__).with_name("_native.so")
BUILD_REMEDY = (
    "install cmake and a C++20 compiler, then run in the checkout: pip install --no-deps --no-build-isolation -e ."
)

_OPERATORS = torch.library.Library("sam2fast", "FRAGMENT")
_COMPILED: set[str] = set()


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


def register(name: str, signature: str, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register `sam2fast::<name>`; on the CPU it runs the compiled form where there is one and `reference` elsewhere.

    Args:
        signature: the operator's schema without its name, `(Tensor x) -> Tensor`.
        fake: computes shapes and dtypes of the outputs only, for torch.compile and FakeTensorMode.
    """
    _OPERATORS.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    if load_native() and torch._C._dispatch_has_kernel_for_dispatch_key(f"sam2fast::{name}", "CPU"):
        _COMPILED.add(name)
    else:
        _OPERATORS.impl(name, reference, "CPU")
    torch.library.register_fake(f"sam2fast::{name}", fake, lib=_OPERATORS)
    return getattr(torch.ops.sam2fast, name).default


def choose_backend(name: str, requested: Backend, slower: str) -> Literal["reference", "cpp"]:
    """The back end that runs `sam2fast::<name>`; `auto` without the compiled form warns once, with `slower` as reason.

    Raises:
        ValueError: unknown back end, or `cpp` asked for where it was not built.
    """
    if requested not in ("auto", "reference", "cpp"):
        raise ValueError(f"unknown back end {requested!r} of sam2fast::{name}; valid: auto, reference, cpp")
    if requested == "reference":
        return "reference"
    if name in _COMPILED:
        return "cpp"
    if requested == "cpp":
        raise ValueError(f"back end 'cpp' of sam2fast::{name} was not built; {BUILD_REMEDY}, or choose 'auto'")
    _warn_once(f"sam2fast_kernels has no compiled operators: {slower}; to change that, {BUILD_REMEDY}")
    return "reference"


@functools.cache
def _warn_once(message: str) -> None:
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:
        warnings.warn(message, stacklevel=4)
