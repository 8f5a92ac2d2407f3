"""The `sam2fast` command."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

ROOT = Path(__file__).resolve().parent.parent
REQUEUE_FILE = "SAM2FAST_REQUEUE_FILE"
"""Environment variable: a run that a signal stops makes the file that it names, and ends with 0 in place of 75. For
launchers that make 1 of every exit code and start ranks again that end with one; see configs/cluster/."""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (2 for a user's mistake, 75 for a run that a signal stopped)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "synthesize":
        from .data.synthetic import main as synthesize

        return synthesize(rest)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (overrides and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    overrides = [*getattr(args, "overrides", ()), *overrides]
    if args.command == "train":
        return train(args.config, overrides)
    if args.command == "evaluate":
        return evaluate(args.config, args.checkpoint, overrides)
    if args.command == "export":
        return export(args)
    if args.command == "check-data":
        return check_data(args)
    if args.command == "augmentations":
        return augmentations(args, overrides)
    return quickstart(Path(args.folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sam2fast", description="Train and evaluate SAM 2.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "train", help="train in this process (use deepspeed or torchrun on sam2fast/train.py for several)"
    )
    sub.add_argument("--config", required=True)
    _add_overrides(sub)
    sub = commands.add_parser("evaluate", help="score a checkpoint on the validation sets of a config")
    sub.add_argument("--config", required=True)
    sub.add_argument("--checkpoint", required=True, help="official SAM 2 checkpoint, for example RUN/export/model.pt")
    _add_overrides(sub)
    _add_export(commands.add_parser("export", help="write weights in a layout that other programs read"))
    _add_check_data(commands.add_parser("check-data", help="say what a dataset holds and everything wrong with it"))
    _add_augmentations(commands.add_parser("augmentations", help="draw samples before and after each augmentation"))
    commands.add_parser("synthesize", help="write a synthetic dataset", add_help=False)
    sub = commands.add_parser(
        "quickstart", help="synthetic data, three stages, validation and export in minutes on a CPU"
    )
    sub.add_argument("--folder", default="runs", help="where data and the run go")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH",
                        help="official SAM 2 checkpoint, or a folder RUN/checkpoints/step_XXXXXXXX")  # fmt: skip
    parser.add_argument("--layout", choices=("official", "huggingface"), default="official",
                        help="default %(default)s: model.pt, encoder.pt, decoder.pt, memory.pt")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument(
        "--raw", action="store_true", help="of a checkpoint with averages (optim.ema) the weights themselves"
    )
    parser.add_argument("--image-size", type=int, metavar="N",
                        help="input side that the Hugging Face configuration names; default: that of the run whose "
                        "checkpoint it is, else 1024")  # fmt: skip
    parser.add_argument("--multimask-tracking", action=argparse.BooleanOptionalAction, default=None,
                        help="whether that configuration lets frames after a click be tracked with the best of three "
                        "masks (model.multimask_tracking); default: as the run did, else yes")  # fmt: skip


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder of the dataset")
    parser.add_argument("--format", default="auto", choices=("auto", "video_folder", "sav", "sa1b", "coco"))
    parser.add_argument("--annotations", help="folder or COCO json of the annotations, where they lie elsewhere")
    parser.add_argument("--limit", type=int, metavar="N", help="check a random sample of N videos or images")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for report and sheet (runs/check-data/NAME)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; all cores if not given")


def _add_augmentations(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="take the dataset and the augmentations of a stage of this config")
    source.add_argument("--data", help="take this dataset, and all augmentations there are")
    parser.add_argument("--stage", help="name of the stage of the config; default: the first")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--clips", type=int, default=3, help="clips side by side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    _add_overrides(parser)


def augmentations(args: argparse.Namespace, overrides: list[str]) -> int:
    """Draw the sheet of augmentations; returns the exit code."""

    def body() -> None:
        from .config import ConfigError, DatasetConfig, MixItem, nearest
        from .config_file import load_config
        from .data import sheet
        from .data.drawing import write_png
        from .data.formats import open_dataset

        if args.clips < 1:
            raise ConfigError(f"--clips must be at least 1, not {args.clips}")
        if args.seed < 0:
            raise ConfigError(f"--seed must be at least 0, not {args.seed}")
        if Path(args.out).suffix.lower() != ".png":
            raise ConfigError(f"--out must be the name of a .png file, not {args.out!r}")
        if args.data is not None:
            if overrides or args.stage:
                raise ConfigError("key=value and --stage change a config; give --config in place of --data")
            dataset = open_dataset(DatasetConfig(root=args.data), "data", args.seed)
            longest = max(len(dataset[index].annotated) for index in range(min(args.clips, len(dataset))))
            item, augment = MixItem(dataset="data", frames=min(8, longest), reverse=0.5), sheet.EVERYTHING
            size = 1024
        else:
            config = load_config(args.config, overrides)
            stages = {stage.name: stage for stage in config.stages}
            name = args.stage or config.stages[0].name
            if name not in stages:
                raise ConfigError(f"--stage: the config has no stage {name!r}{nearest(name, stages)}")
            item, augment = stages[name].data[0], stages[name].augment
            dataset = open_dataset(config.data.datasets[item.dataset], item.dataset, config.seed)
            size = config.model.image_size
        write_png(args.out, sheet.draw_sheet(dataset, item, augment, size, args.seed, args.clips))
        print(f"wrote {args.out}: rows are augmentations, columns the frames of {min(args.clips, len(dataset))} clips")

    return _guarded(body)


def train(config_path: str, overrides: list[str], local_rank: int | None = None) -> int:
    """Train the run that a config describes; returns the exit code."""

    def body() -> None:
        from .config_file import load_config
        from .parallel import setup
        from .recipe import run

        config = load_config(config_path, overrides)
        run(config, setup(config.device, config.engine.timeout_minutes, local_rank, _facts(config)))

    return _guarded(body)


def evaluate(config_path: str, checkpoint: str, overrides: list[str]) -> int:
    """Print the validation scores of a checkpoint; returns the exit code."""

    def body() -> None:
        from .config_file import load_config
        from .parallel import setup
        from .recipe import evaluate_checkpoint

        config = load_config(config_path, overrides)
        ranks = setup(config.device, config.engine.timeout_minutes, facts=_facts(config))
        for name, value in evaluate_checkpoint(config, checkpoint, ranks).items():
            if ranks.main:
                print(f"{name:32} {value:.4g}")

    return _guarded(body)


def export(args: argparse.Namespace) -> int:
    """Write weights in another layout; returns the exit code."""

    def body() -> None:
        from .export import export

        what = export(args.checkpoint, args.layout, args.out, args.image_size, args.multimask_tracking, args.raw)
        print(f"wrote {what} to {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")

    return _guarded(body)


def check_data(args: argparse.Namespace) -> int:
    """Check a dataset; returns the exit code, 1 where it has defects."""

    def body() -> int:
        from .config import ConfigError
        from .data.check import check_data, dataset_config

        for name in ("limit", "workers"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
        config = dataset_config(args.path, args.format, args.annotations)
        return check_data(config, args.out, args.limit, args.workers or os.cpu_count() or 1)

    return _guarded(body)


def quickstart(folder: Path) -> int:
    """Write the synthetic data and train configs/quickstart.yaml on it through the deepspeed launcher."""
    import torch

    from .data.synthetic import main as synthesize
    from .parallel.mesh import free_port

    config = ROOT / "configs" / "quickstart.yaml"
    if not config.is_file():
        print(f"error: {config} not found; run quickstart from a checkout of sam2fast", file=sys.stderr)
        return 2
    data = folder / "quickstart_data"
    for name, layout, count, seed in QUICKSTART_DATA:
        print(f"writing synthetic data: {data / name}", flush=True)
        code = synthesize(["--root", str(data / name), "--format", layout, "--count", str(count), "--seed", str(seed)])
        if code:
            return code
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), str(ROOT / "sam2fast" / "train.py"), "--config", str(config), f"data.root={data}"]
    command.append(f"output_dir={folder / 'quickstart'}")
    environment = {**os.environ, "PATH": f"{launcher.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if not torch.cuda.is_available():
        # One thread a rank: the operations of a micro model are too small to share.
        command[1:1] = ["--num_accelerators", str(min(2, os.cpu_count() or 1)), "--master_port", str(free_port())]
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    print("$ " + " ".join(command), flush=True)
    return subprocess.call(command, env=environment)


QUICKSTART_DATA = (("images", "sa1b", 300, 1), ("videos", "sav", 60, 2), ("held_out", "video_folder", 8, 3))
"""Folder, format, number of images or clips, and seed."""


def _guarded(body: Callable[[], int | None]) -> int:
    """Run `body` for its exit code; a user's mistake is one line on stderr and exit code 2, never a traceback."""
    from .config import UserError
    from .parallel import LostRankError, teardown
    from .stopping import EXIT_STOPPED, Stopped

    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    prefix = "" if alone else f"[rank {os.environ.get('RANK', 0)}] "

    def say(text: str) -> None:
        print(f"{prefix}{text}", file=sys.stderr, flush=True)

    try:
        code = body() or 0
    except UserError as error:
        say(f"error: {error}")
        code = 2
    except Stopped as stopped:
        code = EXIT_STOPPED
        if requeue := os.environ.get(REQUEUE_FILE):
            code = 0
        if int(os.environ.get("RANK", 0)) == 0:
            print(stopped, flush=True)
            if requeue:
                Path(requeue).touch()
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        say(
            f"error: cannot write {error.filename or 'to output_dir'}: {error.strerror}; free space there, or raise "
            "the quota; the same command continues from the last checkpoint"
        )
        code = 2
    except KeyboardInterrupt:
        say("interrupted; the same command continues from the last checkpoint")
        code = 130
    except LostRankError as error:
        say(str(error))
        code = 1
    except (RuntimeError, MemoryError) as error:
        code = _of_runtime(error, say)
    if code in (0, EXIT_STOPPED) or alone:
        teardown()
        return code
    # Other ranks may still be in a collective: leaving the process group in order could wait for them forever, and so
    # could the end of the interpreter.
    sys.stdout.flush()
    os._exit(code)


def _of_runtime(error: RuntimeError | MemoryError, say: Callable[[str], None]) -> int:
    """The exit code of an error outside of training steps, which say more themselves; raises what it does not know."""
    from .out_of_memory import first_line
    from .parallel.engine import is_out_of_memory
    from .parallel.watchdog import is_lost_peer

    if is_out_of_memory(error):
        say(
            f"error: out of memory outside of a training step ({first_line(error)}); a smaller model.size or "
            "model.image_size, or less data.workers and data.prefetch on the host, needs less"
        )
        return 2
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not is_lost_peer(error):
        raise error
    say("ends because another rank did; see its message")
    return 1


def _facts(config: Config) -> dict[str, object]:
    """What must be equal on all ranks: settings and the versions of what computes."""
    from .config_file import flatten
    from .versions import versions

    facts: dict[str, object] = {f"version of {name}": found or "not installed" for name, found in versions().items()}
    return facts | flatten(config.model_dump(mode="json"))


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
"""What a disk that is full or gone says of small files, such as the log."""


if __name__ == "__main__":
    sys.exit(main())
