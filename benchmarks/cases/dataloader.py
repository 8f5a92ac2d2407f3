"""One training sample from files to a batch on one core: stages, `full`, and what handing it over costs.

A shape is RECIPE-FRAMESxOBJECTS@SIDE: the augmentations of configs/finetune.yaml (those of the official trainer: affine
with shear, color jitter of clip and frames, grayscale) or of configs/staged.yaml (crop and resize, color jitter, blur).
All pipelines get the same plans: clips, geometry, color factors, blur. Times are the mean over a few samples, in
seconds of the processor: everything runs in one thread, and what else the machine does hardly counts.

Stages: `read` the files, `decode` frames from bytes, `masks` (labels from PNG), `augment` frames and masks, `collate`,
and `copy` to new shared memory, as a worker hands a batch to the trainer. `full` is measured apart from them and holds
all but `copy`. It includes drawing the plan for `opencv`, which decodes the first frame's masks for it, but not for
`pil`.

The check compares all with plans rendered by float32 sampling at twice the density.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import yaml
from harness import FOLDER
from harness.case import Case, Outputs, Provider
from loading import pil
from loading.clips import open_clips
from torch import Tensor

from sam2fast.config import AugmentConfig, MixItem
from sam2fast.data.augment import FILL, color_matrix
from sam2fast.data.dali import PACKAGE, DaliDecoder, is_installed
from sam2fast.data.dali_plan import EncodedBatch, assemble
from sam2fast.data.files import decode_image, decode_labels, read_bytes
from sam2fast.data.masks import FrameMasks, label_masks
from sam2fast.data.render import SamplePlan, render
from sam2fast.data.sample import VideoRecord, collate
from sam2fast.data.sampling import ClipDataset

RECIPES = ("finetune", "staged")
STAGES = ("read", "decode", "masks", "augment", "collate", "copy")
SAMPLES = 3
STEP_MS = {"A100, L": 318, "H100, L": 122, "H100, B+": 77}
"""Predicted time of a training step with one clip of eight frames and three objects, kernels fused."""


class LoaderShape(NamedTuple):
    text: str
    recipe: str
    frames: int
    objects: int
    side: int

    @property
    def full_size_bytes(self) -> int:
        return 0


@dataclass
class Inputs:
    folder: tempfile.TemporaryDirectory
    """Of the videos; lives as long as this."""
    dataset: ClipDataset
    plans: list[SamplePlan]

    def files(self, number: int) -> tuple[list[Path], list[Path]]:
        """JPEGs and label PNGs of a sample."""
        plan, root = self.plans[number], Path(self.folder.name)
        folders = root / "JPEGImages" / plan.record.name, root / "Annotations" / plan.record.name
        frames, masks = (sorted(folder.iterdir()) for folder in folders)
        return [frames[n] for n in plan.frames], [masks[n] for n in plan.frames]


class Decoded:
    """A record whose frames and masks are decoded, so that `render` has only augmentation left to do."""

    def __init__(self, record: VideoRecord, numbers: Sequence[int], images: list[np.ndarray], masks: list[FrameMasks]):
        self.name, self.num_frames, self.size, self.annotated = record.name, record.num_frames, record.size, numbers
        self._images, self._masks = (dict(zip(numbers, items, strict=True)) for items in (images, masks))

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [self._images[index] for index in indices]

    def masks(self, frame: int) -> FrameMasks:
        return self._masks[frame]


Work = dict[str, Callable[[], object]]
"""Stages in their order; each keeps what the next ones need."""


class Pipeline:
    """One way to load a sample."""

    def stages(self, inputs: Inputs, number: int) -> Work:
        raise NotImplementedError

    def full(self, inputs: Inputs, number: int) -> Outputs:
        """All stages but `copy`; the batch, `frames` [T, 3, S, S] among it as uint8 or normalized, and `masks`."""
        raise NotImplementedError

    def __call__(self, inputs: Inputs) -> Outputs:
        """Every sample, for the check: frames uint8 and masks one after the other."""
        outputs = [self.full(inputs, number) for number in range(len(inputs.plans))]
        frames = torch.cat([_bytes(output["frames"]).flatten(0, 1) for output in outputs])
        return {"frames": frames, **{f"masks {n}": output["masks"] for n, output in enumerate(outputs)}}


class OpenCV(Pipeline):
    def stages(self, inputs: Inputs, number: int) -> Work:
        plan, state = inputs.plans[number], {}
        frames, masks = inputs.files(number)

        def read() -> None:
            state["data"] = [read_bytes(path) for path in (*frames, *masks)]

        def decode() -> None:
            state["images"] = [decode_image(data, path) for data, path in zip(state["data"], frames, strict=False)]

        def decode_masks() -> None:
            labels = [decode_labels(data, path) for data, path in zip(state["data"][len(frames) :], masks, strict=True)]
            state["masks"] = [label_masks(each, plan.record.size) for each in labels]

        def augment() -> None:
            record = Decoded(plan.record, plan.frames, state["images"], state["masks"])
            state["sample"] = render(replace(plan, record=record))

        def batch() -> None:
            state["batch"] = collate([state["sample"]])

        def copy() -> None:
            _share(state["batch"].frames, state["batch"].masks)

        return dict(zip(STAGES, (read, decode, decode_masks, augment, batch, copy), strict=True))

    def full(self, inputs: Inputs, number: int) -> Outputs:
        batch = collate([inputs.dataset[number]])
        return {"frames": batch.frames, "masks": batch.masks}


class Pil(Pipeline):
    def stages(self, inputs: Inputs, number: int) -> Work:
        return self._work(inputs, number, {})

    def full(self, inputs: Inputs, number: int) -> Outputs:
        state: dict = {}
        for stage, work in self._work(inputs, number, state).items():
            if stage != "copy":
                work()
        return state["batch"]

    def _work(self, inputs: Inputs, number: int, state: dict) -> Work:
        plan = inputs.plans[number]
        frames, masks = inputs.files(number)

        def read() -> None:
            state["files"] = [[path.read_bytes() for path in paths] for paths in (frames, masks)]

        def decode() -> None:
            state["images"] = pil.decode(state["files"][0])

        def decode_masks() -> None:
            state["masks"] = pil.decode_masks(state["files"][1], list(plan.first))

        def augment() -> None:
            state["sample"] = pil.augment(plan, state["images"], state["masks"])

        def batch() -> None:
            state["batch"] = pil.collate(*state["sample"])

        def copy() -> None:
            _share(*state["batch"].values())

        return dict(zip(STAGES, (read, decode, decode_masks, augment, batch, copy), strict=True))


class Dali(Pipeline):
    """DALI on the CPU. One graph decodes and augments, so only `read` (with `masks` in it) and `decode` (with all that
    follows) can be told apart."""

    def __init__(self) -> None:
        self._encoded: deque[EncodedBatch] = deque()
        self._decoder = DaliDecoder(torch.device("cpu"), prefetch=0)
        self._batches = self._decoder.decode(self._encoded.popleft() for _ in count())

    def stages(self, inputs: Inputs, number: int) -> Work:
        state = {}

        def read() -> None:
            self._encoded.append(assemble([self._decoder.encode(inputs.plans[number])]))

        def decode() -> None:
            state["batch"] = next(self._batches)

        def copy() -> None:
            _share(state["batch"].frames, state["batch"].packed_masks)

        def nothing() -> None:
            pass

        return dict(zip(STAGES, (read, decode, nothing, nothing, nothing, copy), strict=True))

    def full(self, inputs: Inputs, number: int) -> Outputs:
        plan = inputs.dataset.plan(number)
        self._encoded.append(assemble([self._decoder.encode(plan)]))
        batch = next(self._batches).to("cpu")
        return {"frames": batch.frames, "masks": batch.masks}


def _no_dali(device: torch.device) -> str | None:
    return None if is_installed() else f"{PACKAGE} is not installed"


class DataloaderCase(Case):
    name = "dataloader"
    about = "one sample from files to a batch, on one core"
    modes = (*STAGES, "full")
    shapes = ("finetune-8x3@1024", "staged-8x3@1024")
    check_shape = "finetune-2x3@256"
    baseline = "pil"
    differentiable = False
    providers = {"pil": Provider(Pil), "opencv": Provider(OpenCV), "dali": Provider(Dali, obstacle=_no_dali)}
    tolerance = 5.0
    """Mean difference of frames in levels of 256. PIL resamples twice and rounds at each of eight steps."""
    smallest_iou = 0.9
    """Of the masks with the reference. PIL warps them to the nearest pixel."""

    def shape(self, text: str) -> LoaderShape:
        match = re.fullmatch(rf"({'|'.join(RECIPES)})-([1-9]\d*)x([1-3])@([1-9]\d*)", text)
        if match is None or int(match[4]) % 32:
            raise ValueError(
                f"unknown shape {text!r} of case {self.name}: write RECIPE-FRAMESxOBJECTS@SIDE, for instance "
                f"{self.shapes[0]}; recipes {', '.join(RECIPES)}, at most 3 objects, a side divisible by 32"
            )
        return LoaderShape(text, match[1], *map(int, match.groups()[1:]))

    def make_inputs(self, shape: LoaderShape, device: torch.device) -> Inputs:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        folder = tempfile.TemporaryDirectory(prefix="sam2fast-clips-")
        config = yaml.safe_load((FOLDER.parent / "configs" / f"{shape.recipe}.yaml").read_text())
        augment = AugmentConfig(**config["stages"][0]["augment"])
        item = MixItem(dataset="clips", frames=shape.frames, max_objects=shape.objects)
        dataset = ClipDataset(open_clips(Path(folder.name)), item, augment, shape.side, seed=0)
        return Inputs(folder, dataset, [dataset.plan(number) for number in range(SAMPLES)])

    def dtype(self, inputs: Inputs) -> torch.dtype:
        return torch.uint8

    def measure(self, run: Pipeline, inputs: Inputs, modes: Sequence[str], device: torch.device) -> dict[str, float]:
        times = dict.fromkeys(modes, 0.0)
        for number in range(len(inputs.plans)):
            if "full" in modes:
                start = time.process_time()
                run.full(inputs, number)
                times["full"] += time.process_time() - start
            for stage, work in run.stages(inputs, number).items() if set(modes) - {"full"} else ():
                start = time.process_time()
                work()
                if stage in modes:
                    times[stage] += time.process_time() - start
        return {mode: 1e3 * seconds / len(inputs.plans) for mode, seconds in times.items()}

    def reference(self, inputs: Inputs) -> Outputs:
        rendered = [_plain(plan) for plan in inputs.plans]
        frames = torch.cat([frames for frames, _ in rendered])
        return {"frames": frames, **{f"masks {n}": masks for n, (_, masks) in enumerate(rendered)}}

    def fault(self, provider: str, observed: Outputs, expected: Outputs) -> str | None:
        error = (observed["frames"].float() - expected["frames"].float()).abs().mean().item()
        if not error <= self.tolerance:
            return f"frames are off by {error:.1f} of 256 levels in the mean"
        for name, want in expected.items():
            if name == "frames":
                continue
            found = observed[name]
            iou = (found & want).sum().item() / max(1, (found | want).sum().item())
            if found.shape != want.shape or iou < self.smallest_iou:
                return f"{name} {list(found.shape)} have an IoU of {iou:.3f} with the reference {list(want.shape)}"
        return None

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Frames as bytes and masks as bytes, written once; of one sample."""
        plan = inputs.plans[0]
        return len(plan.frames) * (3 + len(plan.first)) * plan.geometry.side**2

    def remarks(self, milliseconds: dict[tuple[str, str, str], float]) -> list[str]:
        lines = []
        for (shape, mode, provider), ms in milliseconds.items():
            if mode == "full":
                need = ", ".join(f"{ms / step:.2g} ({gpu}, step of {step} ms)" for gpu, step in STEP_MS.items())
                lines.append(f"{shape} {provider}: {1e3 / ms:.2f} samples/s on one core; cores that feed a GPU: {need}")
        return lines


