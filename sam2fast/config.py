"""The settings of a run: typed, frozen and validated. `config_file.load_config` reads them from YAML.

Every field has a default except where a run cannot start without it. An unknown key, a wrong type or an impossible
value is one `ConfigError` that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .config_data import AugmentConfig, DataConfig, DatasetConfig, MixItem, OcclusionConfig  # noqa: F401 (for others)
from .config_section import Name, NonNegative, Positive, Probability, Section
from .performance import PerformanceConfig, RecomputePolicy, automatic_budget


class UserError(ValueError):
    """A mistake of the user's or in their files. Commands print the message alone: what, the value seen and the
    remedy."""


class ConfigError(UserError):
    """A configuration that cannot be used."""


class ModelConfig(Section):
    """What is trained. Sizes T, S, B+ and L are the official ones; `micro` has a trunk of 0.3 M parameters, for CPU
    runs."""

    size: Literal["micro", "tiny", "small", "base_plus", "large"] = "tiny"
    version: Literal["2.0", "2.1"] = "2.1"
    image_size: Positive = 1024
    """Side of the square input in pixels; a multiple of 32."""
    checkpoint: str | None = None
    """Official SAM 2 / 2.1 checkpoint to start from; empty starts from random weights."""
    drop_path: Probability = 0.1
    memory_dropout: Probability = 0.1
    multimask_tracking: bool = True
    """Tracked frames predict three candidate masks, as official; false predicts one, which a model trained from random
    weights learns sooner (the official code then needs multimask_output_for_tracking=false)."""
    local_memory_init: bool = False
    """Random weights whose memory attention looks at the same place of other frames from the start (off: as
    official)."""
    recompute: str = "many_masks"
    """Activations that the backward pass computes again instead of keeping them: none, or parts joined by + of
    many_masks (the decoder where batch_size x max_objects is at least 8), decoder, trunk, memory, and selective, which
    keeps what matrix products and attention computed. auto takes the least that fits into free memory, auto:40 into 40
    GiB. The same numbers for more arithmetic."""
    offload_activations: bool = False
    """What the trunk keeps for the backward pass waits in pinned memory of the host. Costs transfers."""
    bfloat16_streams: bool = False
    """With precision bfloat16, the residual streams of trunk, memory attention and mask decoder are rounded to bfloat16
    after every block, instead of float32: an eighth less memory and less traffic. Not exact, so off; the official
    trainer keeps float32."""
    compile: bool = False
    """torch.compile for blocks of the trunk, layers of memory attention and the memory encoder. The first steps take
    minutes longer; stochastic depth then masks samples instead of leaving them out."""
    cuda_graphs: bool = False
    """Kinds of steps that come again are recorded as CUDA graphs and replayed, one launch instead of thousands. Needs a
    GPU, the torch engine and about twice the memory for activations; stochastic depth masks samples here too."""
    performance: PerformanceConfig = PerformanceConfig()

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, float) else value  # YAML reads 2.0 as a number

    @field_validator("recompute")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        if automatic_budget(value) is None:
            RecomputePolicy.parse(value)
        return value

    @field_validator("image_size")
    @classmethod
    def _multiple_of_32(cls, value: int) -> int:
        if value % 32:
            raise ValueError(f"must be a multiple of 32; nearest: {max(32, round(value / 32) * 32)}")
        return value

    @model_validator(mode="after")
    def _initialized_once(self) -> ModelConfig:
        if self.local_memory_init and self.checkpoint:
            raise ValueError(
                "local_memory_init is for random weights and cannot be used with checkpoint; remove one of them"
            )
        return self


class PromptMix(Section):
    """Probability of each first prompt; they sum to 1."""

    mask: Probability = 0.5
    click: Probability = 0.25
    box: Probability = 0.25

    @model_validator(mode="after")
    def _sums_to_one(self) -> PromptMix:
        total = self.mask + self.click + self.box
        if abs(total - 1) > 1e-6:
            raise ValueError(f"mask + click + box must be 1, not {total:g}")
        return self


class PromptConfig(Section):
    """The simulated user of training; the defaults are those of the official MOSE fine-tuning config."""

    video: PromptMix = PromptMix()
    image: PromptMix = PromptMix(mask=0.0, click=0.5, box=0.5)
    """Images: a mask prompt is a coarse mask given to the prompt encoder (a mask taken as output would teach
    nothing)."""
    init_frames: Positive = 2
    """Most frames of a clip prompted at the start (the first always is)."""
    random_init_frames: bool = True
    corrected_frames: Annotated[int, Field(ge=0)] = 2
    random_corrected_frames: bool = True
    corrected_as_conditioning: bool = True
    correction_clicks: Annotated[int, Field(ge=0)] = 7
    click_from_ground_truth: Probability = 0.1
    first_click: Literal["uniform", "center"] = "uniform"
    box_noise: NonNegative = 0.1
    box_noise_bound: NonNegative = 20.0
    """Largest shift of a box corner in pixels."""


class LossConfig(Section):
    """Weights and forms; the defaults are the official ones."""

    focal: NonNegative = 20.0
    dice: NonNegative = 1.0
    iou: NonNegative = 1.0
    object_score: NonNegative = 1.0
    temporal: NonNegative = 0.0
    motion_compensated: bool = False
    focal_alpha: Annotated[float, Field(ge=-1, le=1)] = 0.25
    """-1 turns the class balance off."""
    focal_gamma: NonNegative = 2.0
    iou_l1: bool = True
    supervise_all_iou: bool = True
    object_score_gamma: NonNegative = 0.0
    object_score_alpha: Annotated[float, Field(ge=-1, le=1)] = -1.0
    fused: bool = True
    """Focal, dice and IoU by the fused kernel, which stores no mask at full resolution; off is plain PyTorch."""
    sampled_points: Annotated[int, Field(ge=0)] = 0
    """Focal and dice on this many pixels of each mask instead of all, most of them uncertain ones (PointRend). Another
    objective than that of SAM 2, so 0, off, by default."""


class OptimConfig(Section):
    """AdamW, its groups and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the image encoder; empty means `lr`."""
    weight_decay: NonNegative = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor per trunk layer counted from the last (official fine-tuning: 0.9)."""
    clip: Annotated[float, Field(gt=0)] | None = 0.1
    """Largest L2 norm of all gradients; empty is off."""
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """inverse_sqrt: steps of linear cool-down at the end."""
    timescale: Positive = 1000
    """inverse_sqrt: the rate falls as 1 / sqrt(1 + steps since the warm-up / timescale)."""
    final_scale: Probability = 0.1
    """cosine: last learning rate as a share of the first."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, for instance 0.999. It is validated in place of the
    weights, and left as ema.pt of the stage and export/model_ema.pt. Costs a copy of the trained weights and a pass
    over them in each step; not with ZeRO 3."""
    missing_grad: Literal["zero", "skip"] = "zero"
    """Parameters that a batch does not reach: `zero` updates them with a zero gradient (the same with every engine),
    `skip` leaves them alone (the official trainer; not with DeepSpeed, which cannot)."""


