"""Launches of the Triton kernels of memory attention: block sizes, scratch tensors, order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..launch import Launch, multiprocessors
from .triton_kernels import (
    combine_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    rotate_kernel,
    row_kernel,
)


class Blocks(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int
    halves: bool = False
    """See `tiles.load_halves`."""


# By (compute capability, values wider than 64), for 16-bit tensors: the fastest that were tried on an H100; for the
# A100, on which nothing was measured, those that spill the fewest registers.
FORWARD = {
    (80, False): Blocks(128, 64, 8, 2),
    (80, True): Blocks(64, 64, 8, 1, halves=True),
    (90, False): Blocks(128, 64, 8, 3),
    (90, True): Blocks(128, 32, 8, 3),
}
QUERY_GRADIENT = {
    (80, False): Blocks(128, 16, 8, 2, halves=True),
    (80, True): Blocks(128, 16, 8, 1, halves=True),
    (90, False): Blocks(64, 32, 4, 3),
    (90, True): Blocks(128, 32, 8, 2),
}
KEY_GRADIENT = {
    (80, False): Blocks(64, 64, 8, 2, halves=True),
    (80, True): Blocks(64, 32, 8, 1),
    (90, False): Blocks(32, 128, 8, 3),
    (90, True): Blocks(64, 32, 8, 2),
}
FLOAT32 = Blocks(32, 32, 8, 1)
"""Of all kernels; products of float32 use no tensor core."""
ROWS = 64
"""Of a program of `row_kernel` and `combine_kernel`."""
ROTATED_ROWS = 16
"""Of a program of `rotate_kernel`."""
MOST_PARTS = 8
KEYS_OF_A_PART = 2048
"""At least; adding up fewer would cost more than idle multiprocessors."""


def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.memory_attention`."""
    launches = forward_launches(q, k, v, cos, sin, num_unrotated, dropout, seed)
    for launch in launches:
        launch.run()
    out, row_sum, lse = (launches[-1].arguments[name] for name in ("out", "row_sum", "lse"))
    return _narrow(out, v.shape[2]), row_sum, lse


