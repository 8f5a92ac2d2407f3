"""Validation while training: every set of the config is scored on all ranks together, and the guards look at the
scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from ..config import BASELINE_SUFFIX, ValidationConfig, ValidationSet
from ..data.sample import DataError, Dataset, VideoRecord
from ..parallel import Ranks
from .coco import ImageResult, evaluate_images
from .metrics import scored_frames
from .overlays import OverlayWriter
from .vos import VosResult, evaluate_vos


def validate(
    model: nn.Module,
    config: ValidationConfig,
    datasets: Mapping[str, Dataset],
    ranks: Ranks,
    overlays: Path | None = None,
) -> dict[str, float]:
    """Scores by TensorBoard tag, in points: `val/TAG` and `val/TAG_baseline` (copy the first mask) for videos,
    `val/TAG_map` and `val/TAG_miou` for images.

    Args:
        model: in eval mode with whole weights; every rank scores its share of the items.
        overlays: folder for pictures and short videos of the first clips (of rank 0's share).
    """
    scores: dict[str, float] = {}
    for entry in config.sets:
        scores |= _score(model, entry, datasets[entry.dataset], config.overlays if ranks.main else 0, ranks, overlays)
    return scores


def check_sets(config: ValidationConfig, datasets: Mapping[str, Dataset]) -> None:
    """Find out at the start of a run whether its validation can score anything; reads annotations, decodes nothing.

    Raises:
        DataError: no video of a set has enough annotated frames (public test splits hold first masks only).
    """
    for entry in config.sets:
        if entry.kind == "vos" and not any(
            _scorable(record, entry) for record in _items(datasets[entry.dataset], entry)
        ):
            raise DataError(
                f"validation set {entry.dataset!r}: no video has an annotated frame to score between its first one "
                "and its last; public test splits hold first masks only, so hold out a part of the training videos"
            )


def _items(dataset: Dataset, entry: ValidationSet) -> Iterator[VideoRecord]:
    count = len(dataset) if entry.max_items is None else min(len(dataset), entry.max_items)
    return (dataset[index] for index in range(count))


def _scorable(record: VideoRecord, entry: ValidationSet) -> bool:
    annotated = [frame for frame in record.annotated if entry.max_frames is None or frame < entry.max_frames]
    return bool(annotated) and bool(scored_frames(annotated, annotated[0]))


def _score(
    model: nn.Module, entry: ValidationSet, dataset: Dataset, drawn: int, ranks: Ranks, overlays: Path | None
) -> dict[str, float]:
    share = {"max_items": entry.max_items, "rank": ranks.rank, "world_size": ranks.world_size}
    if entry.kind == "image":
        values = ImageResult.merge(ranks.gather(evaluate_images(model, dataset, **share))).scores()
        return {f"val/{entry.tag}_{name}": value for name, value in values.items()}
    writer = OverlayWriter(overlays / entry.tag, drawn) if overlays and drawn else None
    values = VosResult.merge(
        ranks.gather(evaluate_vos(model, dataset, max_frames=entry.max_frames, save=writer, **share))
    ).scores()
    return {f"val/{entry.tag}": values["jf"], f"val/{entry.tag}{BASELINE_SUFFIX}": values["copy_jf"]}


def video_scores(scores: Mapping[str, float], config: ValidationConfig) -> dict[str, float]:
    """The J&F scores among `scores`, without the baselines."""
    tags = {f"val/{entry.tag}" for entry in config.sets if entry.kind == "vos"}
    return {tag: value for tag, value in scores.items() if tag in tags}


def image_scores(scores: Mapping[str, float], config: ValidationConfig) -> dict[str, float]:
    """The image scores that the forgetting guard watches (mask mAP)."""
    tags = {f"val/{entry.tag}_map" for entry in config.sets if entry.kind == "image"}
    return {tag: value for tag, value in scores.items() if tag in tags}
