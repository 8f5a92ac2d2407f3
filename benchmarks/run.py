"""Compare providers of one operation: `python benchmarks/run.py CASE`.

Prints a table and, as the last line, one JSON object: {"case", "device", "rows": [{"shape", "mode", "provider", "ms",
"peak_bytes", "speedup", "memory_ratio", ...}], ...}; the last two against the baseline provider of the same shape and
mode. Exit status: 1 where a provider fails its check (it is not timed then), 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import cases
import torch
from harness.case import Case
from harness.command import OneLineParser
from harness.compare import compare
from harness.report import append_csv, device_name, json_line, print_table


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        device = _device(args.device)
        if args.list:
            return _list(device)
        if args.case is None:
            raise ValueError(f"name a case: {', '.join(cases.NAMES)}")
        case = cases.load(args.case)
        shapes = [case.shape(text) for text in args.shape or case.shapes]
        providers = _known("provider", args.provider, case.providers, case)
        modes = _known("mode", args.mode, case.modes, case)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    result = compare(case, shapes, providers, modes, device, args.repeats)
    name = device_name(device) + ("" if device.type == "cuda" else f", {torch.get_num_threads()} threads")
    print_table(result, name)
    for remark in case.remarks({(row.shape, row.mode, row.provider): row.ms for row in result.rows}):
        print(remark)
    if result.rows and not args.no_save:
        append_csv(result, device)
    sys.stdout.flush()
    for entry in result.refused:
        print(f"error: {entry['provider']} fails its check on {entry['shape']}: {entry['reason']}", file=sys.stderr)
    print(json_line(result, name))
    return 1 if result.refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", help=f"one of {', '.join(cases.NAMES)}")
    parser.add_argument("--list", action="store_true", help="list cases, shapes, modes and providers")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--shape", nargs="+", metavar="NxM", help="objects x candidates, NxM@SIDE for smaller logits")
    parser.add_argument("--provider", nargs="+", help="default: all; the baseline always runs")
    parser.add_argument("--mode", nargs="+", help="default: all of the case")
    parser.add_argument("--threads", type=_positive, help="threads of torch and of the C++ operators on a CPU")
    parser.add_argument("--repeats", type=_positive, help="rounds of each shape; default: as time allows")
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out, or install a CUDA build of torch")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _known(what: str, wanted: Sequence[str] | None, valid: Sequence[str], case: Case) -> list[str]:
    """The wanted names in the order of the case, or all of them."""
    unknown = [name for name in wanted or () if name not in valid]
    if unknown:
        raise ValueError(f"unknown {what} {unknown[0]!r} of case {case.name}; valid: {', '.join(valid)}")
    return [name for name in valid if not wanted or name in wanted]


def _list(device: torch.device) -> int:
    for name in cases.NAMES:
        case = cases.load(name)
        print(f"{case.name}: {case.about}")
        print(f"  shapes {' '.join(case.shapes)}; modes {' '.join(case.modes)}; baseline {case.baseline}")
        for provider, entry in case.providers.items():
            obstacle = entry.obstacle(device)
            print(f"  {provider}" + (f": not on this device: {obstacle}" if obstacle else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