def memory_attention_backward(
    grad_out: Tensor, grad_row_sum: Tensor, out: Tensor, row_sum: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.memory_attention_backward`."""
    launches = gradient_launches(
        grad_out, grad_row_sum, out, row_sum, lse, q, k, v, cos, sin, num_unrotated, dropout, seed
    )
    for launch in launches:
        launch.run()
    *_, of_keys, back_q, back_k = (launch.arguments for launch in launches)
    return (
        _narrow(back_q["out"], q.shape[2]),
        _narrow(back_k["out"], k.shape[2]),
        _narrow(of_keys["grad_v"], v.shape[2]),
    )


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
    capability: int | None = None,
) -> list[Launch]:  # fmt: skip
    """To run one after the other; the last leaves `out` [N, L, DV], `row_sum` and `lse` [N, L]. Compiled for the GPU of
    the tensors if `capability` is None."""
    arguments, launches = _inputs(q, k, v, cos, sin, num_unrotated, dropout)
    n, queries, _ = q.shape
    width = arguments["DV"]
    block = _blocks(FORWARD, arguments, capability)
    blocks = triton.cdiv(queries, block.queries)
    parts = _parts(n * blocks, arguments, block)
    sums = {
        "result": q.new_empty((parts, n, queries, width), dtype=torch.float32),
        "state": q.new_empty((parts, n, queries, 3), dtype=torch.float32),
    }
    outputs = {
        "out": v.new_empty((n, queries, width)),
        "row_sum": q.new_empty((n, queries), dtype=torch.float32),
        "lse": q.new_empty((n, queries), dtype=torch.float32),
    }
    combine = sums | outputs | {"rows": n * queries, "parts": parts, "ROWS": ROWS}
    return [
        *launches,
        _launch(forward_kernel, n, blocks, parts, arguments | sums | {"seed": seed}, block),
        Launch(combine_kernel, triton.cdiv(n * queries, ROWS), _taken(combine_kernel, arguments | combine)),
    ]


def gradient_launches(
    grad_out: Tensor, grad_row_sum: Tensor, out: Tensor, row_sum: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float, seed: Tensor,
    capability: int | None = None,
) -> list[Launch]:  # fmt: skip
    """To run one after the other; the last three leave `grad_v`, and as `out` the gradients of q and of k."""
    arguments, launches = _inputs(q, k, v, cos, sin, num_unrotated, dropout)
    n, queries, _ = q.shape
    keys, width, value_width = k.shape[1], arguments["D"], arguments["DV"]
    arguments |= {
        "grad_out": _widened(grad_out, value_width).contiguous(),
        "delta": torch.empty_like(lse),
        "offset": torch.empty_like(lse),
        "random_keys": lse.new_empty(lse.shape if dropout else 0, dtype=torch.int32),
        "lse": lse,
    }
    of_rows = {
        "grad_row_sum": grad_row_sum.contiguous(),
        "out": _widened(out, value_width), "row_sum": row_sum, "seed": seed, "rows": n * queries, "ROWS": ROWS
    }  # fmt: skip
    block = _blocks(QUERY_GRADIENT, arguments, capability)
    blocks = triton.cdiv(queries, block.queries)
    parts = _parts(n * blocks, arguments, block)
    of_q = {"grad_q": q.new_empty((parts, n, queries, width), dtype=torch.float32)}
    of_k = {"grad_k": k.new_empty((n, keys, width)), "grad_v": v.new_empty((n, keys, value_width))}
    key_block = _blocks(KEY_GRADIENT, arguments, capability)
    of_k["FULL"] = queries % key_block.queries == 0
    rotate_q, rotate_k = (launch.arguments for launch in launches)
    return [
        *launches,
        Launch(row_kernel, triton.cdiv(n * queries, ROWS), _taken(row_kernel, arguments | of_rows)),
        _launch(query_gradient_kernel, n, blocks, parts, arguments | of_q, block),
        _launch(key_gradient_kernel, n, triton.cdiv(keys, key_block.keys), 1, arguments | of_k, key_block),
        _rotation(of_q["grad_q"], rotate_q | {"out": q.new_empty((n, queries, width))}, arguments["scale"], back=True),
        _rotation(of_k["grad_k"], rotate_k | {"out": of_k["grad_k"]}, 1.0, back=True),
    ]


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_unrotated: int, dropout: float
) -> tuple[dict, list[Launch]]:
    """Arguments of all kernels that work on scores, and the launches that rotate q and k for them."""
    width = max(32, triton.next_power_of_2(q.shape[2]))
    value_width = max(16, triton.next_power_of_2(v.shape[2]))
    if max(width, value_width) > 256:
        raise ValueError(
            f"the Triton kernels take queries, keys and values up to 256 wide, not {width} and {value_width}: use "
            "backend='reference'"
        )
    tables = {name: _widened(table, width // 2).contiguous() for name, table in (("cos", cos), ("sin", sin))}
    launches = []
    for x, rotated in ((q, q.shape[1]), (k, k.shape[1] - num_unrotated)):
        out = x.new_empty((*x.shape[:2], width))
        settings = tables | {"out": out, "rotated": rotated, "positions": len(cos), "D": width}
        launches.append(_rotation(_widened(x, width), settings, 1.0))
    v = _rows_of_neighbors(_widened(v, value_width))
    arguments = {
        "q": launches[0].arguments["out"],
        "k": launches[1].arguments["out"],
        "v": v,
        "v_n": v.stride(0),
        "v_m": v.stride(1),
        "queries": q.shape[1],
        "keys": k.shape[1],
        "scale": q.shape[2] ** -0.5,
        "kept_scale": 1 / (1 - dropout),
        "D": width,
        "DV": value_width,
        "THRESHOLD": int(dropout * 2**32),
    }
    return arguments, launches


def _rotation(x: Tensor, settings: dict, scale: float, back: bool = False) -> Launch:
    """Of x [N, L, D], or of the sum of x [parts, N, L, D]."""
    parts, (n, rows, _) = (len(x) if x.dim() == 4 else 1), x.shape[-3:]
    x = _rows_of_neighbors(x)
    blocks = triton.cdiv(rows, ROTATED_ROWS)
    arguments = settings | {
        "x": x,
        "x_n": x.stride(-3),
        "x_l": x.stride(-2),
        "rows": rows,
        "parts": parts,
        "blocks": blocks,
        "sign": -1.0 if back else 1.0,
        "scale": scale,
        "ROTATE": settings["positions"] > 0,
        "ROWS": ROTATED_ROWS,
    }
    return Launch(rotate_kernel, n * blocks, _taken(rotate_kernel, arguments))


def _rows_of_neighbors(x: Tensor) -> Tensor:
    """x, whose channels lie beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the channels, which change neither scores nor the other channels; tiles are powers of two wide."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


def _narrow(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def _blocks(table: dict[tuple[int, bool], Blocks], arguments: dict, capability: int | None) -> Blocks:
    tensor = arguments["q"]
    if tensor.dtype == torch.float32:
        return FLOAT32
    if capability is None:
        major = torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 8
        capability = 90 if major >= 9 else 80
    return table[capability, arguments["DV"] > 64]


def _parts(programs: int, arguments: dict, block: Blocks) -> int:
    """Of the keys (the splits of Flash-Decoding), so that programs fill all rounds of all multiprocessors best."""
    slots = multiprocessors(arguments["q"]) * (8 // block.warps)
    most = min(MOST_PARTS, arguments["keys"] // KEYS_OF_A_PART)
    return min(range(1, max(1, most) + 1), key=lambda parts: triton.cdiv(programs * parts, slots) / parts)


def _launch(kernel, n: int, blocks: int, parts: int, arguments: dict, block: Blocks) -> Launch:
    """Of `blocks` blocks of rows for each batch element and part of the keys."""
    arguments = arguments | {
        "blocks": blocks,
        "parts": parts,
        "chunk": triton.cdiv(triton.cdiv(arguments["keys"], parts), block.keys) * block.keys,
        "QUERIES": block.queries,
        "KEYS": block.keys,
        "HALVES": block.halves,
        "VALUE_HALVES": block.halves and arguments["DV"] > 64,
    }
    return Launch(kernel, n * blocks * parts, _taken(kernel, arguments), block.warps, block.stages)


def _taken(kernel, arguments: dict) -> dict:
    """The arguments that a kernel has."""
    return {name: arguments[name] for name in kernel.arg_names}
