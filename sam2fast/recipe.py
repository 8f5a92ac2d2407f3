"""A recipe is a list of stages: each starts from the weights of the one before it, and the run leaves an official
checkpoint.

The run folder:

    config.yaml       the resolved configuration
    checkpoints/      the state of the stage being trained, the last `checkpoint.keep` of them
    stages/           weights at the end of each stage (official layout)
    export/           model.pt (official layout) and encoder.pt, decoder.pt, memory.pt
    log.jsonl, tensorboard/, curves/, overlays/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from .checkpoint import CheckpointStore, ResumeError, RunState
from .config import Config, ConfigError
from .config_file import flatten, load_config, save_config
from .data.formats import open_dataset
from .data.sample import Dataset
from .data.sampling import ClipDataset
from .evaluation.guards import Guard
from .evaluation.validate import image_scores, validate, video_scores
from .models.architecture import architecture
from .models.official import load_checkpoint, save_checkpoint, split_checkpoint
from .models.sam2 import SAM2
from .optim import build_groups, freeze
from .parallel import Ranks, build_engine
from .parallel.engine import autocast
from .telemetry.gpu import GpuStats
from .telemetry.meters import Meters
from .telemetry.progress import Progress
from .telemetry.report import summarize, write_curves
from .telemetry.run_log import RunLog
from .trainer import StageTrainer, Telemetry


def run(config: Config, ranks: Ranks) -> Path:
    """Train every stage that is not done yet; returns the run folder. Called on every rank."""
    run_dir = Path(config.output_dir)
    store = CheckpointStore(run_dir, config.checkpoint.keep, ranks)
    state, checkpoint = _find_state(run_dir, store)
    if ranks.main:
        _claim(config, run_dir, resuming=state.global_step > 0)
    ranks.barrier()
    datasets = {name: open_dataset(entry, name, config.seed) for name, entry in config.data.datasets.items()}
    total = sum(stage.steps for stage in config.stages)
    log = RunLog(run_dir, enabled=ranks.main, resume_step=state.global_step)
    progress = Progress(total, state.global_step, enabled=ranks.main)
    if state.stage == len(config.stages):
        progress.message(f"the run in {run_dir} is finished; set another output_dir to train again")
    elif state.global_step:
        progress.message(f"continuing at step {state.global_step} of {total} in {run_dir}")
    telemetry = Telemetry(Meters(), log, progress, GpuStats(ranks.device), progress.message)
    try:
        while state.stage < len(config.stages):
            _train_stage(config, state, checkpoint, datasets, ranks, store, telemetry)
            checkpoint = None
    finally:
        progress.close()
        log.close()
    if ranks.main:
        _finish(config, run_dir)
    ranks.barrier()
    return run_dir


def build_model(config: Config, weights: str | Path | None = None) -> SAM2:
    """The model of a run with weights from an official checkpoint, or seeded random ones."""
    torch.manual_seed(config.seed)
    settings = config.model
    model = SAM2(
        architecture(
            settings.size,
            settings.version,
            settings.image_size,
            drop_path=settings.drop_path,
            memory_dropout=settings.memory_dropout,
            multimask_tracking=settings.multimask_tracking,
        )
    )
    if settings.local_memory_init:
        model.memory_attention.attend_locally()
    if weights:
        load_checkpoint(model, weights)
    return model


def evaluate_checkpoint(config: Config, checkpoint: str | Path, ranks: Ranks) -> dict[str, float]:
    """Scores of a checkpoint on the validation sets of `config`, see `evaluation.validate`; overlays go to
    `output_dir`."""
    if not config.validation.sets:
        raise ConfigError("the config has no validation.sets to evaluate on")
    datasets = {
        entry.dataset: open_dataset(config.data.datasets[entry.dataset], entry.dataset, config.seed)
        for entry in config.validation.sets
    }
    model = build_model(config, checkpoint).to(ranks.device).eval()
    with torch.no_grad(), autocast(config.precision, ranks.device):
        return validate(model, config.validation, datasets, ranks, Path(config.output_dir) / "evaluation")


def _train_stage(
    config: Config,
    state: RunState,
    checkpoint: Path | None,
    datasets: dict[str, Dataset],
    ranks: Ranks,
    store: CheckpointStore,
    telemetry: Telemetry,
) -> None:
    run_dir = Path(config.output_dir)
    stage = config.stages[state.stage]
    before = _stage_folder(run_dir, config, state.stage - 1) / "model.pt" if state.stage else config.model.checkpoint
    model = build_model(config, before).to(ranks.device).train()
    freeze(model, stage.freeze)
    groups = build_groups(model, stage.optim)
    engine = build_engine(
        config.engine,
        stage.optim,
        ranks,
        model,
        groups,
        config.precision,
        stage.accumulate,
        rebuild=lambda: build_model(config),
    )
    try:
        if checkpoint is not None:
            store.load(engine, checkpoint)
        clips = [
            ClipDataset(
                datasets[item.dataset], item, stage.augment, config.model.image_size, [config.seed, state.stage, index]
            )
            for index, item in enumerate(stage.data)
        ]
        guard = Guard(config.validation.patience, config.validation.forgetting)
        if state.guards:
            guard.load_state_dict(state.guards)

        def run_validation() -> dict[str, float]:
            with engine.evaluation() as module:
                scores = validate(
                    module, config.validation, datasets, ranks, run_dir / "overlays" / f"step_{state.global_step:08d}"
                )
            # Where no step trains on clips, video scores are not what the stage is about.
            trains_video = any(item.frames > 1 for item in stage.data)
            reason = guard.update(
                video_scores(scores, config.validation) if trains_video else {}, image_scores(scores, config.validation)
            )
            state.guards, state.stopped = guard.state_dict(), reason or ""
            return scores

        StageTrainer(config, state, engine, clips, ranks, store, telemetry, run_validation).train()
        if state.stopped and state.step < stage.steps:
            telemetry.warn(f"stage {stage.name} ends early at step {state.global_step}: {state.stopped}")
        guard.restart_patience()
        state.guards = guard.state_dict()
        weights = engine.full_state_dict()
    finally:
        engine.close()
    state.stage, state.step, state.stopped = state.stage + 1, 0, ""
    if ranks.main:
        _write_folder(
            _stage_folder(run_dir, config, state.stage - 1),
            lambda folder: (
                save_checkpoint(weights, folder / "model.pt"),
                (folder / "state.json").write_text(json.dumps(asdict(state), indent=1)),
            ),
        )
    ranks.barrier()


def _find_state(run_dir: Path, store: CheckpointStore) -> tuple[RunState, Path | None]:
    """Where to go on: after the last finished stage, or inside a stage from its newest checkpoint."""
    ended = sorted((run_dir / "stages").glob("[0-9]*/state.json"))
    state = RunState(**json.loads(ended[-1].read_text())) if ended else RunState()
    latest = store.latest()
    if latest and latest[1].global_step > state.global_step:
        return latest[1], latest[0]
    return state, None


def _claim(config: Config, run_dir: Path, resuming: bool) -> None:
    """Make the run folder this run's own; a folder with another run in it is refused rather than overwritten."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create output_dir {run_dir}: {error.strerror}; set output_dir to a folder that can be written"
        ) from None
    path = run_dir / "config.yaml"
    if resuming and not config.checkpoint.resume:
        raise ConfigError(
            f"{run_dir} holds a run and checkpoint.resume is false; set another output_dir or delete the folder"
        )
    if resuming and path.is_file():
        old, new = flatten(load_config(path).model_dump(mode="json")), flatten(config.model_dump(mode="json"))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        fatal = [key for key in changed if key in FIXED_KEYS or (key.startswith("stages.") and key.endswith(".name"))]
        if fatal:
            changes = ", ".join(f"{key} from {old.get(key)!r} to {new.get(key)!r}" for key in fatal)
            raise ResumeError(
                f"the run in {run_dir} cannot continue with {changes}; undo the change or set another output_dir"
            )
        if changed:
            print(f"warning: continuing with changed settings: {', '.join(changed)}")
    save_config(config, path)


FIXED_KEYS = ("model.size", "model.version", "model.image_size", "seed")
"""Settings that a run keeps for its whole life."""


def _stage_folder(run_dir: Path, config: Config, index: int) -> Path:
    return run_dir / "stages" / f"{index + 1}_{config.stages[index].name}"


def _write_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name and rename it when it is whole."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _finish(config: Config, run_dir: Path) -> None:
    """Export the final weights, draw the curves and print the summary."""
    from rich.console import Console

    weights = _stage_folder(run_dir, config, len(config.stages) - 1) / "model.pt"
    _write_folder(
        run_dir / "export",
        lambda folder: (shutil.copyfile(weights, folder / "model.pt"), split_checkpoint(weights, folder)),
    )
    write_curves(run_dir)
    Console().print(summarize(run_dir))
