"""The command: reads a dataset in worker processes, prints what it found and leaves it in a folder."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...config import DatasetConfig
from ..defects import collecting
from ..files import list_files
from ..formats import open_dataset, resolve
from ..formats.selection import counted
from ..in_flight import InFlight
from ..sample import DataError, Dataset
from ..workers import is_of_dead_worker, start_fork_server, start_loader
from .item import Inspector, ItemReport
from .sheet import COLUMNS, ROWS, write_sheet
from .summary import Summary, defect_lines
from .usage import config_lines, unusable

_SEED = 0
_LINE_INTERVAL = 30.0
_MOST_EXCLUDED = 20
_ARGUMENTS = {"its `root`": "PATH", "`root`": "PATH", "`format`": "--format", "`annotations`": "--annotations"}
"""What the command line calls settings of a dataset."""
CLEAN, DEFECTS, INTERRUPTED = 0, 1, 130
"""Exit codes; a path that is no dataset is a `DataError`, for which commands end with 2."""


def dataset_config(root: str, format: str = "auto", annotations: str | None = None) -> DatasetConfig:
    """The configuration of a dataset as it lies on disk: its format, absolute paths, and of SA-V all annotations.

    Raises:
        DataError: no such folder, or of no known format.
    """
    if not root.strip():
        raise DataError("PATH is empty; give the folder of a dataset, for example: sam2fast check-data data/mine")
    with _own_words():
        config = resolve(DatasetConfig(root=root, format=format, annotations=annotations), Path(root).name)
    changes = {"root": str(Path(config.root).resolve())}
    if config.annotations:
        changes["annotations"] = str(Path(config.annotations).resolve())
    if config.format == "sav":
        folder = Path(config.annotations or config.root)
        kinds = [kind for kind in ("manual", "auto") if next(iter(list_files(folder, (f"_{kind}.json",))), None)]
        changes["sav_annotations"] = kinds[0] if len(kinds) == 1 else "both"
    return config.model_copy(update=changes)


@contextmanager
def _own_words() -> Iterator[None]:
    """Remedies of readers name settings of a configuration; here they are arguments."""
    try:
        yield
    except DataError as error:
        what, separator, remedy = str(error).partition("; ")
        for setting, argument in _ARGUMENTS.items():
            remedy = remedy.replace(setting, argument)
        raise DataError(what + separator + remedy) from None


def check_data(config: DatasetConfig, out: Path | None = None, limit: int | None = None, workers: int = 1) -> int:
    """Check a dataset (`dataset_config`): every frame is decoded and every mask read, and nothing stops at a defect.

    Prints counts, defects and configuration lines, and writes report.json, report.txt, config.yaml and sheet.png.

    Args:
        out: folder of these files; runs/check-data/NAME if not given.
        limit: most videos or images to check, a random sample that is the same each time.
        workers: processes; 1 checks in this one.

    Returns:
        0 without defects (there may be warnings), 1 with or where a process died, 130 when interrupted.

    Raises:
        DataError: the dataset cannot be opened at all.
    """
    name = re.sub(r"[^\w.-]+", "_", Path(config.root).name) or "data"
    out = out or Path("runs", "check-data", name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write the folder {out}: {error.strerror}; choose another --out") from None
    with collecting() as notes, _own_words():
        notes.kind = "files that cannot be read"
        dataset = open_dataset(config, name, _SEED)
    summary = Summary(config, total=len(dataset), defects=notes.defects)
    order = np.random.default_rng(_SEED).permutation(len(dataset))[:limit]
    candidates = dict.fromkeys(order[: 2 * ROWS * COLUMNS].tolist(), False)  # for the sheet: which of them are sound
    stopped, code, in_flight = "", CLEAN, InFlight(workers)
    try:
        for report in _reports(dataset, np.sort(order), workers, summary, in_flight):
            summary.add(report)
            if report.index in candidates:
                candidates[report.index] = report.is_sound and any(report.objects)
    except KeyboardInterrupt:
        stopped, code = f"interrupted: what was found in {summary.checked:,} of {len(order):,}", INTERRUPTED
    except (RuntimeError, OSError, EOFError) as error:
        if not is_of_dead_worker(error, in_flight):
            raise
        code = DEFECTS
        reason = (str(error) or type(error).__name__).splitlines()[0]
        stopped = (
            f"a checking process died ({reason}): what was found in {summary.checked:,} of "
            f"{len(order):,}; memory may have run out: use fewer --workers, with 1 the cause shows itself"
        )
    sheet = "" if stopped else _sheet(dataset, [index for index, sound in candidates.items() if sound], summary, out)
    _tell(summary, name, out, sheet, stopped, sampled=len(order) < len(dataset))
    return code or (DEFECTS if summary.errors else CLEAN)


def _reports(
    dataset: Dataset, indices: np.ndarray, workers: int, summary: Summary, in_flight: InFlight
) -> Iterator[ItemReport]:
    """Check items, where there are several workers a few ahead. In order: a worker that died is then missed soon."""
    options = {}
    workers = min(workers, len(indices))
    if workers > 1:
        start_fork_server()
        options = {
            "num_workers": workers,
            "multiprocessing_context": "forkserver",
            "worker_init_fn": partial(start_loader, in_flight),
            "prefetch_factor": 4,
        }
    reports = torch.utils.data.DataLoader(Inspector(dataset), batch_size=None, sampler=indices, **options)
    console = Console(stderr=True)
    broken = TextColumn("{task.fields[broken]} with errors")
    said = time.monotonic()
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        broken,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(indices), broken=0)
        for report in reports:
            yield report
            progress.update(task, advance=1, broken=summary.checked - summary.sound)
            if not console.is_terminal and time.monotonic() - said > _LINE_INTERVAL:
                said = time.monotonic()
                print(f"checked {summary.checked:,} of {len(indices):,}", file=sys.stderr, flush=True)


def _sheet(dataset: Dataset, indices: list[int], summary: Summary, out: Path) -> str:
    if not indices:
        return ""
    path = out / "sheet.png"
    with collecting():  # the items are sound, but their warnings have been given
        write_sheet(dataset, indices, summary.is_video, path)
    return str(path)


def _tell(summary: Summary, name: str, out: Path, sheet: str, stopped: str, sampled: bool) -> None:
    """Print, and write report.json, report.txt and config.yaml."""
    config = summary.config
    summary.defects.sort(key=lambda defect: defect.item)
    head = [stopped] if stopped else []
    head.append(f"{config.root}: format {config.format}")
    if sampled:
        head.append(f"a random sample of {summary.checked:,} of {summary.total:,} {summary.noun} (seed {_SEED})")
    head += summary.lines()
    usage, excluded = config_lines(summary, name), len(unusable(summary))
    _write(out / "report.json", json.dumps(summary.as_json(), indent=1, ensure_ascii=False))
    _write(out / "report.txt", "\n".join([*head, *defect_lines(summary, whole=True), ""]))
    _write(out / "config.yaml", usage)
    shown = [*head, "", *(defect_lines(summary) or ["no defects" + " so far" * bool(stopped)]), ""]
    if sheet:
        shown.append(f"{sheet}: look at it, are these your objects?")
    errors = len(summary.errors)
    found = f"{counted(errors, 'error')} and {counted(len(summary.defects) - errors, 'warning')}"
    shown.append(f"{out / 'report.txt'} and report.json: all of this, {found}")
    if not usage:
        shown.append("nothing to train on: no video or image is without errors")
    elif excluded > _MOST_EXCLUDED:
        shown.append(f"{out / 'config.yaml'} trains on it, without {excluded:,} {summary.noun} that cannot be used")
    else:
        shown += [f"{out / 'config.yaml'} trains on it:", "", usage]
    print("\n".join(shown), flush=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
