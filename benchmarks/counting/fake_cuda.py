"""A CUDA device for fake tensors where PyTorch has none.

Importing this module does not import torch: PyTorch asks for its CUDA hooks while it is imported and keeps the answer.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


class FakeCudaError(RuntimeError):
    """No fake CUDA device can be had here; the message says why and what to do."""


def load() -> None:
    """Give this process the device "cuda", for tensors of FakeTensorMode alone; call it before torch is imported.

    Where PyTorch has a real CUDA device nothing is done: fake tensors can name it. The first call on a machine compiles
    fake_cuda.cpp into the user's cache folder (about 4 seconds).

    Raises:
        FakeCudaError: torch is imported already, is a CUDA build that sees no GPU, or there is no C++ compiler.
    """
    torch_folder = _torch_folder()
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        import torch

        if not torch.cuda.is_available():
            raise FakeCudaError(
                "this PyTorch is built for CUDA but sees no GPU, and its own hooks cannot be replaced: count on a "
                "machine with a GPU, or with the CPU build of PyTorch (requirements/torch-cpu.txt)"
            )
        return
    if "torch" in sys.modules:
        raise FakeCudaError("torch is imported already, too late for a fake CUDA device: count in a process of its own")
    ctypes.CDLL(str(_build(torch_folder)))
    _allow_autocast()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise FakeCudaError("torch is not installed")
    return Path(spec.submodule_search_locations[0])


def _build(torch_folder: Path) -> Path:
    """The compiled library for this source and this torch."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(f"{importlib.metadata.version('torch')} {torch_folder}".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam2fast"
    library = cache / f"fake_cuda-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FakeCudaError("a fake CUDA device needs a C++20 compiler, once: install g++, or name yours in CXX")
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: another process may be building or loading it.
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=cache)
    os.close(descriptor)
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", unfinished]
    command += [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    command += [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise FakeCudaError(f"{compiler} cannot compile {SOURCE.name}: {_last_line(done.stderr)}")
        os.replace(unfinished, library)
    except OSError as error:
        raise FakeCudaError(f"the compiler {compiler!r} does not run: {error}; set CXX to one that does") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.splitlines() or ["no message"])[-1]


def _allow_autocast() -> None:
    """torch.autocast asks the driver, which is not there, whether the device has bfloat16."""
    import torch

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
