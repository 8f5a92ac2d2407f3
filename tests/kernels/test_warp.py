"""Affine maps of images and masks: equal between back ends, right where the answer is known, never out of bounds."""

from __future__ import annotations

import math

import pytest
import torch

from sam2fast_kernels import library
from sam2fast_kernels.warp import warp_image, warp_masks
from sam2fast_kernels.warp.op import image_warp, mask_warp

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
SIZES = [(1, 1), (1, 9), (7, 1), (2, 3), (23, 40), (61, 131), (300, 200)]
FILL = torch.tensor([9, 8, 7], dtype=torch.uint8)
PLAIN = torch.eye(3, 4)


def affine(angle: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cos, sin, shift[0]], [-sin, cos, shift[1]]], dtype=torch.float64)


def maps(height: int, width: int) -> list[torch.Tensor]:
    """Inside, across each border, mirrored, far outside, and degenerate."""
    return [
        affine(0.3, width / 70, (0.1 * width, 0.2 * height)),
        affine(-2.5, 1.7, (0.8 * width, 0.7 * height)),
        affine(0.0, 0.45, (0.0, 0.0)),
        torch.tensor([[-0.5, 0, width - 0.75], [0, 0.25, -0.375]], dtype=torch.float64),
        affine(1.0, 3.0, (-500.0, 1e7)),
        torch.tensor([[0, 0, width / 2], [0, 0, height / 3]], dtype=torch.float64),
    ]


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


def image_of(image, matrix, color=PLAIN, shape=(53, 67), backend="auto"):
    out = torch.full((3, *shape), 255, dtype=torch.uint8)
    warp_image(out, image, matrix, color, FILL, backend=backend)
    return out


def masks_of(codes, matrix, count=8, shape=(53, 67), backend="auto"):
    out = torch.ones((count, *shape), dtype=torch.bool)
    warp_masks(out, codes, matrix, backend=backend)
    return out


@needs_cpp
@pytest.mark.parametrize("size", SIZES)
def test_back_ends_agree_on_images(size):
    color = torch.tensor([[1.2, 0.1, -0.1, 4.0], [0.0, 0.7, 0.0, 30.0], [-0.5, 0.5, 1.5, -20.0]])
    differences = []
    for matrix in maps(*size):
        for shape in ((53, 67), (1, 1), (5, 300)):
            ours, want = (image_of(picture(*size), matrix, color, shape, backend) for backend in ("cpp", "reference"))
            differences.append((ours.int() - want.int()).abs().flatten())
    assert torch.cat(differences).max() <= 1 and torch.cat(differences).float().mean() < 0.01


