"""Check, time and weigh the providers of a case against its baseline."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import FOLDER
from .case import Case, Outputs, Run, Shape
from .limits import PEAK_TFLOPS, device_key
from .memory import CHILD_ENVIRONMENT, CudaMeter, free_bytes, give_back, peak_bytes
from .timing import copy_gbps, interleave, quantile, time_once

Peaks = dict[tuple[str, str, str], int]
"""Peak bytes by shape, mode and provider."""


@dataclass
class Row:
    """One provider in one mode at one shape; ratios are those of the baseline to it."""

    shape: str
    mode: str
    provider: str
    ms: float
    ms_p20: float
    ms_p80: float
    samples: int
    dtype: str
    gbps: float
    """Ideal bytes over time, see `Case.ideal_bytes`."""
    copy_share: float
    """`gbps` over the copy bandwidth measured in the same run."""
    tflops: float | None = None
    """FLOPs of the baseline over time, see `Case.model_flops`."""
    mfu: float | None = None
    """`tflops` over the peak of the device."""
    over_limit: float | None = None
    """Time over that of `Case.limit_ms`."""
    peak_bytes: int | None = None
    speedup: float | None = None
    """Of the medians."""
    speedup_p20: float | None = None
    """Of the ratios within one round, as `speedup_p80`."""
    speedup_p80: float | None = None
    memory_ratio: float | None = None


@dataclass
class Result:
    case: str
    copy_gbps: float = 0.0
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """`provider`, `reason`, and `shape` where it is one shape only."""
    refused: list[dict[str, str]] = field(default_factory=list)
    """Providers that fail their check, which makes the run fail."""


def compare(
    case: Case,
    shapes: Sequence[Shape],
    providers: Sequence[str],
    modes: Sequence[str],
    device: torch.device,
    repeats: int | None = None,
) -> Result:
    """Compare `providers` with the baseline, which always runs; a provider that fails its check is not timed."""
    result = Result(case.name)
    names = [case.baseline, *(name for name in providers if name != case.baseline)]
    usable = _usable(case, names, device, result)
    result.copy_gbps = copy_gbps(device)
    peaks: Peaks = {}
    for shape in shapes:
        _say(f"{case.name} {shape.text}: check and time {', '.join(usable)}")
        _compare_shape(case, shape, usable, modes, device, repeats, result, peaks)
    if device.type == "cpu":
        give_back()  # the processes need the memory that this one has freed, or that cycles still hold
        peaks = _peaks_of_processes(case, modes, result)
    _relate(case, result.rows, peaks)
    return result


def _usable(case: Case, names: Sequence[str], device: torch.device, result: Result) -> list[str]:
    """Providers that run here and pass their check on a small shape."""
    inputs = case.make_inputs(case.shape(case.check_shape), device)
    expected = case.reference(inputs)
    usable = []
    for name in names:
        if obstacle := case.providers[name].obstacle(device):
            result.skipped.append({"provider": name, "reason": obstacle})
        elif _passes(case, name, case.check_shape, case.providers[name].prepare(), inputs, expected, result):
            usable.append(name)
    return usable


def _passes(case: Case, provider: str, shape: str, run: Run, inputs: Any, expected: Outputs, result: Result) -> bool:
    try:
        fault = case.fault(provider, case.observe(run, inputs), expected)
    except torch.OutOfMemoryError:
        result.skipped.append({"provider": provider, "shape": shape, "reason": "does not fit into the GPU's memory"})
        return False
    except Exception as error:  # whatever a wrong kernel raises is its failed check
        fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if fault:
        result.refused.append({"provider": provider, "shape": shape, "reason": fault})
    return fault is None


def _compare_shape(
    case: Case,
    shape: Shape,
    usable: Sequence[str],
    modes: Sequence[str],
    device: torch.device,
    repeats: int | None,
    result: Result,
    peaks: Peaks,
) -> None:
    inputs = case.make_inputs(shape, device)
    runs = {name: case.providers[name].prepare() for name in usable if _fits(case, name, shape, device, result)}
    expected = case.reference(inputs)
    runs = {name: run for name, run in runs.items() if _passes(case, name, shape.text, run, inputs, expected, result)}
    del expected
    if not runs:
        return
    timer = case.measure or functools.partial(time_once, case)
    measure = {name: functools.partial(timer, run, inputs, modes, device) for name, run in runs.items()}
    rounds = interleave(measure, device, repeats)
    baseline = rounds.get(case.baseline)
    for mode in modes:
        ideal = case.ideal_bytes(inputs, mode)
        for name in runs:
            times = [times[mode] for times in rounds[name]]
            row = _row(shape, mode, name, times, ideal, result.copy_gbps, str(case.dtype(inputs)))
            if baseline:
                ratios = [base[mode] / ms for base, ms in zip(baseline, times, strict=True)]
                row.speedup_p20, row.speedup_p80 = quantile(ratios, 0.2), quantile(ratios, 0.8)
            if mode == "full":
                _rate(row, case, inputs, device)
            result.rows.append(row)
    if device.type == "cuda":
        for name, run in runs.items():
            for mode, peak in peak_bytes(case, run, inputs, modes, CudaMeter()).items():
                peaks[shape.text, mode, name] = peak


def _fits(case: Case, provider: str, shape: Shape, device: torch.device, result: Result) -> bool:
    """Whether memory suffices, with a fifth to spare."""
    need, free = case.providers[provider].full_size_tensors * shape.full_size_bytes, free_bytes(device)
    if free is None or need < 0.8 * free:
        return True
    reason = f"needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    result.skipped.append({"provider": provider, "shape": shape.text, "reason": reason})
    return False


def _row(shape: Shape, mode: str, provider: str, times: list[float], ideal: int, copy: float, dtype: str) -> Row:
    ms = quantile(times, 0.5)
    gbps = ideal / ms / 1e6
    return Row(
        shape=shape.text,
        mode=mode,
        provider=provider,
        ms=ms,
        ms_p20=quantile(times, 0.2),
        ms_p80=quantile(times, 0.8),
        samples=len(times),
        dtype=dtype.removeprefix("torch."),
        gbps=gbps,
        copy_share=gbps / copy,
    )


def _rate(row: Row, case: Case, inputs: Any, device: torch.device) -> None:
    """Fill in arithmetic and limits, where they are known."""
    flops, key = case.model_flops(inputs), device_key(device)
    if flops:
        row.tflops = flops / row.ms / 1e9
        row.mfu = row.tflops / PEAK_TFLOPS[key] if key else None
    if key and (limit := case.limit_ms(inputs, key)):
        row.over_limit = row.ms / limit


def _relate(case: Case, rows: list[Row], peaks: Peaks) -> None:
    """Fill in memory and the ratios to the baseline of the same shape and mode."""
    for row in rows:
        row.peak_bytes = peaks.get((row.shape, row.mode, row.provider))
    baselines = {(row.shape, row.mode): row for row in rows if row.provider == case.baseline}
    for row in rows:
        baseline = baselines.get((row.shape, row.mode))
        if baseline is None:
            continue
        row.speedup = baseline.ms / row.ms
        if baseline.peak_bytes is not None and row.peak_bytes:
            row.memory_ratio = baseline.peak_bytes / row.peak_bytes


def _peaks_of_processes(case: Case, modes: Sequence[str], result: Result) -> Peaks:
    """Peaks on a CPU: one new process for each provider, over the shapes that were timed."""
    peaks: Peaks = {}
    for name in dict.fromkeys(row.provider for row in result.rows):
        shapes = list(dict.fromkeys(row.shape for row in result.rows if row.provider == name))
        _say(f"{case.name} {' '.join(shapes)}: peak memory of {name}")
        command = [sys.executable, str(FOLDER / "peak_memory.py"), case.name, name, "--shape", *shapes]
        command += ["--threads", str(torch.get_num_threads()), "--mode", *modes]
        done = subprocess.run(command, env=os.environ | CHILD_ENVIRONMENT, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            measured = json.loads(line)
            for mode, peak in measured["peak_bytes"].items():
                peaks[measured["shape"], mode, name] = peak
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            result.skipped.append({"provider": name, "reason": f"peak memory not measured: {reason}"})
    return peaks


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
