"""The sections of the configuration about data; import them from `config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .config_section import NonNegative, Positive, Probability, Section


class DatasetConfig(Section):
    """One dataset on disk."""

    format: Literal["auto", "video_folder", "sav", "sa1b", "coco"] = "auto"
    root: str
    """Folder of the dataset; for video_folder the one that holds JPEGImages/ and Annotations/."""
    annotations: str | None = None
    """coco: the json file. sav, sa1b, video_folder: another folder for annotations, where they do not lie in `root`."""
    include: tuple[str, ...] = ()
    """Glob patterns of video or image names; empty takes all."""
    exclude: tuple[str, ...] = ()
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Seeded share of the videos or images that is used."""
    sav_annotations: Literal["manual", "auto", "both"] = "manual"


class OcclusionConfig(Section):
    """Occlusion training: up to `max_frames` consecutive frames of a clip are hidden, so that the model must
    remember."""

    probability: Probability = 0.0
    max_frames: Positive = 5
    mode: Literal["blank", "cut"] = "blank"
    """blank: the frames turn grey and the objects count as absent there; cut: the frames are taken out (a gap in
    time)."""


class AugmentConfig(Section):
    """Augmentations, equal for all frames of a clip unless they say per frame."""

    flip: Probability = 0.5
    scale: tuple[float, float] = (0.8, 1.2)
    """Range of random resize before the crop to the square input; (1, 1) is off."""
    degrees: NonNegative = 0.0
    shear: NonNegative = 0.0
    brightness: NonNegative = 0.1
    contrast: NonNegative = 0.1
    saturation: NonNegative = 0.1
    frame_brightness: NonNegative = 0.0
    frame_contrast: NonNegative = 0.0
    frame_saturation: NonNegative = 0.0
    grayscale: Probability = 0.0
    blur: Probability = 0.1
    mosaic: Probability = 0.0
    """Four cells show the same frame, and the objects are annotated in one of them (0.1 in the paper's second version,
    off in the official config)."""

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be [low, high] with 0 < low <= high")
        return value


class MixItem(Section):
    """How a stage reads one dataset."""

    dataset: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the steps that use this dataset."""
    frames: Positive = 1
    """Frames a clip; 1 trains on single images (no memory). It shapes the graph, so it is one number for a step on all
    ranks; for clips of several lengths list the dataset once for each."""
    batch_size: Positive = 1
    """Images or clips per rank and micro-step."""
    max_objects: Positive = 3
    stride: tuple[Positive, Positive] = (1, 1)
    """Smallest and largest step between neighbouring annotated frames of a clip."""
    reverse: Probability = 0.0
    """Probability of playing a clip backwards."""
    visible: Literal["first", "window"] = "first"
    """first: the objects visible in the first frame of a clip are followed, as official. window: those visible in any
    of its frames; an object that the first frame lacks is prompted there as absent (see docs/data.md)."""
    min_area: NonNegative = 0.0
    """Objects under this are not taken: below 1 a share of the frame, from 1 on pixels of the annotation."""
    max_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Objects over this share of the frame are not taken (0.9 for SA-1B in the paper)."""
    occlusion: OcclusionConfig = OcclusionConfig()
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """How often a video or image comes in an epoch; the part after the point by a draw per epoch."""
    repeat_names: dict[str, NonNegative] = {}
    """Glob patterns of video or image names to a `repeat` of their own; the first that matches counts."""
    balance: bool = False
    """Give all clips of a step about the same number of objects, so that no rank waits for another. The objects of
    the whole dataset are counted once for it, and the counts kept."""

    @property
    def most_objects(self) -> int:
        """What a micro-step of a rank can have."""
        return self.batch_size * self.max_objects

    @field_validator("stride")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("must be [smallest, largest]")
        return value

    @model_validator(mode="after")
    def _some_area(self) -> MixItem:
        if self.max_area <= self.min_area < 1:
            raise ValueError(f"min_area {self.min_area:g} must be below max_area {self.max_area:g}")
        return self


class DataConfig(Section):
    """The datasets by name, and how they are read."""

    root: str | None = None
    """Shorthand: interpolate it in the datasets as ${data.root}."""
    workers: Annotated[int, Field(ge=0, le=128)] = 2
    """Loader processes of each rank, for each entry of the stage's `data`: a dataset that is listed for nine lengths of
    clips has nine times as many."""
    backend: Literal["auto", "opencv", "dali"] = "opencv"
    """What decodes and augments frames: opencv in the loader processes, or NVIDIA DALI, on the device. Both give the
    same samples in the same order. auto is DALI on a GPU where it is installed; not the default, since DALI's decoders
    on a GPU have not been run yet."""
    dali_prefetch: Positive = 2
    """Batches that DALI works on while another one is trained on; each takes memory on the device."""
    prefetch: Positive = 2
    """Batches that each loader process prepares ahead (more where `accumulate` takes more in one step). They wait in
    memory of the host: `workers` x `prefetch` for each entry of `data` and rank."""
    max_bad_share: Probability = 0.01
    """Videos or images that cannot be used (damaged files, too few frames for a clip) are replaced, counted and listed
    in the run folder. More than this share of a dataset stops the run; 0 stops it at the first."""
    datasets: dict[str, DatasetConfig]
