"""Cross-attention of a frame to its memories, with the projection of the values, as one layer of SAM 2 does it.

N objects x M memories; a grid is a quarter of the side of the logits, and 64 pointers follow the memories. The baseline
rotates queries and keys and projects the values before `scaled_dot_product_attention`; the others attend to the 64-wide
memories and project afterwards. Without dropout, since each provider would draw another one. Float32 on a CPU, bfloat16
on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness.case import Case, Outputs, Provider, Run, Shape, compiled, cpp_obstacle, triton_obstacle
from torch import Tensor

from sam2fast_kernels import library
from sam2fast_kernels.memory_attention import memory_attention

WIDTH, MEMORY_WIDTH, POINTERS = 256, 64, 64


class Inputs(NamedTuple):
    q: Tensor
    """[N, L, 256], a leaf as all that wants a gradient."""
    k: Tensor
    """[N, M L + 64, 256]"""
    memory: Tensor
    """[N, M L + 64, 64]"""
    weight: Tensor
    """Of the projection of the values: [256, 64]."""
    bias: Tensor
    upstream: Tensor
    """Gradient of the result: [N, L, 256]."""
    cos: Tensor
    """Tables of the rotation, float32: [L, 128]."""
    sin: Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows of whole grids, rotated in float32."""
    a, b = x.float().reshape(len(x), -1, *cos.shape, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape).to(x.dtype)


def _rotated(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys."""
    k = torch.cat([_rotate(inputs.k[:, :-POINTERS], inputs.cos, inputs.sin), inputs.k[:, -POINTERS:]], 1)
    return _rotate(inputs.q, inputs.cos, inputs.sin), k


def eager(inputs: Inputs) -> Outputs:
    q, k = _rotated(inputs)
    values = F.linear(inputs.memory, inputs.weight, inputs.bias)
    result = F.scaled_dot_product_attention(q[:, None], k[:, None], values[:, None])[:, 0]
    return {"loss": (result * inputs.upstream).sum(), "result": result}


def flash(inputs: Inputs) -> Outputs:
    """flash-attn, whose values are as wide as its keys."""
    from flash_attn import flash_attn_func

    q, k = _rotated(inputs)
    values = F.linear(inputs.memory, inputs.weight, inputs.bias)
    result = flash_attn_func(q[:, :, None], k[:, :, None], values[:, :, None])[:, :, 0]
    return {"loss": (result * inputs.upstream).sum(), "result": result}


def flex(inputs: Inputs) -> Outputs:
    """FlexAttention to the 64-wide memories, which has no dropout: the weights of every row sum to 1."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k = _rotated(inputs)
    out = flex_attention(q[:, None], k[:, None], inputs.memory[:, None])[:, 0]
    result = F.linear(out, inputs.weight, inputs.bias)
    return {"loss": (result * inputs.upstream).sum(), "result": result}


def fused(inputs: Inputs, backend: library.Backend) -> Outputs:
    out, row_sum = memory_attention(
        inputs.q, inputs.k, inputs.memory, rotary=(inputs.cos, inputs.sin), num_unrotated=POINTERS, backend=backend
    )
    result = F.linear(out, inputs.weight) + row_sum.to(out.dtype).unsqueeze(-1) * inputs.bias
    return {"loss": (result * inputs.upstream).sum(), "result": result}


def _flex_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "has a backward pass on CUDA only"
    return library.compile_obstacle(device)


def _flash_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA only"
    return None if importlib.util.find_spec("flash_attn") else "needs flash-attn: pip install flash-attn"


class MemoryAttentionCase(Case):
    name = "memory_attention"
    about = "rotary cross-attention to memories and the projection of the values"
    modes = ("fwd", "full")
    shapes = ("3x7", "1x7") if torch.cuda.is_available() else ("1x2@64",)
    check_shape = "2x2@20"
    tolerance = 2e-2  # bfloat16 on a GPU

    def __init__(self) -> None:
        self.providers = {
            "eager": Provider(lambda: eager, full_size_tensors=12),
            "compiled": Provider(lambda: compiled(eager), 8, library.compile_obstacle),
            "cpp": Provider(lambda: self._fused("cpp"), 4, cpp_obstacle),
            "flex": Provider(lambda: compiled(flex), 4, _flex_obstacle),
            "flash": Provider(lambda: flash, 4, _flash_obstacle),
            "triton": Provider(lambda: self._fused("triton"), 2, triton_obstacle),
        }

    @staticmethod
    def _fused(backend: library.Backend) -> Run:
        return functools.partial(fused, backend=backend)

    def make_inputs(self, shape: Shape, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        n, places = shape.objects, (shape.side // 4) ** 2
        keys = shape.candidates * places + POINTERS

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device, dtype)

        q, k, memory = normal(n, places, WIDTH), normal(n, keys, WIDTH), normal(n, keys, MEMORY_WIDTH)
        leaves = [x.requires_grad_() for x in (q, k, memory, normal(WIDTH, MEMORY_WIDTH) / 8, normal(WIDTH))]
        angles = 3 * torch.randn(places, WIDTH // 2, generator=generator).to(device)
        return Inputs(*leaves, normal(n, places, WIDTH), angles.cos(), angles.sin())

    def dtype(self, inputs: Inputs) -> torch.dtype:
        return inputs.q.dtype

    def _gradients(self, inputs: Inputs, outputs: Outputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs["loss"], inputs[:5])

    def backward(self, inputs: Inputs, outputs: Outputs) -> Tensor:
        """All gradients are computed; that of the queries is returned."""
        return self._gradients(inputs, outputs)[0]

    def observe(self, run: Run, inputs: Inputs) -> Outputs:
        outputs = run(inputs)
        gradients = self._gradients(inputs, outputs)
        named = {f"gradient of {name}": grad for name, grad in zip(Inputs._fields, gradients, strict=False)}
        return {"result": outputs["result"].detach()} | named

    def reference(self, inputs: Inputs) -> Outputs:
        # Objects are independent, so they are computed one at a time, which bounds memory.
        leaves = [x.detach().double().requires_grad_() for x in inputs[:5]]
        parts = []
        for n in range(len(inputs.q)):
            q, k, memory = (x[n : n + 1].detach().requires_grad_() for x in leaves[:3])
            upstream = inputs.upstream[n : n + 1].double()
            one = Inputs(q, k, memory, *leaves[3:], upstream, inputs.cos, inputs.sin)
            parts.append(self.observe(self._fused("reference"), one))
        shared = {f"gradient of {name}" for name in ("weight", "bias")}
        return {
            name: torch.stack([part[name] for part in parts]).sum(0)
            if name in shared
            else torch.cat([part[name] for part in parts])
            for name in parts[0]
        }

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Every input read once and the result written once; for `full`, the gradients of the leaves written too."""
        forward = sum(x.nbytes for x in inputs) - inputs.upstream.nbytes + inputs.q.nbytes
        gradients = inputs.upstream.nbytes + sum(x.nbytes for x in inputs[:5])
        return forward + (gradients if mode == "full" else 0)


CASE = MemoryAttentionCase()
