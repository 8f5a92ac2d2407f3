"""FLOPs, traffic, launches and peak memory of a training step at full size, computed without a GPU.

    python benchmarks/count_step.py --size base_plus --batch video              # the defaults
    python benchmarks/count_step.py --size base_plus --batch video --all-off    # no optimization, nothing recomputed
    python benchmarks/count_step.py --size tiny large --batch image --off fused_loss fused_norms --recompute none
    python benchmarks/count_step.py --size base_plus --batch video --graphs     # launches with model.cuda_graphs

runs forward pass, losses and backward pass of SAM 2 on fake CUDA tensors (bfloat16 autocast, dropout and drop path 0.1,
PyTorch's fused attention) and adds up what every operation costs, for each part of the model. Batches: `video`, 8
frames and 3 objects whose masks are given in the first frame; `points`, two of 8 frames clicked on and corrected 7
times; `image`, 64 objects, a click and 7 corrections. The last line is JSON. These are computed figures: none of them
is a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

from counting import fake_cuda


def main(argv: Sequence[str] | None = None) -> int:
    try:
        fake_cuda.load()
    except fake_cuda.FakeCudaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Only now, as they import torch; harness first, as it makes sam2fast importable.
    from harness.command import OneLineParser  # isort: skip
    from counting import graphs, report, steps

    from sam2fast.performance import RecomputePolicy

    parser = OneLineParser(prog="count_step.py", description=__doc__.splitlines()[0])
    _add_arguments(parser, steps.SWITCHES, steps.PLANS)
    args = parser.parse_args(argv)
    try:
        RecomputePolicy.parse(args.recompute or "none")
    except ValueError as error:
        parser.error(str(error))
    if args.save and args.bfloat16_streams:
        parser.error("--save keeps exact settings alone; leave out --bfloat16-streams")
    off = frozenset(steps.SWITCHES if args.all_off else args.off)
    recompute = args.recompute or ("none" if args.all_off else steps.Setup.recompute)
    rows = []
    for size in args.size:
        for batch in args.batch:
            setup = steps.Setup(size, batch, off, recompute, args.side, args.bfloat16_streams)
            if args.graphs:
                rows.append(report.print_graph(setup, graphs.count_host_launches(setup)))
                continue
            count = steps.count_step(setup)
            report.print_count(setup, count, args.top)
            rows.append(
                {**report.setting(setup), "side": setup.side, **report.figures(count)}
                | {"parts": report.part_figures(count)}
            )
    if args.save:
        (report.save_graphs if args.graphs else report.save)(rows)
    print(json.dumps({"case": "count_step", "computed": True, "rows": rows}))
    return 0


def _add_arguments(parser: argparse.ArgumentParser, switches: Sequence[str], batches: Iterable[str]) -> None:
    from sam2fast.models.architecture import SIZES

    parser.add_argument("--size", nargs="+", choices=SIZES, default=["base_plus"], metavar="SIZE", help=_names(SIZES))
    parser.add_argument("--batch", nargs="+", choices=tuple(batches), default=["video"], help="what is trained on")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--off", nargs="+", choices=switches, default=[], metavar="NAME", help=_names(switches))
    which.add_argument("--all-off", action="store_true", help="all of these, and --recompute none")
    parser.add_argument("--recompute", metavar="POLICY", help="default: that of model.recompute")
    parser.add_argument("--side", type=_side, default=1024, help="of the images, in pixels; a multiple of 32")
    parser.add_argument("--bfloat16-streams", action="store_true", help="with model.bfloat16_streams; not for --save")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also list the N largest operations")
    parser.add_argument("--graphs", action="store_true", help="count what the host launches with model.cuda_graphs")
    parser.add_argument("--save", action="store_true", help="write the totals to results/")


def _names(names: Sequence[str]) -> str:
    return f"one or more of {', '.join(names)}"


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
