"""Single modules, encodings and rules of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from det_weights import det_np, det_tensor
from torch import Tensor, nn

from sam2fast.models.layers import LayerNorm2d
from sam2fast.models.memory_attention import RoPEAttention
from sam2fast.models.memory_bank import closest_conditioning
from sam2fast.models.memory_encoder import CXBlock, MaskDownSampler
from sam2fast.models.position import (
    FourierEncoding,
    apply_rotary,
    rotary_tables,
    sine_encoding_1d,
    sine_encoding_2d,
)
from sections import Entry, Floor, Report, schedule

FUNCTION = Floor(absolute=1e-7, relative=3e-7)
"""Elementwise float32 functions of values around 1."""
FOURIER = Floor(absolute=5e-7)
"""Angles up to about 10, of which float32 resolves 5e-7, before sine and cosine."""
MODULE = Floor(absolute=5e-7, relative=3e-7)
"""A few layers of sums over up to 256 products."""


def check(data: Entry, report: Report) -> None:
    for case, compare in CASES.items():
        if case in data:
            compare(data[case], report.at(case=case))


def _fill(module: nn.Module, prefix: str) -> nn.Module:
    state = module.state_dict()
    module.load_state_dict({name: det_tensor(prefix + name, tuple(value.shape)) for name, value in state.items()})
    return module


def _rope(data: Entry, report: Report) -> None:
    cos, sin = rotary_tables(data["dim"], data["end_y"], data["end_x"], theta=data["theta"])
    report.compare("cos", cos, data["cis_real"], FUNCTION)
    report.compare("sin", sin, data["cis_imag"], FUNCTION)
    report.compare("q", apply_rotary(data["q"], cos, sin), data["q_out"], FUNCTION)
    report.compare("k, 3 grids", apply_rotary(data["k"], cos, sin), data["k_out"], FUNCTION)


def _rope_attention(data: Entry, report: Report) -> None:
    attention = _fill(RoPEAttention(data["dim"], kv_dim=data["kv_in_dim"]), "ra.")
    side = int(data["x"].shape[1] ** 0.5)
    tables = rotary_tables(data["dim"], side, side)
    out = attention(data["x"], None, tables, (data["mem"], data["mem"]), data["num_k_exclude_rope"])
    report.compare("out", out, data["out"], MODULE)


def _fourier(data: Entry, report: Report) -> None:
    encoding = FourierEncoding(dim=16)
    encoding.positional_encoding_gaussian_matrix.copy_(torch.from_numpy(det_np("gm", (2, 8))))
    report.compare("dense", encoding.grid(*data["dense"].shape[1:]), data["dense"], FOURIER)
    report.compare("at", encoding(data["coords"] / 64), data["at"], FOURIER)


def _layer_norm(data: Entry, report: Report) -> None:
    norm = LayerNorm2d(len(data["w"]), eps=data["eps"])
    norm.load_state_dict({"weight": data["w"], "bias": data["b"]})
    report.compare("out", norm(data["x"]), data["out"], MODULE)


def _mask_down_sampler(data: Entry, report: Report) -> None:
    module = _fill(MaskDownSampler(data["embed_dim"]), "md.")
    report.compare("out", module(torch.from_numpy(det_np("mx", (2, 1, 64, 64)))), data["out"], MODULE)


def _cx_block(data: Entry, report: Report) -> None:
    module = _fill(CXBlock(data["out"].shape[1]), "cx.")
    report.compare("out", module(torch.from_numpy(det_np("cxx", (2, 8, 9, 9)))), data["out"], MODULE)


def _sine_1d(want: Tensor, report: Report) -> None:
    distances = torch.tensor([0, 1, 2, -3, 7]) / 7  # of object pointers in a clip of eight frames
    report.compare("encoding", sine_encoding_1d(distances, want.shape[1]), want, FUNCTION)


def _sine_2d(want: Tensor, report: Report) -> None:
    report.compare("encoding", sine_encoding_2d(*want.shape), want, FUNCTION)


def _closest_conditioning(rows: list, report: Report) -> None:
    ours = [closest_conditioning(frames, frame, None if limit == -1 else limit) for frame, frames, limit, _ in rows]
    report.equal("frames", [sorted(frames) for frames in ours], [sorted(want) for *_, want in rows])


CASES: dict[str, Callable[..., None]] = {
    "rope": _rope,
    "rope_attn": _rope_attention,
    "sine1d": _sine_1d,
    "sine2d_64_8x8": _sine_2d,
    "random_pe": _fourier,
    "layernorm2d": _layer_norm,
    "mask_downsampler": _mask_down_sampler,
    "cxblock": _cx_block,
    "closest_cond": _closest_conditioning,
    "cosine": schedule.check,
}
