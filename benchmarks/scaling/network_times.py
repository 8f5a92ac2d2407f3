"""Time collectives between the ranks of this machine: `python benchmarks/scaling/network_times.py --ranks 2`.

Starts itself through torchrun, times each kind of collective on buffers of several sizes (gloo on a CPU, NCCL on GPUs),
fits a latency and a bus bandwidth to the medians, and writes both to results/scaling_network.csv, which `predict.py
--check` reads. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.command import OneLineParser  # noqa: E402  (harness first: it makes both packages importable)

from scaling.command import failure  # noqa: E402

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 4 * 2**20, 16 * 2**20, 48 * 2**20)
"""Bytes of whole buffers."""
ROUNDS, WARM_UP = 15, 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="network_times.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _rank()
    if args.ranks < 2:
        parser.error("--ranks must be 2 or more")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        parser.error(f"timing on {args.ranks} ranks failed: {failure(done.stderr)}")
    from scaling import tables
    from scaling.network import fit

    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows = []
    for kind, times in found["seconds"].items():
        line = fit(kind, args.ranks, {int(size): seconds for size, seconds in times.items()})
        rows.append({"kind": kind, "ranks": args.ranks, "latency_us": 1e6 * line.latency})
        rows[-1] |= {"gb_per_s": line.bandwidth / 1e9, **tables.origin(found["device"], 1)}
        print(f"{kind}: {rows[-1]['latency_us']:.0f} us, {rows[-1]['gb_per_s']:.3g} GB/s bus bandwidth")
    if not args.no_save:
        tables.add_rows(tables.NETWORK, rows, ("kind", "ranks"))
    print(json.dumps({"case": "network_times", "measured": True, "rows": rows}))
    return 0


def _rank() -> int:
    import torch
    import torch.distributed as dist

    from sam2fast.parallel import setup, teardown

    ranks = setup()
    seconds: dict[str, dict[int, float]] = {}
    for size in SIZES:
        whole = torch.ones(size // 4, device=ranks.device)
        part = torch.ones(size // 4 // ranks.world_size, device=ranks.device)
        calls: dict[str, Callable] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
            "broadcast": lambda whole=whole: dist.broadcast(whole, 0),
            "reduce": lambda whole=whole: dist.reduce(whole, 0),
        }
        for kind, call in calls.items():
            seconds.setdefault(kind, {})[size] = _median(call, ranks.device.type == "cuda")
    if ranks.main:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
        print(json.dumps({"device": device, "seconds": seconds}), flush=True)
    teardown()
    return 0


def _median(call: Callable, cuda: bool) -> float:
    """Of the rounds after a warm-up, all ranks starting together."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(WARM_UP + ROUNDS):
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[WARM_UP:])[ROUNDS // 2]


if __name__ == "__main__":
    sys.exit(main())
