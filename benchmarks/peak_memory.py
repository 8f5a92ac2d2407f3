"""Peak memory of one provider on the CPU, in a process of its own; harness/memory.py says how and why.

Prints one JSON line for each shape: {"shape", "peak_bytes": {mode: bytes}}. run.py starts it in the environment that
it needs.
"""

from __future__ import annotations

import argparse
import json
import sys

import cases
import torch
from harness.memory import ProcessMeter, peak_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=cases.NAMES)
    parser.add_argument("provider")
    parser.add_argument("--shape", nargs="+", required=True)
    parser.add_argument("--mode", nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = cases.load(args.case)
    meter = ProcessMeter()
    for shape in map(case.shape, args.shape):
        run = case.providers[args.provider].prepare()
        inputs = case.make_inputs(shape, torch.device("cpu"))
        peaks = peak_bytes(case, run, inputs, args.mode, meter)
        print(json.dumps({"shape": shape.text, "peak_bytes": peaks}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
