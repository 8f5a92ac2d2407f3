"""Step time, throughput, efficiency and memory on 1 to 256 GPUs, predicted: `python benchmarks/scaling/predict.py`.

    python benchmarks/scaling/predict.py                       # A100 nodes; needs traces of dry_run.py
    python benchmarks/scaling/predict.py --factor 1 --no-save  # kernels that reach the limits of the GPU
    python benchmarks/scaling/predict.py --check               # this machine: measured ranks beside their prediction

Traced collectives (dry_run.py) rescaled to each number of GPUs, compute (compute.py), a network (network.py) and the
variation between ranks (timeline.Stragglers) give the time of a step. Nothing of it is measured on more than one GPU.
--check uses the same code for the ranks that measure.py measured here: compute of one rank, and the collectives that
network_times.py timed, predict several ranks. The last line is one JSON object with all rows; they go to
results/scaling_predicted.csv, or with --check to results/scaling_checked.csv. `python benchmarks/scaling/plot.py` draws
both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.command import OneLineParser  # noqa: E402  (harness first: it makes both packages importable)

from sam2fast.models.architecture import SIZES  # noqa: E402
from scaling import command, compute, tables  # noqa: E402
from scaling.collectives import Collective  # noqa: E402
from scaling.network import A100, Line, Measured, sent  # noqa: E402
from scaling.timeline import Stragglers, step_time  # noqa: E402

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NODE = A100.gpus


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        rows = check() if args.check else predict(args.size, args.gpus, args.factor, args.jitter)
    except LookupError as error:
        parser.error(error.args[0])
    _print(rows, args.check)
    if not args.no_save:
        path, keys = (tables.CHECKED, ("engine", "ranks")) if args.check else (tables.PREDICTED, KEYS)
        tables.add_rows(path, rows, keys)
    print(json.dumps({"case": "scaling", "predicted": True, "rows": rows}))
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="predict.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["base_plus", "large"], help="of the model")
    counts = f"numbers of GPUs: 1 to {NODE}, or a multiple of {NODE}, which is whole nodes"
    parser.add_argument("--gpus", nargs="+", type=command.gpus, default=list(GPUS), help=counts)
    factor = "compute over its counted limit, above 0; default: as measured on an H100"
    parser.add_argument("--factor", type=command.factor, help=factor)
    jitter = "of compute between ranks, a share from 0 to below 1"
    parser.add_argument("--jitter", type=command.share, default=Stragglers.jitter, help=jitter)
    parser.add_argument("--check", action="store_true", help="predict what measure.py measured here")
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    return parser


KEYS = ("size", "engine", "gpus", "objects")
HIDDEN = ("factor", "ms_compute", "videos_per_s")
"""Columns of the file that the table on the screen leaves out."""


def predict(sizes: Sequence[str], gpus: Sequence[int], factor: float | None, jitter: float) -> list[dict[str, Any]]:
    """Weak scaling of a video step, 8 frames and at most 3 objects a GPU, on A100 nodes.

    `objects` of a row: `equal`, each GPU has 3, or `vary`, see compute.object_probabilities. `traced_ranks`: of the
    trace that it is rescaled from.

    Raises:
        LookupError: no engine was traced for a size, or its step was not counted.
    """
    measured = compute.measured_step()
    factor = measured["factor"] if factor is None else factor
    rows = []
    for size in dict.fromkeys(sizes):
        traces = [line for line in tables.read_traces() if line["size"] == size]
        if not traces:
            raise LookupError(f"no engine was traced for {size}: python benchmarks/scaling/dry_run.py --size {size}")
        times = compute.seconds_of_objects(size, compute.GPUS["A100"], factor)
        chances = compute.object_probabilities()
        mean = sum(chances[n] * times[n] for n in times)
        cases = {
            "equal": (times[3], 3.0, Stragglers(jitter=jitter)),
            "vary": (
                mean,
                sum(n * chances[n] for n in chances),
                Stragglers(tuple((chances[n], times[n] / mean) for n in times), jitter),
            ),
        }
        for engine in dict.fromkeys(line["engine"] for line in traces):
            for count in sorted(set(gpus)):
                line = nearest(traces, engine, count)
                traced = [on_gpu(one, engine) for one in line["collectives"]]
                found = [moved for one in traced if (moved := rescaled(one, line["world_size"], count))]
                for objects, (seconds, per_clip, stragglers) in cases.items():
                    setting = {"size": size, "engine": engine, "gpus": count, "objects": objects}
                    timed = step_time(found, A100, seconds, stragglers)
                    figures = _figures(timed, count, seconds, per_clip, found)
                    kept = {"memory_gb": memory(line, found, count) / 1e9, "factor": factor}
                    rows.append({**setting, **figures, **kept, "traced_ranks": line["world_size"]})
    return rows


def nearest(traces: Sequence[dict], engine: str, ranks: int) -> dict:
    """The trace of the fewest ranks that are no fewer than `ranks`, else of the most."""
    own = sorted((line for line in traces if line["engine"] == engine), key=lambda line: line["world_size"])
    if engine == "hybrid":  # on one node, its groups of a node and of all ranks look the same
        own = [line for line in own if line["world_size"] == ranks or line["world_size"] > NODE]
        if not own:
            raise LookupError(
                f"FSDP, hybrid on {ranks} ranks needs a trace of more than {NODE} ranks; make one with "
                "dry_run.py --engine hybrid --ranks 256"
            )
    return next((line for line in own if line["world_size"] >= ranks), own[-1])


def on_gpu(one: Collective, engine: str) -> Collective:
    """A collective that was traced on a CPU as it is on a GPU: there `fully_shard` has streams of its own for weights
    and gradients, but not for the norm."""
    streamed = engine in ("fsdp", "hybrid") and one.phase != "update" and one.size > 8
    return replace(one, overlapped=True) if streamed else one


def rescaled(one: Collective, traced: int, ranks: int) -> Collective | None:
    """A collective of a step on `traced` ranks as it is on `ranks`, nothing where it has a rank alone.

    Groups are all ranks, those of a node, or the ranks with the same place in their nodes. All else stays as it was
    traced: how many collectives there are, their places in the step, and their buffers with their padding.
    """
    if traced == ranks:
        return one
    if one.ranks == traced:
        group, stride = ranks, 1
    elif one.stride == 1:
        group, stride = min(NODE, ranks), 1
    else:
        group, stride = ranks // NODE, NODE
    return replace(one, ranks=group, stride=stride) if group > 1 else None


def memory(line: dict, collectives: Sequence[Collective], ranks: int) -> float:
    """Bytes that a GPU needs: activations at their peak with all gradients (counted), what the engine keeps, and the
    largest buffer that it communicates. States that are sharded are taken to shrink as the ranks do."""
    counted = next(
        row
        for row in tables.read(tables.RESULTS / "step_counts.csv")
        if (row["size"], row["batch"], row["off"], row["recompute"]) == (line["size"], "video", "none", "none")
    )
    whole = 12 * line["parameters"]
    inputs = int(counted["state_bytes"]) - whole
    groups = [min(NODE, n) if line["engine"] == "hybrid" else n for n in (line["world_size"], ranks)]
    kept = kept_bytes(line["state_bytes"], whole, *groups)
    return int(counted["peak_bytes"]) + inputs + kept + max((one.size for one in collectives), default=0)


def kept_bytes(traced_bytes: int, whole: int, traced: int, ranks: int) -> float:
    """States on `ranks`, where they are `traced_bytes` on `traced` of which a share is divided among ranks."""
    divided = max(0.0, (whole - traced_bytes) / (1 - 1 / traced)) if traced > 1 else 0.0
    return whole - divided + divided / ranks


def _figures(timed, count: int, seconds: float, per_clip: float, found: Sequence[Collective]) -> dict[str, float]:
    return {
        "ms": 1e3 * timed.total,
        "ms_compute": 1e3 * timed.compute,
        "ms_waiting": 1e3 * timed.waiting,
        "ms_communication": 1e3 * timed.communication,
        "ms_hidden": 1e3 * timed.hidden,
        "sent_gb": sum(sent(one.kind, one.size, one.ranks) for one in found) / 1e9,
        "videos_per_s": count / timed.total,
        "frame_objects_per_s": count * compute.FRAMES * per_clip / timed.total,
        "efficiency": seconds / timed.total,
    }


def check() -> list[dict[str, Any]]:
    """What measure.py measured on CPU ranks beside its prediction: weak scaling, from one rank of the same engine.

    The compute of a step is the measured step of one rank, which has its loading and logging in it; ranks vary as that
    one does from step to step; collectives are those traced for the same model, at the speed that network_times.py
    measured.

    Raises:
        LookupError: something has to be measured or traced first.
    """
    lines = {row["kind"]: Line(float(row["latency_us"]) / 1e6, float(row["gb_per_s"]) * 1e9) for row in _network()}
    measured = [row for row in tables.read(tables.MEASURED) if row["mode"] == "weak" and row["cores"]]
    names = [name for name in tables.MEASURED_KEYS if name != "ranks"]
    alone = {tuple(row[name] for name in names): row for row in measured if row["ranks"] == "1"}
    rows = []
    for row in measured:
        one, ranks = alone.get(tuple(row[name] for name in names)), int(row["ranks"])
        if one is None or ranks == 1:
            continue
        traces = [line for line in tables.read_traces() if line["size"] == row["size"]]
        if not any(line["engine"] == row["engine"] for line in traces):
            raise LookupError(
                f"{row['engine']} was not traced: dry_run.py --size {row['size']} --engine {row['engine']}"
            )
        line = nearest(traces, row["engine"], ranks)
        found = [moved for each in line["collectives"] if (moved := rescaled(each, line["world_size"], ranks))]
        timed = step_time(found, Measured(lines), float(one["ms"]) / 1e3, Stragglers(jitter=float(one["jitter"])))
        rows.append(
            {
                "engine": row["engine"],
                "ranks": ranks,
                "ms_one_rank": float(one["ms"]),
                "ms_waiting": 1e3 * timed.waiting,
                "ms_communication": 1e3 * timed.communication,
                "ms_predicted": 1e3 * timed.total,
                "ms_measured": float(row["ms"]),
                "error": 1e3 * timed.total / float(row["ms"]) - 1,
            }
        )
    if not rows:
        raise LookupError("nothing to check: measure one and several CPU ranks first (measure.py --ranks 1 2)")
    return rows


def _network() -> list[dict[str, str]]:
    rows = tables.read(tables.NETWORK)
    if not rows:
        raise LookupError("the network of this machine was not measured: python benchmarks/scaling/network_times.py")
    return rows


def _print(rows: Sequence[dict[str, Any]], check: bool) -> None:
    from rich.table import Table

    table = Table(title="predicted beside measured" if check else "predicted, not measured", title_justify="left")
    for name in (name for name in rows[0] if name not in HIDDEN):
        title = name.removesuffix("_per_s").replace("_", " ") + ("/s" if name.endswith("_per_s") else "")
        table.add_column(title, justify="right" if isinstance(rows[0][name], (int, float)) else "left")
    for row in rows:
        shown = [value for name, value in row.items() if name not in HIDDEN]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown))
    tables.console().print(table)


if __name__ == "__main__":
    sys.exit(main())
