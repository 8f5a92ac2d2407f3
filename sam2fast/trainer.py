"""The loop of one stage. Steps, but DeepSpeed's, do not wait for the device: numbers are read once a log interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointStore
from .config import Config, StageConfig, UserError
from .data.bad_records import BadRecord, BadRecords
from .data.dali import DaliDecoder
from .data.loaders import build_loader
from .data.sample import Batch, PackedBatch
from .data.sampling import ClipDataset
from .data.transfer import Transfer
from .losses import SegmentationLoss
from .models.plan import RolloutPlan
from .optim import learning_rate
from .out_of_memory import explained
from .parallel import HERE, CudaCapture, Engine, GraphedSteps, Ranks, StepResult
from .run_state import EntryState, RunState
from .step_plan import StepPlan, StepPlanner
from .stopping import EXIT_STOPPED, Stopped, StopRequest
from .telemetry.bad_data import BadDataLog
from .telemetry.meters import IntervalClock, Meters
from .telemetry.progress import Progress
from .telemetry.run_log import RunLog

SCALE_HALVINGS = 24
"""Steps in a row that float16 may lose to a loss scale that is still too high; it starts at 2^16."""


class TrainingError(UserError):
    """Training cannot go on; the message says why and what to change."""


@dataclass
class StepRecord:
    """What is kept of a step until the next log interval reads it."""

    step: int
    skipped: Tensor
    terms: dict[str, Tensor]
    sample_ids: list[str]


@dataclass
class Telemetry:
    """Where numbers go."""

    meters: Meters
    log: RunLog
    bad_data: BadDataLog
    progress: Progress
    gpu: Callable[[], dict[str, float]]
    warn: Callable[[str], None]
    records: list[StepRecord] = field(default_factory=list)


class StageTrainer:
    """Trains one stage from `state.step` to its end, saving, validating and logging on the way.

    Args:
        entries: of the items of the stage's `data`, as `state.match_entries` gives them.
        datasets: of the same items.
        decoder: see `loaders.build_loader`.
    """

    def __init__(
        self,
        config: Config,
        state: RunState,
        engine: Engine,
        entries: list[EntryState],
        datasets: list[ClipDataset],
        ranks: Ranks,
        store: CheckpointStore,
        telemetry: Telemetry,
        validate: Callable[[], dict[str, float]],
        bad_records: BadRecords,
        stop: StopRequest,
        decoder: DaliDecoder | None = None,
    ) -> None:
        self.config, self.state, self.engine, self.ranks = config, state, engine, ranks
        self.stage: StageConfig = config.stages[state.stage]
        self.store, self.telemetry, self.validate = store, telemetry, validate
        self.loss = SegmentationLoss(self.stage.loss)
        self.planner = StepPlanner(self.stage, config.seed, state.stage)
        self.plan = self.planner.plan(state.step)  # of the step that comes next, or that is being done
        self.entries, self.datasets = entries, datasets
        self.bad_records, self.stop, self.decoder = bad_records, stop, decoder
        self.unshared: list[BadRecord] = []
        self.loaders: dict[int, Iterator[PackedBatch]] = {}
        self.transfer = Transfer(ranks.device)
        self.graphs: GraphedSteps | None = None
        if config.model.cuda_graphs:
            self.graphs = GraphedSteps(engine, self._terms_of_inputs, CudaCapture(), engine.module.constant_tables)

    def train(self) -> None:
        """Run the stage.

        Raises:
            TrainingError: too many steps in a row had a loss or gradient that is not finite.
            DivergenceError: ranks would go on differently.
            OutOfMemory: a step needs more memory than there is.
            Stopped: a signal asked for it; a checkpoint is saved.
        """
        state = self.state
        started = time.monotonic() - state.seconds
        clock = IntervalClock()
        try:
            if state.validation_due:
                state.validation_due = False
                if self._validate():
                    self._save()
            self.stop.now(self._facts(self.plan))  # a signal, if any, is acted on after the first step
            while state.step < self.stage.steps and not state.stopped:
                self._next_step(clock)
                state.seconds = time.monotonic() - started
                signal = self.stop.end()
                if self.stop.save_failed:
                    self.store.wait()  # raises
                self._after_step(clock, signal)
            self.store.wait()
        finally:
            for loader in self.loaders.values():
                loader.close()
            self.graphs = None  # in a cycle with this object, it would keep its memory while the next stage is built
            self._list_records()

    def _next_step(self, clock: IntervalClock) -> None:
        state = self.state
        HERE.go("loading data", self.stage.name, state.global_step)
        with clock.loading():
            batches = self._next_batches()
        self._list_records()
        following, item = self.planner.plan(state.step + 1), self.plan.item
        self.stop.begin(self._facts(following), self.store.failed)
        with explained(self.config, state, self.plan, batches, self.engine.module, self.ranks.device):
            self._step(batches)
        clock.count(self._samples(item))
        self.entries[item].taken += self._samples(item)
        self.plan = following
        state.step += 1
        state.global_step += 1

    def _after_step(self, clock: IntervalClock, signal: str) -> None:
        """Log, validate and save where it is time to, and end with what `signal` asks for, if any does."""
        state, config = self.state, self.config
        ended = state.step == self.stage.steps
        saving = not ended and state.global_step % config.checkpoint.every == 0
        every = config.validation.every
        validating = bool(config.validation.sets) and (ended or (every > 0 and state.global_step % every == 0))
        # Before all that may save: a checkpoint counts the bad steps so far, and means of a resumed run cover the same.
        if ended or saving or validating or signal or state.global_step % config.log_every == 0:
            self._check_finite()
            self._check_records()
            self._log(clock.values())
        if validating and signal:
            state.validation_due = True  # it may take longer than there is time
        elif validating:
            saving |= self._validate()
            clock.restart()
            signal = self.stop.now(self._facts(self.plan))
        if saving or signal:
            path = self._save()
        if signal:
            self.store.wait()
            raise Stopped(
                f"{signal}: stopped after step {state.global_step}, which is saved in {path}; the same command "
                f"continues (exit code {EXIT_STOPPED})"
            )

    def _facts(self, plan: StepPlan | None) -> dict[str, Any]:
        """What all ranks must agree on before they go on."""
        stopped = self.state.stopped
        return plan.facts() if plan and not stopped else {"stage": self.stage.name, "end": stopped or "all steps done"}

    def _save(self) -> Path:
        HERE.go("saving a checkpoint", step=self.state.global_step)
        return self.store.save(self.engine, self.state)

    def _samples(self, item: int) -> int:
        return self.stage.samples_of_step(item, self.ranks.world_size)

    def _next_batches(self) -> list[PackedBatch]:
        """The micro-batches of this step, all before the first forward: their objects are counted for the
        normalization."""
        item = self.plan.item
        if item not in self.loaders:
            self.loaders[item] = build_loader(
                self.datasets[item],
                self.stage.data[item].batch_size,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                start=self.entries[item].taken,
                workers=self.config.data.workers,
                accumulate=self.stage.accumulate,
                prefetch=self.config.data.prefetch,
                pin_memory=self.ranks.device.type == "cuda",
                bad_records=self.bad_records,
                decoder=self.decoder,
            )
        return [next(self.loaders[item]) for _ in range(self.stage.accumulate)]

    def _step(self, batches: list[PackedBatch]) -> None:
        state, device = self.state, self.ranks.device
        HERE.go("forward and backward")
        self.transfer.start(batches[0])  # at once: the device may still be busy with the step before
        plan = self.plan.rollout
        assert batches[0].num_frames == plan.num_frames, (batches[0].num_frames, plan)
        count = float(sum(batch.num_objects for batch in batches))
        objects = self.ranks.sum(torch.full((), count, device=device))  # a fill: a copy from the host would wait
        normalizer = (objects / self.ranks.world_size).clamp(min=1)
        totals: dict[str, Tensor] = {}
        for micro, following in enumerate([*batches[1:], None]):
            self._seed(micro)
            batch = self.transfer.take()
            if following is not None:
                self.transfer.start(following)
            terms = self._micro_step(batch, plan, normalizer, boundary=following is None)
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
            del batch  # or it would live through the next forward
        HERE.go("the optimizer's step")
        result = self.engine.step(learning_rate(self.stage.optim, state.step, self.stage.steps))
        self._record(result, totals, batches)

    def _micro_step(self, batch: Batch, plan: RolloutPlan, normalizer: Tensor, boundary: bool) -> dict[str, Tensor]:
        """Loss terms of a batch, whose gradients are added to those of this step."""
        if self.graphs is not None:
            inputs = {"frames": batch.frames, "masks": batch.masks, "object_to_clip": batch.object_to_clip}
            if plan.clicks:
                flags = torch.tensor(plan.click_from_gt)
                inputs["on_object"] = flags.pin_memory() if self.ranks.device.type == "cuda" else flags
            return self.graphs.run(plan.kind, inputs | {"normalizer": normalizer}, boundary)
        terms = self._terms(batch, plan, normalizer)
        self.engine.backward(terms["total"], boundary)
        return {name: value.detach() for name, value in terms.items()}

    def _terms(self, batch: Batch, plan: RolloutPlan, normalizer: Tensor) -> dict[str, Tensor]:
        output = self.engine.forward(batch, plan)
        return self.loss([frame.steps for frame in output.frames], batch.masks, normalizer)

    def _terms_of_inputs(self, kind: RolloutPlan, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = Batch(inputs["frames"], inputs["masks"], inputs["object_to_clip"], [])
        return self._terms(batch, replace(kind, on_object=inputs.get("on_object")), inputs["normalizer"])

    def _seed(self, micro: int) -> None:
        """Randomness of content (dropout, clicks) is a function of seed, step and rank, so a resumed run repeats it."""
        key = np.random.SeedSequence([self.config.seed, self.state.stage, self.state.step, micro, self.ranks.rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def _record(self, result: StepResult, terms: dict[str, Tensor], batches: list[PackedBatch]) -> None:
        ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        self.telemetry.records.append(StepRecord(self.state.global_step, result.skipped, terms, ids))
        self.telemetry.meters.update({**terms, "grad_norm": result.grad_norm})

    def _check_finite(self) -> None:
        """Read the flags of the steps since the last call; a skipped step is reported with what it was made of."""
        records, self.telemetry.records = self.telemetry.records, []
        if not records:
            return
        for record, skipped in zip(records, torch.stack([record.skipped for record in records]).tolist(), strict=True):
            if skipped:
                self._report_skipped(record)
            else:
                self.state.bad_streak = 0

    def _list_records(self) -> None:
        new = self.bad_records.take_new()
        self.telemetry.bad_data.write(new)
        self.unshared += new

    def _check_records(self) -> None:
        """Share what ranks have met since the last call: every rank counts all."""
        bad_records = self.bad_records
        before, new, self.unshared = len(bad_records), self.unshared, []
        if not self.ranks.sum(torch.full((), len(new), device=self.ranks.device)).item():
            return
        found = [record for records in self.ranks.gather(new) for record in records]
        if before == len(new):
            self.telemetry.warn(
                f"warning: {found[0].name!r} of dataset {found[0].dataset!r} cannot be used and is replaced by another "
                f"({found[0].reason}); all that this happens to are listed in {self.telemetry.bad_data.path}"
            )
        self.ranks.agree(lambda: bad_records.add(found))
        bad_records.take_new()  # of the other ranks

    def _report_skipped(self, record: StepRecord) -> None:
        """Every rank comes here: the flag is that of the reduced gradient."""
        state = self.state
        terms = {name: value.item() for name, value in record.terms.items()}
        finite = all(math.isfinite(value) for value in terms.values())
        listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        text = f"{listed}; samples {', '.join(record.sample_ids)}"
        found = self.ranks.gather((finite, text))
        state.bad_streak += 1
        limit = self.config.max_bad_steps
        if self.config.precision == "float16" and all(rank_finite for rank_finite, _ in found):
            limit += SCALE_HALVINGS  # an overflow while the loss scale finds its place
            if state.bad_streak < limit:
                return
        state.bad_steps += 1
        # Where only the gradient is not finite, every rank's samples may be the cause.
        causes = [text for rank_finite, text in found if not rank_finite] or [text for _, text in found]
        what = f"step {record.step}: loss or gradient not finite, update skipped ({' | '.join(causes)})"
        self.telemetry.warn(what)
        if state.bad_streak >= limit and not self.ranks.main:
            raise SystemExit(2)  # rank 0 says why
        if state.bad_streak >= limit:
            raise TrainingError(
                f"{state.bad_streak} steps in a row had a loss or gradient that is not finite, the last {what}; lower "
                f"stages.{state.stage}.optim.lr, use precision=bfloat16 or float32, or look at these samples"
            )

    def _log(self, perf: dict[str, float]) -> None:
        state = self.state
        means = self.telemetry.meters.compute(self.ranks.sum)
        self.telemetry.meters.reset()
        scale = learning_rate(self.stage.optim, state.step - 1, self.stage.steps)
        optim = self.stage.optim
        values = {TAGS.get(name, f"train/{name}"): value for name, value in means.items()}
        values |= {
            "lr/base": optim.lr * scale,
            "lr/encoder": (optim.encoder_lr or optim.lr) * scale,
            **perf,
            **({"perf/replayed": self.graphs.replayed_share()} if self.graphs else {}),
            **self.telemetry.gpu(),
        }
        values["train/bad_steps"] = float(state.bad_steps)
        values["data/bad_records"] = float(len(self.bad_records))
        self.telemetry.log.scalars(state.global_step, values, stage=self.stage.name)
        self.telemetry.progress.update(state.global_step, self.stage.name, values)

    def _validate(self) -> bool:
        """Score the model; whether the score of `checkpoint.best` is the best so far."""
        HERE.go("validation", step=self.state.global_step)
        values = self.validate()
        self.telemetry.log.scalars(self.state.global_step, values, stage=self.stage.name)
        scores = [f"{tag} {value:.2f}" for tag, value in values.items()]
        self.telemetry.progress.message("  ".join([f"validation at step {self.state.global_step}:", *scores]))
        tag, best = self.config.checkpoint.best, self.state.best
        if tag is None:
            return False
        value, known = values[f"val/{tag}"], best.get("value") if best.get("tag") == tag else None
        if not math.isfinite(value) or (known is not None and value <= known):
            return False
        self.state.best = {"tag": tag, "value": value, "step": self.state.global_step}
        self.telemetry.progress.message(f"best {tag} so far: the checkpoint of step {self.state.global_step} is kept")
        return True


TAGS = {
    "total": "train/loss",
    "mask": "train/mask_loss",
    "focal": "train/focal_loss",
    "dice": "train/dice_loss",
    "iou": "train/iou_loss",
    "temporal": "train/temporal_loss",
    "object_score": "train/object_score_loss",
    "grad_norm": "train/grad_norm",
}
"""Loss terms to TensorBoard tags."""
