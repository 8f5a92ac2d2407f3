"""Where a training step's time goes on a GPU: `python benchmarks/profile_step.py B+-maskx3@1024-bf16 all_on_graphs`.

Times the step of a provider of the case step_time and lists its kernels. Prints, as the last line, one JSON object:
{"shape", "provider", "device", "ms", "host_ms", "peak_bytes", "launches", "kernel_ms"}. `host_ms` is the time until the
host has queued the step, `kernel_ms` what its kernels take: where the former is the larger one, the GPU waits for the
host.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict

import torch
from cases.step_time import CASE, PROVIDERS, GraphedStep, Inputs, Step
from harness.command import OneLineParser
from harness.report import device_name
from harness.timing import quantile
from torch.profiler import ProfilerActivity, profile

WARM_UP, STEPS = 3, 5


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="profile_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("shape", help="of the case step_time, for instance B+-maskx3@1024-bf16")
    parser.add_argument("provider", choices=PROVIDERS, help="of the case step_time")
    parser.add_argument("--kernels", type=int, default=30, help="how many are listed, the longest first")
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise ValueError("a profile of kernels needs a GPU, and torch sees none here")
        shape = CASE.shape(args.shape)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda")
    inputs = CASE.make_inputs(shape, device)
    switches = PROVIDERS[args.provider]
    step = (GraphedStep if switches.graphs else Step)(shape, device, switches)
    for _ in range(WARM_UP):
        _run(step, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = [_time(step, inputs) for _ in range(STEPS)]
    found = {
        "shape": args.shape,
        "provider": args.provider,
        "device": device_name(device),
        "ms": quantile([ms for ms, _ in times], 0.5),
        "host_ms": quantile([host for _, host in times], 0.5),
        # A graph's memory is not counted as allocated while it is replayed.
        "peak_bytes": torch.cuda.memory_reserved() if switches.graphs else torch.cuda.max_memory_allocated(),
    }
    kernels = _kernels(step, inputs)
    found["launches"] = sum(count for count, _ in kernels.values())
    found["kernel_ms"] = sum(ms for _, ms in kernels.values())
    _print_kernels(kernels, args.kernels)
    print(json.dumps(found))
    return 0


def _run(step: Step, inputs: Inputs) -> None:
    step.update(step.forward(inputs.shape, inputs.batch))


def _time(step: Step, inputs: Inputs) -> tuple[float, float]:
    """Milliseconds of a step, and until the host has queued it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    _run(step, inputs)
    end.record()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    return start.elapsed_time(end), 1e3 * queued


def _kernels(step: Step, inputs: Inputs) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of one step, by kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        _run(step, inputs)
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            total = totals[event.name]
            total[0] += 1
            total[1] += event.device_time_total / 1e3
    return {name: (int(count), ms) for name, (count, ms) in totals.items()}


def _print_kernels(kernels: dict[str, tuple[int, float]], limit: int) -> None:
    print(f"{'ms':>8} {'launches':>8}  kernel")
    for name, (count, ms) in sorted(kernels.items(), key=lambda item: -item[1][1])[:limit]:
        print(f"{ms:8.2f} {count:8d}  {name[:100]}")


if __name__ == "__main__":
    sys.exit(main())