def _share(*tensors: Tensor) -> None:
    """What a loader's worker does with each tensor of a batch."""
    for tensor in tensors:
        tensor.share_memory_()


def _bytes(frames: Tensor) -> Tensor:
    """Frames as uint8, [T, B, ...] or [B, T, ...] with B = 1."""
    if frames.dtype == torch.uint8:
        return frames
    return ((frames * pil.STD + pil.MEAN) * 255).round().clamp(0, 255).to(torch.uint8)


def _plain(plan: SamplePlan) -> tuple[Tensor, Tensor]:
    """Frames float32 [T, 3, S, S] and masks bool [T, O, S, S] of a plan, sampled at twice the density and averaged."""
    side = plan.geometry.side
    centers = (np.arange(2 * side) + 0.5) / 2 - 0.5
    grid = np.stack([*np.meshgrid(centers, centers), np.ones((2 * side, 2 * side))], axis=-1)
    places = grid @ np.linalg.inv(np.vstack([plan.geometry.affine(), [0, 0, 1]]))[:2].T
    x, y = places.astype(np.float32).transpose(2, 0, 1)
    (rows, columns), square = plan.geometry.source, (side, side)
    inside = (x >= columns.start - 0.5) & (x < columns.stop - 0.5) & (y >= rows.start - 0.5) & (y < rows.stop - 0.5)
    inside = cv2.resize(inside.astype(np.float32), square, interpolation=cv2.INTER_AREA)

    def look(array: np.ndarray) -> np.ndarray:
        seen = cv2.remap(array.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return cv2.resize(seen, square, interpolation=cv2.INTER_AREA)

    frames, masks = [], np.zeros((len(plan.frames), len(plan.first), side, side), bool)
    for position, image in enumerate(plan.record.frames(plan.frames)):
        colors = color_matrix(image, *plan.colors[position])
        adjusted = np.clip(image @ colors[:, :3].T + colors[:, 3], 0, 255)
        frame = inside[..., None] * look(adjusted) + (1 - inside[..., None]) * np.array(FILL, np.float32)
        frames.append(cv2.GaussianBlur(frame, (0, 0), plan.sigma) if plan.sigma else frame)
        found = plan.record.masks(plan.frames[position])
        for row, object_id in enumerate(plan.first):
            if object_id in found:
                masks[position, row] = inside * look(found[object_id]) >= 0.5
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), torch.from_numpy(masks)


CASE = DataloaderCase()
