"""What a Triton kernel needs of a GPU that need not be there: registers, spills, shared memory, machine code.

Compiles a launch as it would be compiled on that GPU, with the tools of the Triton package. Not possible in a process
that interprets Triton (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program may use, by compute capability: 80 is the A100, 90 the H100."""

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Compiled(NamedTuple):
    threads: int
    registers: int
    """32-bit registers of a thread."""
    stack: int
    """Bytes of a thread in local memory."""
    spills: int
    """Instructions that save or restore registers there."""
    shared: int
    """Bytes of shared memory of a program."""
    loop: Counter[str]
    """Instructions of the longest loop, without modifiers (but `MUFU.EX2`)."""
    sass: str
    """Machine code."""

    def resident_threads(self, capability: int) -> int:
        """Threads that one multiprocessor holds at a time, of its 2048."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = self.shared + 1024  # the system's own
        programs = min(32, 65536 // registers, 2048 // self.threads, SHARED_MEMORY[capability] // shared)
        return programs * self.threads


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for a compute capability, see `SHARED_MEMORY`. The tensors may be on any device, also `meta`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialize(launch.kernel, launch.arguments)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sass = _tool("nvdisasm", kernel.asm["cubin"], "-c")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", kernel.asm["cubin"], "-res-usage"))
    return Compiled(
        threads=32 * launch.warps,
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=kernel.metadata.shared,
        loop=_longest_loop(sass),
        sass=sass,
    )


def _specialize(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by 16 of the arguments, as Triton takes them from those of a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialize = not (parameter.is_constexpr or parameter.do_not_specialize)
        if parameter.is_constexpr or (specialize and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if specialize and type(number) is int and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _tool(name: str, cubin: bytes, *options: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _longest_loop(sass: str) -> Counter[str]:
    """Instructions from the target of a backward branch to the branch; of nested loops this is the outer one."""
    labels, instructions, longest = {}, [], (0, 0)
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*);", line):
            instructions.append(".".join(found[1].split(".")[: 2 if found[1].startswith("MUFU") else 1]))
            target = re.search(r"`\((\.L\w+)\)", found[2]) if instructions[-1] == "BRA" else None
            if target and target[1] in labels:
                here = labels[target[1]], len(instructions)
                # The last instruction of a kernel is an endless loop on itself.
                longest = max(longest, here, key=lambda span: span[1] - span[0])
    return Counter(instructions[slice(*longest)])
