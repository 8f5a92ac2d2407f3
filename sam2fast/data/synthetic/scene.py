"""A synthetic scene: textured objects that move, deform, cross, occlude one another, leave and come back.

Everything is a smooth function of a continuous time, whose unit is one annotated frame, so the same scene can be
rendered at any frame rate. All randomness is drawn when the scene is built: rendering is deterministic and frames are
independent of one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .textures import background_texture, object_texture

KINDS = ("ellipse", "polygon", "blob")
_SUBPIXEL_BITS = 4
_CONTOUR_POINTS = 96
_LOBES = np.array([2, 3, 4])
"""Waves along the outline of which a deformation consists."""
_TEXTURE_REACH = 1.25
"""A texture covers the undeformed outline this many times, so that bent parts have a surface too."""


@dataclass(frozen=True)
class SceneConfig:
    """Size and content of a scene; areas are shares of the frame."""

    height: int = 192
    width: int = 256
    objects: tuple[int, int] = (2, 4)
    """Fewest and most objects."""
    area: tuple[float, float] = (0.05, 0.22)
    """Smallest and largest area of an object; the upper bound shrinks with the number of objects."""
    leave: float = 0.6
    """Probability that one object goes out of the frame and returns."""
    late: float = 0.15
    """Probability that this object is still outside at time 0."""


@dataclass(frozen=True)
class _Wave:
    """offset + amplitude * sin(2 pi t / period + phase), elementwise."""

    offset: np.ndarray | float
    amplitude: np.ndarray | float
    period: np.ndarray | float
    phase: np.ndarray | float

    def __call__(self, time: float) -> np.ndarray | float:
        return self.offset + self.amplitude * np.sin(2 * np.pi * time / self.period + self.phase)


@dataclass(frozen=True)
class _Object:
    kind: str
    outline: np.ndarray  # [P, 2] around the origin, enclosing an area of 1
    radius: float  # pixels for one unit of the outline
    texture: np.ndarray  # [side, side, 3], covering [-reach, reach] units in both directions
    reach: float
    path: tuple[_Wave, _Wave]  # the center in world pixels is the sum of both
    angle: float
    spin: float  # radians per unit of time
    breathing: _Wave  # factor of the size
    bend: _Wave  # strengths of the lobes [3]
    bend_phase: np.ndarray  # [3]

    def contour(self, time: float) -> np.ndarray:
        """Outline in world pixels [P, 2]."""
        theta = np.arctan2(self.outline[:, 1], self.outline[:, 0])
        lobes = np.sin(theta[:, None] * _LOBES + self.bend_phase) @ self.bend(time)
        return (self.outline * (1 + lobes)[:, None]) @ self._axes(time).T + self._center(time)

    def texture_to_world(self, time: float) -> np.ndarray:
        """Affine matrix [2, 3] from texture pixels to world pixels."""
        side = self.texture.shape[0]
        linear = self._axes(time) * (2 * self.reach / side)
        return np.column_stack([linear, self._center(time) - linear @ np.full(2, side / 2)])

    def _axes(self, time: float) -> np.ndarray:
        return _rotation(self.angle + self.spin * time) * (self.radius * self.breathing(time))

    def _center(self, time: float) -> np.ndarray:
        return self.path[0](time) + self.path[1](time)


class Scene:
    """One random scene; object ids are 1 (farthest) to `num_objects` (nearest).

    Args:
        config: size of the frame and what is in it.
        rng: source of all randomness; only used while building.
    """

    def __init__(self, config: SceneConfig, rng: np.random.Generator) -> None:
        self.height, self.width = config.height, config.width
        self.num_objects = int(rng.integers(config.objects[0], config.objects[1] + 1))
        self._margin = max(self.height, self.width) // 4
        self._background = background_texture(rng, self.height + 2 * self._margin, self.width + 2 * self._margin)
        self._camera = _Wave(
            np.array([0.0, 0.0, 0.0, 1.0]),
            rng.uniform(0.4, 1.0, 4) * [0.06 * self.width, 0.06 * self.height, np.radians(4), 0.08],
            rng.uniform(24, 48, 4),
            rng.uniform(0, 2 * np.pi, 4),
        )
        self._objects = self._place_objects(config, rng)

    def kind(self, object_id: int) -> str:
        """Shape of an object, one of `KINDS`."""
        return self._objects[object_id - 1].kind

    def render(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """The frame at `time` (in annotated frames): image uint8 [H, W, 3] RGB and visible object ids uint8 [H, W]."""
        camera = self._camera_matrix(time)
        shift = np.array([[1, 0, -self._margin], [0, 1, -self._margin], [0, 0, 1]], np.float64)
        image = cv2.warpAffine(
            self._background, camera @ shift, (self.width, self.height), borderMode=cv2.BORDER_REFLECT_101
        )
        labels = np.zeros((self.height, self.width), np.uint8)
        for number, item in enumerate(self._objects, start=1):
            self._paint(item, number, time, camera, image, labels)
        return image, labels

    def _paint(
        self, item: _Object, number: int, time: float, camera: np.ndarray, image: np.ndarray, labels: np.ndarray
    ) -> None:
        """Draw one object over what lies behind it; an edge pixel is its own where it covers at least half of it."""
        contour = item.contour(time) @ camera[:, :2].T + camera[:, 2]
        low = np.maximum(np.floor(contour.min(0)).astype(int) - 1, 0)
        high = np.minimum(np.ceil(contour.max(0)).astype(int) + 2, (self.width, self.height))
        if (high <= low).any():
            return
        (x0, y0), (x1, y1) = low, high
        coverage = np.zeros((y1 - y0, x1 - x0), np.uint8)
        points = np.round((contour - low) * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(coverage, [points], 255, cv2.LINE_AA, shift=_SUBPIXEL_BITS)
        to_image = camera @ np.vstack([item.texture_to_world(time), [0, 0, 1]])
        to_image[:, 2] -= low
        surface = cv2.warpAffine(item.texture, to_image, (x1 - x0, y1 - y0), borderMode=cv2.BORDER_REFLECT_101)
        alpha = coverage[..., None].astype(np.float32) / 255
        behind = image[y0:y1, x0:x1]
        behind[:] = np.round(behind * (1 - alpha) + surface * alpha).astype(np.uint8)
        labels[y0:y1, x0:x1][coverage >= 128] = number

    def _camera_matrix(self, time: float) -> np.ndarray:
        """World to image, affine [2, 3]: pan, rotation and zoom about the middle of the frame."""
        pan_x, pan_y, angle, zoom = self._camera(time)
        linear = zoom * _rotation(angle)
        middle = np.array([self.width, self.height]) / 2
        return np.column_stack([linear, middle + (pan_x, pan_y) - linear @ middle])

    def _place_objects(self, config: SceneConfig, rng: np.random.Generator) -> list[_Object]:
        """Objects start around the middle and swing to the opposite side, so that their paths cross there."""
        count = self.num_objects
        leaver = int(rng.integers(count)) if rng.random() < config.leave else None
        first_direction, first_hue = rng.uniform(0, 2 * np.pi), rng.random()
        slots = rng.permutation(count)
        largest = config.area[1] * min(1.0, (2 / count) ** 0.5)
        objects = []
        for i in range(count):
            kind = KINDS[rng.integers(len(KINDS))]
            outline = _outline(kind, rng)
            radius = float(np.sqrt(rng.uniform(config.area[0], largest) * self.height * self.width))
            if i == leaver:
                path = self._leaving_path(radius * float(np.linalg.norm(outline, axis=1).max()), config.late, rng)
            else:
                path = self._crossing_path(
                    first_direction + 2 * np.pi * (slots[i] + rng.uniform(-0.2, 0.2)) / count, rng
                )
            hue = first_hue + (i + rng.uniform(-0.15, 0.15)) / count
            objects.append(_make_object(kind, outline, radius, path, hue, rng))
        return objects

    def _crossing_path(self, direction: float, rng: np.random.Generator) -> tuple[_Wave, _Wave]:
        """From one side of the frame to the other in about 16 annotated frames, on a thin ellipse."""
        extent = np.array([self.width, self.height])
        along = np.array([np.cos(direction), np.sin(direction)]) * extent
        across = np.array([-np.sin(direction), np.cos(direction)]) * extent
        middle = extent * (0.5 + rng.uniform(-0.12, 0.12, 2))
        swing = _Wave(middle, along * rng.uniform(0.26, 0.34), rng.uniform(24, 40), np.pi / 2 + rng.uniform(-0.7, 0.7))
        sway = _Wave(np.zeros(2), across * rng.uniform(-0.12, 0.12), rng.uniform(16, 32), rng.uniform(0, 2 * np.pi))
        return swing, sway

    def _leaving_path(self, reach: float, late: float, rng: np.random.Generator) -> tuple[_Wave, _Wave]:
        """To and fro over one edge of the frame, out of sight at the outer end; `reach`: radius in pixels."""
        extent = np.array([self.width, self.height], np.float64)
        axis, side = int(rng.integers(2)), int(rng.integers(2))
        outward = np.zeros(2)
        outward[axis] = 1 if side else -1
        middle = extent * rng.uniform(0.3, 0.7, 2)
        middle[axis] = extent[axis] * (0.88 if side else 0.12)
        # the way to the edge, the deformed object's own size, and a margin for the camera
        beyond = 0.12 * extent[axis] + 1.3 * reach + 0.08 * extent[axis]
        # sin is 1 outside and -1 inside: late objects start outside, the others at the edge on their way out
        phase = np.pi / 2 if rng.random() < late else rng.uniform(-0.6, -0.1)
        swing = _Wave(middle, outward * beyond, rng.uniform(22, 30), phase)
        along = extent * rng.uniform(0.08, 0.18) * (1 - np.abs(outward))
        sway = _Wave(np.zeros(2), along, rng.uniform(16, 32), rng.uniform(0, 2 * np.pi))
        return swing, sway


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _make_object(
    kind: str, outline: np.ndarray, radius: float, path: tuple[_Wave, _Wave], hue: float, rng: np.random.Generator
) -> _Object:
    """Give a shape its surface, rotation and deformation."""
    reach = _TEXTURE_REACH * float(np.abs(outline).max())
    return _Object(
        kind=kind,
        outline=outline,
        radius=radius,
        texture=object_texture(rng, 2 * int(np.ceil(reach * radius)), hue),
        reach=reach,
        path=path,
        angle=rng.uniform(0, 2 * np.pi),
        spin=np.radians(rng.uniform(0.5, 6.0)) * rng.choice([-1, 1]),
        breathing=_Wave(1.0, rng.uniform(0.03, 0.12), rng.uniform(10, 24), rng.uniform(0, 2 * np.pi)),
        bend=_Wave(
            np.zeros(3), rng.uniform(0.02, [0.12, 0.08, 0.05]), rng.uniform(8, 20, 3), rng.uniform(0, 2 * np.pi, 3)
        ),
        bend_phase=rng.uniform(0, 2 * np.pi, 3),
    )


def _outline(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Closed outline around the origin that encloses an area of 1, [P, 2]."""
    theta = np.linspace(0, 2 * np.pi, _CONTOUR_POINTS, endpoint=False)
    if kind == "ellipse":
        aspect = rng.uniform(1.0, 1.8)
        points = np.stack([np.cos(theta) * aspect, np.sin(theta)], axis=1)
    elif kind == "polygon":
        corners = int(rng.integers(3, 7))
        angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.15, 0.15, corners)) / corners
        vertices = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.85, 1.15, (corners, 1))
        closed = np.vstack([vertices, vertices[:1]])
        position = np.linspace(0, corners, _CONTOUR_POINTS, endpoint=False)
        points = np.stack([np.interp(position, np.arange(corners + 1), closed[:, k]) for k in range(2)], axis=1)
    else:
        lobes = np.arange(2, 6)
        strength = rng.uniform(0.0, 0.22, 4) / (lobes - 1) ** 0.5
        radius = 1 + np.sin(theta[:, None] * lobes + rng.uniform(0, 2 * np.pi, 4)) @ strength
        points = np.stack([np.cos(theta), np.sin(theta)], axis=1) * radius[:, None]
    x, y = points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return points / np.sqrt(area)
