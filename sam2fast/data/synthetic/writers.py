"""One scene on disk in each of the four formats; masks come from the generator, never from compressed frames."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from pycocotools import mask as rle

from ..palette import davis_palette
from .scene import KINDS, Scene, SceneConfig

SAV_FPS = 24
SAV_ANNOTATION_STEP = 4
_JPEG_QUALITY = 95
_SMALL, _LARGE = 32**2, 96**2  # area limits in pixels of SA-V's size buckets


class Writer(Protocol):
    """Writes items 0, 1, 2, ... of a dataset into a folder."""

    def scene_config(self, config: SceneConfig) -> SceneConfig:
        """What a scene of this format holds, given that of a video."""

    def add(self, index: int, scene: Scene, frames: int) -> None:
        """Write one scene; `frames` is the number of annotated frames (images take one)."""

    def finish(self) -> None:
        """Write what belongs to the dataset as a whole."""


class VideoFolderWriter:
    """DAVIS layout: JPEGImages/SEQ/00000.jpg and palette PNG Annotations/SEQ/00000.png."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scene_config(self, config: SceneConfig) -> SceneConfig:
        return config

    def add(self, index: int, scene: Scene, frames: int) -> None:
        from PIL import Image

        images, annotations = (self.root / part / f"scene{index:05d}" for part in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        palette = davis_palette().ravel().tolist()
        for t in range(frames):
            image, labels = scene.render(t)
            (images / f"{t:05d}.jpg").write_bytes(_jpeg(image))
            picture = Image.fromarray(labels)
            picture.putpalette(palette)
            picture.save(annotations / f"{t:05d}.png")

    def finish(self) -> None:
        pass


class SAVWriter:
    """SA-V layout: NAME.mp4 at 24 fps and NAME_manual.json with masklets on every 4th frame."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scene_config(self, config: SceneConfig) -> SceneConfig:
        return config

    def add(self, index: int, scene: Scene, frames: int) -> None:
        name = f"sav_{index + 1:06d}"
        count = (frames - 1) * SAV_ANNOTATION_STEP + 1
        rendered = (scene.render(i / SAV_ANNOTATION_STEP) for i in range(count))
        masklet: list[list[dict[str, Any]]] = []

        def images():
            for i, (image, labels) in enumerate(rendered):
                if i % SAV_ANNOTATION_STEP == 0:
                    masklet.append([_encode(labels == k) for k in range(1, scene.num_objects + 1)])
                yield image

        _write_mp4(self.root / f"{name}.mp4", images(), scene.width, scene.height)
        (self.root / f"{name}_manual.json").write_text(json.dumps(sav_annotation(name, masklet, count)))

    def finish(self) -> None:
        pass


IMAGES_PER_TAR = 400
"""Of synthetic SA-1B; the real one has about 11,000."""


class SA1BWriter:
    """SA-1B layout: sa_N.jpg and sa_N.json side by side, in the folder or in tar files as the dataset is shipped."""

    def __init__(self, root: Path, tar: bool) -> None:
        self._root, self._tar = root, tar
        self._archive: tarfile.TarFile | None = None

    def scene_config(self, config: SceneConfig) -> SceneConfig:
        return replace(config, objects=(3, 6), leave=0.0)

    def add(self, index: int, scene: Scene, frames: int) -> None:
        name = f"sa_{index + 1}"
        if self._tar and index % IMAGES_PER_TAR == 0:
            self.finish()
            self._archive = tarfile.open(self._root / f"sa_{index // IMAGES_PER_TAR:06d}.tar", "w")
        image, labels = scene.render(0)
        annotation = sa1b_annotation(index + 1, labels, scene.num_objects)
        self._put(f"{name}.jpg", _jpeg(image))
        self._put(f"{name}.json", json.dumps(annotation).encode())

    def finish(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def _put(self, name: str, content: bytes) -> None:
        if self._archive is None:
            (self._root / name).write_bytes(content)
        else:
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            self._archive.addfile(member, io.BytesIO(content))


class CocoWriter:
    """COCO layout: images/ and instances.json with polygons; every fourth object, and one with a hole, as RLE."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        (root / "images").mkdir()

    def scene_config(self, config: SceneConfig) -> SceneConfig:
        return replace(config, objects=(2, 5), leave=0.0)

    def add(self, index: int, scene: Scene, frames: int) -> None:
        image, labels = scene.render(0)
        image_id = index + 1
        file_name = f"{image_id:012d}.jpg"
        (self._root / "images" / file_name).write_bytes(_jpeg(image))
        self._images.append({"id": image_id, "file_name": file_name, "height": scene.height, "width": scene.width})
        for object_id in range(1, scene.num_objects + 1):
            mask = labels == object_id
            if not mask.any():
                continue
            annotation_id = len(self._annotations) + 1
            polygons = coco_polygons(mask) if annotation_id % 4 else None
            self._annotations.append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": KINDS.index(scene.kind(object_id)) + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": rle.toBbox(_encode(mask)).tolist(),
                    "segmentation": polygons or uncompressed_rle(mask),
                }
            )

    def finish(self) -> None:
        categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(KINDS, start=1)]
        content = {
            "info": {"description": "synthetic scenes"},
            "licenses": [],
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }
        (self._root / "instances.json").write_text(json.dumps(content))


