"""Collectives of a training step on many ranks, without a GPU and without the ranks.

    python benchmarks/scaling/dry_run.py --size base_plus large --ranks 256
    python benchmarks/scaling/dry_run.py --size micro --engine zero3 --ranks 2 16 --frames 2

runs the real model, losses and engine of one rank on fake tensors and a process group that talks to nobody
(program.py), and lists which collectives the step starts: kind, group, dtype, number, bytes of their buffers and what a
rank sends, beside the volume that the sharding needs at least. Traces are added to results/scaling_traces.jsonl, which
`predict.py` reads, and their totals to results/scaling_collectives.csv, unless --no-save is given. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.command import OneLineParser  # noqa: E402  (harness first: it makes both packages importable)

from sam2fast.models.architecture import SIZES  # noqa: E402
from scaling import program, tables  # noqa: E402
from scaling.collectives import totals  # noqa: E402
from scaling.command import failure, gpus, positive  # noqa: E402
from scaling.engines import SETTINGS  # noqa: E402
from scaling.network import sent  # noqa: E402

LEAST = {
    "torch": (("all_reduce", 4),),
    "zero0": (("all_reduce", 4),),
    "zero1": (("reduce_scatter", 4), ("all_gather", 4)),
    "zero2": (("reduce_scatter", 4), ("all_gather", 4)),
    "zero3": (("all_gather", 4), ("all_gather", 4), ("reduce_scatter", 4)),
    "fsdp": (("all_gather", 4), ("all_gather", 4), ("reduce_scatter", 4)),
    "hybrid": (("all_gather", 4), ("all_gather", 4), ("reduce_scatter", 4)),
}
"""What a sharding has to move, in bytes a parameter: gradients are averaged in float32; updated weights or, with
sharded ones, those of the forward and of the backward pass are gathered in float32, as the engines keep them."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="dry_run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["base_plus"], help="of the model")
    parser.add_argument("--engine", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--ranks", nargs="+", type=gpus, default=[256], help="numbers of ranks, 8 on a node")
    parser.add_argument("--frames", type=positive, default=2, help="of the clip")
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    args = parser.parse_args(argv)
    if min(args.ranks) < 2:
        parser.error("--ranks must be 2 or more: one rank communicates with nobody")
    if args.frames < 2:
        parser.error("--frames must be 2 or more, not 1: the masks of the first frame are given, so it has no loss")
    wanted = [(size, engine, ranks) for size in args.size for engine in args.engine for ranks in args.ranks]
    options = ["--frames", str(args.frames), *(["--no-save"] if args.no_save else [])]
    if len(wanted) > 1:
        rows = [row for one in wanted for row in _in_own_process(*one, options, parser)]
    else:
        rows = _trace(*wanted[0], args.frames, not args.no_save)
    tables.print_collectives(rows)
    print(json.dumps({"case": "dry_run", "computed": True, "rows": rows}))
    return 0


def _in_own_process(size: str, engine: str, ranks: int, options: list[str], parser: OneLineParser) -> list[dict]:
    """DeepSpeed keeps process groups, so that a process can trace it once."""
    chosen = ["--size", size, "--engine", engine, "--ranks", str(ranks)]
    done = subprocess.run([sys.executable, __file__, *chosen, *options], capture_output=True, text=True)
    if done.returncode:
        parser.error(f"{engine}, {size}, {ranks} ranks cannot be traced: {failure(done.stderr)}")
    print(next(line for line in done.stdout.splitlines() if "traced in" in line), flush=True)
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def _trace(size: str, engine: str, ranks: int, frames: int, save: bool) -> list[dict]:
    began = time.monotonic()
    # Neither the side of the images nor the number of objects changes what is communicated.
    traced = program.trace(engine, size, ranks, frames=frames, side=64, objects=1)
    rows = rows_of(traced, frames)
    print(f"{engine}, {size}, {ranks} ranks: traced in {time.monotonic() - began:.0f} s", flush=True)
    if save:
        tables.save_trace(traced, frames)
        tables.add_rows(tables.COLLECTIVES, rows, tables.COLLECTIVE_KEYS)
    return rows


def least_sent(engine: str, parameters: int, ranks: int) -> float:
    """Bytes that a rank must send in a step with this sharding.

    Hybrid sharding gathers and scatters in a node, and averages one shard of the gradients over the nodes.
    """
    group = min(program.GPUS_OF_NODE, ranks) if engine == "hybrid" else ranks
    volume = sum(sent(kind, each * parameters, group) for kind, each in LEAST[engine])
    return volume + (sent("all_reduce", 4 * parameters // group, ranks // group) if engine == "hybrid" else 0.0)


def rows_of(traced: program.Trace, frames: int) -> list[dict]:
    """Totals of a trace, a row for each kind of collective, and one of all beside the least volume."""
    setting = {"engine": traced.engine, "size": traced.size, "world_size": traced.world_size, "frames": frames}
    rows = [{**setting, **row, "least": "", "ratio": ""} for row in totals(traced.collectives)]
    total = sum(row["sent"] for row in rows)
    least = least_sent(traced.engine, traced.parameters, traced.world_size)
    last = {"phase": "all", "kind": "all", "dtype": "", "ranks": "", "stride": "", "overlapped": ""}
    numbers = {"count": sum(row["count"] for row in rows), "bytes": sum(row["bytes"] for row in rows)}
    return [*rows, {**setting, **last, **numbers, "sent": total, "least": least, "ratio": total / least}]


if __name__ == "__main__":
    sys.exit(main())