@needs_cpp
@pytest.mark.parametrize("size", SIZES)
def test_back_ends_agree_on_masks(size):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    blocks = torch.zeros(size, dtype=torch.uint8)
    blocks[size[0] // 3 : size[0] // 3 + 9, size[1] // 2 :] = 5
    for codes in (noise, blocks, torch.full(size, 255, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)):
        for matrix in maps(*size):
            for count in (0, 1, 8):
                ours, want = (masks_of(codes, matrix, count, backend=backend) for backend in ("cpp", "reference"))
                assert (ours != want).float().sum() <= 3e-3 * ours.numel()


@needs_cpp
@pytest.mark.parametrize("matrix", [affine(0.0, 0.47, (3.3, 2.6)), affine(0.35, 0.6, (-40.0, 150.0))])
def test_back_ends_agree_on_a_video_frame(matrix):
    """At three times what README.md says they differ by."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 4, 120, 214, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (480, 854), mode="bicubic")[0].clamp(0, 1)
    image, codes = (255 * smooth[:3]).byte().permute(1, 2, 0).contiguous(), (smooth[3] > 0.5).byte()
    color = torch.tensor([[1.1, 0.02, 0.0, -3.0], [0.0, 0.95, 0.03, 4.5], [0.01, 0.0, 1.05, 1.2]])
    ours, want = (image_of(image, matrix, color, (1024, 1024), backend).int() for backend in ("cpp", "reference"))
    assert (ours - want).abs().max() <= 1 and (ours != want).float().mean() <= 12e-4
    ours, want = (masks_of(codes, matrix, 1, (1024, 1024), backend) for backend in ("cpp", "reference"))
    assert (ours != want).sum() <= 3 and ours.float().mean() > 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_shifts_copy_pixels(backend):
    image = picture(20, 30)
    out = image_of(image, affine(0.0, 1.0, (4.0, -3.0)), backend=backend)
    assert torch.equal(out[:, 3:23, :26], image[:, 4:].permute(2, 0, 1))
    assert (out[:, :3] == FILL[:, None, None]).all() and (out[:, :, 26:] == FILL[:, None, None]).all()
    mirrored = torch.tensor([[-1.0, 0, 29], [0, 1, 0]], dtype=torch.float64)
    assert torch.equal(image_of(image, mirrored, shape=(20, 30), backend=backend), image.flip(1).permute(2, 0, 1))
    codes = image[..., 0].contiguous()
    moved = masks_of(codes, mirrored, shape=(20, 30), backend=backend)
    assert torch.equal(moved, torch.stack([codes.flip(1) >> bit & 1 for bit in range(8)]).bool())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_rounded_images_of_zero_and_one(backend):
    yy, xx = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    mask = ((yy - 18) ** 2 + (xx - 30) ** 2 < 90) | (yy + xx < 12)
    for matrix in maps(40, 50)[:4]:
        seen = image_of((255 * mask.byte())[..., None].expand(-1, -1, 3).contiguous(), matrix, backend=backend)
        moved = masks_of(mask.byte() << 3, matrix, backend=backend)
        assert ((seen[0] > 127) == moved[3])[seen[0] != FILL[0]].float().mean() > 0.998
        assert moved[[0, 1, 2, 4, 5, 6, 7]].sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_crop_are_read_in_place(backend):
    image, matrix = picture(40, 50), affine(0.2, 0.4, (2.0, 3.0))
    crop = image[5:30, 10:35]
    assert torch.equal(image_of(crop, matrix, backend=backend), image_of(crop.contiguous(), matrix, backend=backend))
    codes = image[..., 0].contiguous()[5:30, 10:35]
    assert torch.equal(masks_of(codes, matrix, backend=backend), masks_of(codes.contiguous(), matrix, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_colors_are_clipped_and_rounded_once(backend):
    image, matrix = picture(20, 30), affine(0.0, 0.5, (0.0, 0.0))
    assert image_of(image, matrix, 9 * PLAIN, (20, 30), backend).max() == 255
    assert image_of(image, matrix, -PLAIN, (20, 30), backend).max() == 0
    gray = torch.tensor([0.299, 0.587, 0.114, 0.0]).expand(3, 4).contiguous()
    out = image_of(image, matrix, gray, (20, 30), backend)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    exact = image.double() @ gray[0, :3].double()
    assert (out[0, ::2, ::2] - exact[:10, :15]).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(4, 5, 4, dtype=torch.uint8)}, "image must be torch.uint8"),
        ({"image": torch.zeros(0, 5, 3, dtype=torch.uint8)}, "image must not be empty"),
        ({"image": torch.zeros(1, 2**23, 3, dtype=torch.uint8)}, "at most 8388607 pixels a side, it is .*8388608"),
        ({"matrix": torch.zeros(2, 3)}, "matrix must be torch.float64"),
        ({"color": torch.zeros(3, 3)}, "color must be torch.float32 \\[3, 4\\]"),
        ({"out": torch.zeros(1, 4, 4, dtype=torch.uint8)}, "out must be torch.uint8"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "out": torch.zeros(3, 4, 4, dtype=torch.uint8),
        "image": picture(4, 5),
        "matrix": affine(0.0, 1.0, (0.0, 0.0)),
        "color": PLAIN,
        "fill": FILL,
    }
    with pytest.raises(ValueError, match=message):
        warp_image(**arguments | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_side_is_read_to_its_end(backend):
    image = torch.zeros(1, 2**23 - 1, 3, dtype=torch.uint8)
    image[0, -1] = 200
    out = torch.zeros(3, 1, 4, dtype=torch.uint8)
    warp_image(out, image, affine(0.0, 1.0, (2.0**23 - 5, 0.0)), PLAIN, torch.zeros(3, dtype=torch.uint8), backend)
    assert out[0, 0].tolist() == [0, 0, 0, 200]


@needs_cpp
def test_sides_beyond_the_longest_are_refused_with_their_size():
    """Also by the operators, where nothing has checked their arguments before."""
    image = torch.zeros(1, 2**23, 3, dtype=torch.uint8)
    out, matrix = torch.zeros(3, 1, 4, dtype=torch.uint8), affine(0.0, 1.0, (0.0, 0.0))
    with pytest.raises(RuntimeError, match="2\\^23 - 1 pixels a side .* it has 1 x 8388608"):
        image_warp.overloads["cpp"](out, image, matrix, PLAIN, FILL)
    codes, masks = image[..., 0].contiguous().reshape(-1, 1), torch.zeros(1, 1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="2\\^23 - 1 pixels a side .* it has 8388608 x 1"):
        mask_warp.overloads["cpp"](masks, codes, matrix)
    with pytest.raises(ValueError, match="codes may have at most 8388607 pixels a side"):
        warp_masks(masks, codes, matrix)


def test_too_many_masks_are_refused():
    out, codes = torch.zeros(9, 4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at most 8 masks"):
        warp_masks(out, codes, affine(0.0, 1.0, (0.0, 0.0)))


@needs_cpp
def test_a_matrix_that_is_not_finite_is_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="finite"):
            image_of(picture(4, 5), affine(0.0, 1.0, (value, 0.0)), backend="cpp")


@pytest.mark.parametrize("backend", list(image_warp.overloads))
def test_operators_keep_the_rules_of_torch(backend):
    matrix = affine(0.2, 0.4, (2.0, 3.0))
    out, masks = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(2, 9, 9, dtype=torch.bool)
    torch.library.opcheck(image_warp.overloads[backend], (out, picture(8, 9), matrix, PLAIN, FILL))
    torch.library.opcheck(mask_warp.overloads[backend], (masks, picture(8, 9)[..., 0].contiguous(), matrix))