def sav_annotation(name: str, masklet: list[list[dict[str, Any]]], num_frames: int) -> dict[str, Any]:
    """The fields of an SA-V `*_manual.json`; `masklet` holds one RLE per annotated frame and object."""
    height, width = masklet[0][0]["size"]
    areas = np.array([[rle.area(mask) for mask in frame] for frame in masklet], np.float64)  # [T, O]
    visible = areas > 0
    mean_area = areas.sum(0) / np.maximum(visible.sum(0), 1)
    first = visible.argmax(0)
    num_objects = areas.shape[1]
    return {
        "video_id": name,
        "video_duration": num_frames / SAV_FPS,
        "video_frame_count": float(num_frames),
        "video_height": float(height),
        "video_width": float(width),
        "video_resolution": float(height * width),
        "video_environment": "Indoor",
        "video_split": "train",
        "masklet": masklet,
        "masklet_id": list(range(num_objects)),
        "masklet_size_rel": (mean_area / (height * width)).round(10).tolist(),
        "masklet_size_abs": mean_area.round(10).tolist(),
        "masklet_size_bucket": [
            "small" if area < _SMALL else "medium" if area < _LARGE else "large" for area in mean_area
        ],
        "masklet_visibility_changes": [
            int((visible[start + 1 :, k] != visible[start:-1, k]).sum()) for k, start in enumerate(first)
        ],
        "masklet_first_appeared_frame": first.astype(float).tolist(),
        "masklet_frame_count": [len(masklet)] * num_objects,
        "masklet_edited_frame_count": [0] * num_objects,
        "masklet_type": ["manual"] * num_objects,
        "masklet_stability_score": [None] * num_objects,
        "masklet_num": num_objects,
    }


def sa1b_annotation(image_id: int, labels: np.ndarray, num_objects: int) -> dict[str, Any]:
    """The fields of an SA-1B json for the visible objects of one image; boxes are one pixel short, as SA-1B's are."""
    height, width = labels.shape
    annotations = []
    for object_id in range(1, num_objects + 1):
        mask = labels == object_id
        if not mask.any():
            continue
        encoded = _encode(mask)
        x, y, w, h = rle.toBbox(encoded).tolist()
        depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        annotations.append(
            {
                "bbox": [x, y, w - 1, h - 1],
                "area": int(mask.sum()),
                "segmentation": encoded,
                "predicted_iou": 1.0,
                "point_coords": [[float(column), float(row)]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
                "id": image_id * 100 + object_id,
                "stability_score": 1.0,
            }
        )
    image = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    return {"image": image, "annotations": annotations}


def coco_polygons(mask: np.ndarray) -> list[list[float]] | None:
    """Polygons [x0, y0, x1, y1, ...] of a bool mask [H, W]; None where it has a hole or a piece too thin for a polygon.

    Contours are traced at twice the size, so that polygons run between pixel centers and rasterize back to the mask.
    """
    doubled = np.kron(mask, np.ones((2, 2), np.uint8))
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (hierarchy[0, :, 3] >= 0).any() or any(len(contour) < 4 for contour in contours):
        return None
    return [((contour[:, 0] + 0.5) / 2).ravel().tolist() for contour in contours]


def uncompressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's list form of a bool mask [H, W]: run lengths in column order, beginning with background."""
    flat = mask.ravel(order="F")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + np.diff(edges).tolist()}


def _encode(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def _jpeg(image: np.ndarray) -> bytes:
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    ok, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    assert ok
    return content.tobytes()


def _write_mp4(path: Path, images, width: int, height: int) -> None:
    """H.264 with B-frames, so that decode order differs from display order as in real videos."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=SAV_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, SAV_FPS)
        # one thread and a fixed GOP give the same bytes on every machine
        stream.options = {"crf": "18", "preset": "veryfast", "bf": "2", "b-adapt": "0", "g": "24", "threads": "1"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