class StageConfig(Section):
    """One stage of a recipe."""

    name: Name
    steps: Positive
    accumulate: Positive = 1
    """Micro-steps an optimizer step; N micro-steps give the update of one batch N times as large."""
    mixture: Literal["alternate", "probability"] = "alternate"
    data: Annotated[tuple[MixItem, ...], Field(min_length=1)]
    freeze: tuple[str, ...] = ()
    """Parts or glob patterns of parameter names that are not trained. Parts: encoder, prompt_encoder, mask_decoder,
    memory."""
    prompts: PromptConfig = PromptConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()

    def samples_of_step(self, item: int, world_size: int) -> int:
        """Samples of entry `item` of `data` that an optimizer step takes, over all ranks."""
        return self.data[item].batch_size * self.accumulate * world_size

    @model_validator(mode="after")
    def _something_to_learn(self) -> StageConfig:
        for item in self.data:
            if 1 < item.frames <= self.prompts.init_frames and self.prompts.video.mask > 0:
                raise ValueError(
                    f"dataset {item.dataset!r} has clips of {item.frames} frames and prompts.init_frames is "
                    f"{self.prompts.init_frames}: a clip whose every frame is given as a mask teaches nothing; raise "
                    "frames or lower init_frames"
                )
        return self


class EngineConfig(Section):
    """How gradients meet. `auto`: DeepSpeed under the deepspeed launcher or where one of its settings is given, else
    torch."""

    kind: Literal["auto", "torch", "fsdp", "deepspeed"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    deepspeed_config: str | None = None
    """JSON file whose entries override ours (also --deepspeed_config)."""
    offload_optimizer: bool = False
    """DeepSpeed ZeRO 1 to 3: optimizer states and the update are in main memory and on the CPU. Slower."""
    shard_size: Positive | Literal["node"] | None = None
    """FSDP: ranks that a copy of weights and optimizer state is sharded over. Empty: all; fewer, or `node` for those of
    a node, is hybrid sharding: gathering stays among them, gradients are averaged over the copies."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients of ranks are added up. bfloat16 sends half the bytes and is not exact."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """How long a rank waits for another before the run ends with an error."""
    stall_minutes: Annotated[float, Field(gt=0)] = 5.0
    """A run that has not moved for as long (at most half of timeout_minutes) says which rank is late, and where."""

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> EngineConfig:
        if self.kind in ("torch", "fsdp") and (self.zero_stage is not None or self.deepspeed_config):
            raise ValueError(
                f"engine.kind is {self.kind}, but engine.zero_stage or engine.deepspeed_config asks for DeepSpeed; "
                "set engine.kind=deepspeed"
            )
        if self.offload_optimizer and self.kind in ("torch", "fsdp"):
            raise ValueError(
                f"engine.offload_optimizer is true and engine.kind is {self.kind}, but only DeepSpeed has it; set "
                "engine.kind=deepspeed, or remove engine.offload_optimizer"
            )
        if self.shard_size is not None and self.kind != "fsdp":
            raise ValueError(
                f"engine.shard_size is {self.shard_size} and engine.kind is {self.kind}, but only FSDP has it; set "
                "engine.kind=fsdp, or remove engine.shard_size"
            )
        return self


BASELINE_SUFFIX = "_baseline"
"""`val/x_baseline` is what a trivial method reaches where the model reaches `val/x`."""


class ValidationSet(Section):
    """One validation set and the TensorBoard tag of its score."""

    dataset: str
    tag: Name
    kind: Literal["vos", "image"] = "vos"
    """vos: the first-frame mask is propagated, J&F. image: masks from prompts, COCO mask mAP and mean IoU."""
    max_items: Positive | None = None
    max_frames: Positive | None = None

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of its scores, all of which are better when higher."""
        return (self.tag,) if self.kind == "vos" else (f"{self.tag}_map", f"{self.tag}_miou")


class ValidationConfig(Section):
    """When and on what the model is validated, and when training stops early."""

    every: Annotated[int, Field(ge=0)] = 1000
    """Steps between validations; 0 validates only at the end of a stage."""
    sets: tuple[ValidationSet, ...] = ()
    overlays: Annotated[int, Field(ge=0)] = 2
    """Clips drawn as PNG and as a short video at each validation."""
    patience: Annotated[int, Field(ge=0)] = 3
    """Stop after this many validations without a better mean J&F; 0 is off."""
    forgetting: NonNegative = 2.0
    """Stop when an image score falls by more than this many points from its best; 0 is off."""


class CheckpointConfig(Section):
    """When the state of the run is saved."""

    every: Positive = 500
    keep: Positive = 2
    asynchronous: bool = True
    """Training goes on while a copy of the state is written; the copy takes main memory. false waits for the write."""
    best: str | None = None
    """A validation score, by its tag without `val/` (davis_jf, sa1b_miou): the checkpoint where it was best is kept
    beside the last `keep`; empty keeps none."""
    resume: bool = True
    """The same command continues an unfinished run in `output_dir`; false refuses to touch one."""


class Config(Section):
    """A whole run."""

    name: Name
    output_dir: str = "runs/${name}"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    tf32: bool = False
    """Matrix products and convolutions in float32 may round their inputs to TF32 (10 bits of mantissa) on a GPU that
    can. Off, as in the official trainer. Under bfloat16 or float16 autocast it is about the few that stay float32."""
    log_every: Positive = 10
    max_bad_steps: Positive = 10
    """Training stops after this many steps in a row with a loss or gradient that is not finite."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _streams_fit_the_precision(self) -> Config:
        if self.model.bfloat16_streams and self.precision != "bfloat16":
            raise ValueError(
                f"model.bfloat16_streams needs precision=bfloat16, not {self.precision}; set one or the other"
            )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        wanted = [(f"stages[{i}].data", item.dataset) for i, stage in enumerate(self.stages) for item in stage.data]
        wanted += [("validation.sets", item.dataset) for item in self.validation.sets]
        for where, name in wanted:
            if name not in self.data.datasets:
                raise ValueError(
                    f"{where} names dataset {name!r}, which data.datasets does not define"
                    f"{nearest(name, self.data.datasets)}"
                )
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        tags = [entry.tag for entry in self.validation.sets]
        if len(set(tags)) != len(tags):
            raise ValueError(f"tags of validation.sets must differ, got {tags}")
        best, scores = self.checkpoint.best, [name for entry in self.validation.sets for name in entry.scores]
        if best is not None and best not in scores:
            hint = nearest(best, scores) or "; add a set, or remove checkpoint.best"
            raise ValueError(f"checkpoint.best is {best!r}, which is no score of validation.sets{hint}")
        return self


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name closest to `name`, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(map(str, known))}" if known else ""
