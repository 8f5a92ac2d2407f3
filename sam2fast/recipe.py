"""A recipe is a list of stages: each starts from the weights of the one before it, and the run leaves an official
checkpoint.

The run folder:

    config.yaml       the resolved configuration
    checkpoints/      the state of the stage being trained, the last `checkpoint.keep` of them
    stages/           weights at the end of each stage (official layout), with `optim.ema` also their averages
    export/           model.pt (official layout), encoder.pt, decoder.pt, memory.pt, and model_ema.pt with `optim.ema`
    bad_data.jsonl    videos and images that could not be used, if there are any
    log.jsonl, tensorboard/, curves/, overlays/
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sam2fast_kernels import library

from .checkpoint import CheckpointStore
from .checkpoint_files import saving, write_folder
from .checkpoint_header import save_state
from .config import Config, ConfigError, DatasetConfig, MixItem, ModelConfig, StageConfig
from .data.bad_records import BadRecords
from .data.dali import DaliDecoder, build_decoder, choose_backend
from .data.formats import open_dataset
from .data.index import object_counts
from .data.sample import Dataset
from .data.sampling import ClipDataset
from .data.workers import start_fork_server
from .evaluation.guards import Guard
from .evaluation.validate import check_sets, image_scores, validate, video_scores
from .memory_plan import choose_recompute
from .models.architecture import Architecture, architecture
from .models.official import load_checkpoint, save_checkpoint, split_checkpoint
from .models.sam2 import SAM2
from .optim import build_groups, freeze
from .parallel import HERE, Engine, Ranks, Watchdog, build_engine, check_engine
from .parallel.cuda_graphs import check_config
from .parallel.engine import autocast, set_tf32
from .performance import RECOMPUTE_LADDER, RecomputePolicy, automatic_budget
from .run_folder import RunFolder
from .run_state import EntryState, RunState
from .stopping import EXIT_STOPPED, Stopped, StopRequest
from .telemetry.bad_data import BadDataLog
from .telemetry.gpu import GpuStats
from .telemetry.meters import Meters
from .telemetry.progress import Progress
from .telemetry.report import summarize, write_curves
from .telemetry.run_log import RunLog
from .trainer import StageTrainer, Telemetry


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    config: Config
    ranks: Ranks
    folder: RunFolder
    store: CheckpointStore
    datasets: dict[str, Dataset]
    telemetry: Telemetry
    bad_records: BadRecords
    decoder: DaliDecoder | None
    stop: StopRequest


def run(config: Config, ranks: Ranks) -> Path:
    """Train every stage that is not done yet; returns the run folder. Called on every rank.

    `output_dir` must be the same folder for all ranks, also on several machines.

    Raises:
        Stopped: by a signal; the same call goes on.
        LostRankError: another rank has ended or does not come.
    """
    set_tf32(config.tf32, ranks.device)
    stop = StopRequest(ranks, config.engine.timeout_minutes)
    watchdog = Watchdog(ranks, config.engine, stop.orphaned, planned=Stopped)
    with stop.listening(), watchdog.watching():
        return _run(config, ranks, stop)


def _run(config: Config, ranks: Ranks, stop: StopRequest) -> Path:
    HERE.go("opening the data")
    decoder = _decoder(config, ranks)  # first: a back end that is not there is said before anything starts
    folder = RunFolder(Path(config.output_dir))
    store = CheckpointStore(config, ranks)
    # Rank 0 decides where to go on: a shared file system may show others an older state.
    state, checkpoint = ranks.broadcast(
        ranks.agree(lambda: folder.find_state(store) if ranks.main else None, slow="finding the last checkpoint")
    )
    ranks.agree(lambda: _check_settings(config, ranks, config.stages[state.stage :]))
    ranks.agree(lambda: folder.claim(config, resuming=state.global_step > 0) if ranks.main else None)
    if config.data.workers:
        start_fork_server()  # now, for it takes as long as building the model
    datasets = _open_datasets(config.data.datasets, config.seed, ranks)
    ranks.agree(lambda: check_sets(config.validation, datasets))
    bad_records = BadRecords({name: len(dataset) for name, dataset in datasets.items()}, config.data.max_bad_share)
    total = sum(stage.steps for stage in config.stages)
    log = RunLog(folder.path, enabled=ranks.main, resume_step=state.global_step)
    progress = Progress(total, state.global_step, enabled=ranks.main)
    if state.stage == len(config.stages):
        progress.message(f"the run in {folder.path} is finished; set another output_dir to train again")
    elif state.global_step:
        progress.message(f"continuing at step {state.global_step} of {total} in {folder.path}")
    bad_data = BadDataLog(folder.path, first=ranks.main, resuming=state.global_step > 0)
    telemetry = Telemetry(Meters(), log, bad_data, progress, GpuStats(ranks.device), progress.message)
    try:
        shared = _Run(config, ranks, folder, store, datasets, telemetry, bad_records, decoder, stop)
        while state.stage < len(config.stages):
            HERE.go("building the model", config.stages[state.stage].name, state.global_step)
            if signal := stop.now({"stage": config.stages[state.stage].name, "step": state.global_step + 1}):
                raise Stopped(
                    f"{signal}: stopped at step {state.global_step}, before anything was trained that is not saved; "
                    f"the same command continues (exit code {EXIT_STOPPED})"
                )
            _train_stage(shared, state, checkpoint)
            checkpoint = None
    finally:
        store.close()
        progress.close()
        log.close()
    HERE.go("writing the export", step=state.global_step)
    ranks.agree(lambda: _finish(config, folder) if ranks.main else None)
    return folder.path


def _check_settings(config: Config, ranks: Ranks, stages: Sequence[StageConfig]) -> None:
    """Refuse, before data is opened and anything is written, what the stages still to come could not do with this
    model, these ranks and this device."""
    if not stages:
        return
    check_engine(config, ranks, stages)
    with torch.device("meta"):
        model = SAM2(_architecture(config.model))
    for stage in stages:
        freeze(model, stage.freeze)
    if config.model.cuda_graphs:
        check_config(config, config.model.recompute, ranks.device)
    if config.model.compile and (obstacle := library.compile_obstacle(ranks.device)):
        raise ConfigError(f"model.compile {obstacle}, or set model.compile=false")


def _decoder(config: Config, ranks: Ranks) -> DaliDecoder | None:
    """What renders frames, the same on all ranks: pixels differ a little between back ends."""
    choices = ranks.gather(ranks.agree(lambda: choose_backend(config.data.backend, ranks.device)))
    backend = choices[0] if len(set(choices)) == 1 else "opencv"
    if backend != choices[ranks.rank]:
        print(
            f"warning: data.backend=auto takes opencv on all ranks, because rank {choices.index('opencv')} has no DALI"
        )
    return build_decoder(backend, config.data, ranks.device)


def _open_datasets(entries: Mapping[str, DatasetConfig], seed: int, ranks: Ranks) -> dict[str, Dataset]:
    """The first rank of each machine opens them first: the index of tar files that it leaves spares the others the scan
    of their headers, which may take long."""

    def opened() -> dict[str, Dataset]:
        return {name: open_dataset(entry, name, seed) for name, entry in entries.items()}

    first = ranks.agree(lambda: None if ranks.local_rank else opened(), slow="reading what datasets hold")
    return ranks.agree(lambda: first or opened(), slow="reading what datasets hold")


def _architecture(settings: ModelConfig) -> Architecture:
    return architecture(
        settings.size,
        settings.version,
        settings.image_size,
        drop_path=settings.drop_path,
        memory_dropout=settings.memory_dropout,
        multimask_tracking=settings.multimask_tracking,
    )


def _choose_recompute(run: _Run, stage: StageConfig) -> str | None:
    """The policy of a stage where it is chosen automatically. One for all ranks, or sharded training would deadlock."""
    config, ranks = run.config, run.ranks
    budget = automatic_budget(config.model.recompute)
    if budget is None:
        return None
    policy, line = choose_recompute(config, stage, _architecture(config.model), ranks.device, budget)
    run.telemetry.progress.message(line)
    return max(ranks.gather(policy), key=RECOMPUTE_LADDER.index)


def build_model(config: Config, weights: str | Path | None = None) -> SAM2:
    """The model of a run with weights from an official checkpoint, or seeded random ones."""
    torch.manual_seed(config.seed)
    settings = config.model
    automatic = automatic_budget(settings.recompute) is not None
    model = SAM2(
        _architecture(settings),
        recompute="none" if automatic else settings.recompute,
        performance=settings.performance,
        offload_activations=settings.offload_activations,
        bfloat16_streams=settings.bfloat16_streams,
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
    names = {entry.dataset for entry in config.validation.sets}
    entries = {name: entry for name, entry in config.data.datasets.items() if name in names}
    datasets = _open_datasets(entries, config.seed, ranks)
    model = build_model(config, checkpoint).to(ranks.device).eval()
    with torch.no_grad(), autocast(config.precision, ranks.device):
        return validate(model, config.validation, datasets, ranks, Path(config.output_dir) / "evaluation")


def _train_stage(run: _Run, state: RunState, checkpoint: Path | None) -> None:
    """Train stage `state.stage` to its end and leave its weights in the run folder."""
    config, ranks = run.config, run.ranks
    stage = config.stages[state.stage]
    before = run.folder.stage(config, state.stage - 1) / "model.pt" if state.stage else config.model.checkpoint
    model = build_model(config, before).to(ranks.device).train()
    if policy := _choose_recompute(run, stage):
        model.recompute = RecomputePolicy.parse(policy)
    if config.model.cuda_graphs:
        check_config(config, policy or config.model.recompute, ranks.device)
        model.fix_sizes()
    if config.model.compile:
        model.compile_regions()
    freeze(model, stage.freeze)
    groups = build_groups(model, stage.optim)
    engine = build_engine(config.engine, stage.optim, ranks, model, groups, config.precision, stage.accumulate,
                          rebuild=lambda: build_model(config))  # fmt: skip
    try:
        if checkpoint is not None:
            run.store.load(engine, checkpoint)
        entries = ranks.agree(lambda: state.match_entries(stage, ranks.world_size))
        clips = [_clips(run, state, item, entry) for item, entry in zip(stage.data, entries, strict=True)]
        validation = _Validation(run, state, engine)
        run.telemetry.progress.message(
            f"stage {stage.name}: {stage.steps} steps, {config.precision}, {ranks.world_size} x {ranks.device.type}, "
            f"{engine.layout['engine']} engine; the first numbers come after {config.log_every} steps"
        )
        trainer = StageTrainer(config, state, engine, entries, clips, ranks, run.store, run.telemetry, validation,
                               run.bad_records, run.stop, run.decoder)  # fmt: skip
        trainer.train()
        if state.stopped and state.step < stage.steps:
            run.telemetry.warn(f"stage {stage.name} ends early at step {state.global_step}: {state.stopped}")
        HERE.go("saving the weights of the stage")
        weights = {"model.pt": engine.full_state_dict()}
        if stage.optim.ema is not None:
            weights["ema.pt"] = engine.averaged_state_dict()
    finally:
        engine.close()
    folder = run.folder.stage(config, state.stage)
    validation.end_stage()
    state.stage, state.step, state.stopped = state.stage + 1, 0, ""
    state.entries = []

    def write(path: Path) -> None:
        for name, values in weights.items():
            save_checkpoint(values, path / name)
        save_state(path, state)

    def save() -> None:
        with saving(f"the weights of stage {stage.name}", folder):
            write_folder(folder, write)

    ranks.agree(lambda: save() if ranks.main else None)


def _clips(run: _Run, state: RunState, item: MixItem, entry: EntryState) -> ClipDataset:
    """Samples of a dataset of the stage."""
    config, ranks = run.config, run.ranks
    stage, group = config.stages[state.stage], entry.group
    dataset, counts = run.datasets[item.dataset], None
    records, names = len(dataset), dataset.names_digest()
    if entry.names and (entry.records, entry.names) != (records, names):
        run.telemetry.warn(
            f"warning: dataset {item.dataset!r} has changed since this run last used it: {entry.records:,} videos or "
            f"images then (digest of their names {entry.names}), {records:,} now ({names}): the order of samples is "
            "another one, so this epoch repeats some and leaves out others"
        )
    entry.records, entry.names = records, names
    if item.balance and group > 1:
        settings, report = config.data.datasets[item.dataset], run.telemetry.progress.message
        counts = ranks.broadcast(
            ranks.agree(
                lambda: object_counts(dataset, settings, item, config.seed, report) if ranks.main else None,
                slow="counting objects",
            )
        )
    seed = [config.seed, state.stage, entry.stream]
    size = config.model.image_size
    return ranks.agree(
        lambda: ClipDataset(dataset, item, stage.augment, size, seed, group, counts),
        slow="listing the clips of a dataset",
    )


class _Validation:
    """Scores the model of a stage and asks the guards whether the stage should end."""

    def __init__(self, run: _Run, state: RunState, engine: Engine) -> None:
        self.run, self.state, self.engine = run, state, engine
        self.guard = Guard(run.config.validation.patience, run.config.validation.forgetting)
        if state.guards:
            self.guard.load_state_dict(state.guards)

    def __call__(self) -> dict[str, float]:
        config, state = self.run.config, self.state
        overlays = self.run.folder.path / "overlays" / f"step_{state.global_step:08d}"
        with self.engine.evaluation() as module:
            scores = validate(module, config.validation, self.run.datasets, self.run.ranks, overlays)
        # Where no step trains on clips, video scores are not what the stage is about.
        trains_video = any(item.frames > 1 for item in config.stages[state.stage].data)
        video = video_scores(scores, config.validation) if trains_video else {}
        state.stopped = self.guard.update(video, image_scores(scores, config.validation)) or ""
        state.guards = self.guard.state_dict()
        return scores

    def end_stage(self) -> None:
        self.guard.restart_patience()
        self.state.guards = self.guard.state_dict()


def _finish(config: Config, folder: RunFolder) -> None:
    """Export the final weights, draw the curves and print the summary."""
    from rich.console import Console

    last = folder.stage(config, len(config.stages) - 1)
    export = folder.path / "export"

    def write(path: Path) -> None:
        shutil.copyfile(last / "model.pt", path / "model.pt")
        split_checkpoint(last / "model.pt", path)
        if (last / "ema.pt").is_file():
            shutil.copyfile(last / "ema.pt", path / "model_ema.pt")

    with saving("the final weights", export):
        write_folder(export, write)
    write_curves(folder.path)
    Console().print(summarize(folder.path))
