"""Position encodings, above all on grids that are not square (square ones are compared with the official code's)."""

from __future__ import annotations

import math

import pytest
import torch

from sam2fast.models.position import (
    FourierEncoding,
    TableCache,
    apply_rotary,
    rotary_tables,
    sine_encoding_1d,
    sine_encoding_2d,
)

DIM = 32


def rotate(vector: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """One token rotated with complex numbers, in double precision."""
    quarter = len(vector) // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) * 4 / len(vector))
    angles = torch.cat([x * frequencies, y * frequencies])
    pairs = torch.view_as_complex(vector.double().view(-1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (1, 7)])
def test_rotary_embedding_of_any_grid_is_complex_rotation(height, width):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 2 * height * width, DIM)
    out = apply_rotary(x, *rotary_tables(DIM, height, width))
    for grid in range(2):
        for row in range(height):
            for column in range(width):
                token = grid * height * width + row * width + column
                want = rotate(x[1, 0, token], column, row)
                torch.testing.assert_close(out[1, 0, token].double(), want, atol=1e-5, rtol=0)


def test_rotated_products_depend_on_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(DIM), torch.randn(DIM)
    tables = rotary_tables(DIM, 6, 8)
    queries = apply_rotary(query.expand(48, DIM), *tables).view(6, 8, DIM)
    keys = apply_rotary(key.expand(48, DIM), *tables).view(6, 8, DIM)
    near = queries[1, 2] @ keys[3, 5]
    torch.testing.assert_close(queries[3, 4] @ keys[5, 7], near, atol=1e-4, rtol=0)
    assert (queries[1, 2] @ keys[4, 5] - near).abs() > 1e-2


def test_rotary_embedding_computes_in_float32_and_keeps_the_dtype():
    x = torch.randn(1, 1, 12, DIM).bfloat16()
    tables = rotary_tables(DIM, 3, 4)
    out = apply_rotary(x, *tables)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), *tables).bfloat16())


def test_sine_encoding_2d_of_a_wide_grid():
    encoding = sine_encoding_2d(8, 2, 5)
    assert encoding.shape == (8, 2, 5)
    assert torch.equal(encoding[:4, :, :1].expand(4, 2, 5), encoding[:4])  # y
    assert torch.equal(encoding[4:, :1].expand(4, 2, 5), encoding[4:])  # x
    position = 3 / 5 * 2 * math.pi
    want = [math.sin(position), math.cos(position), math.sin(position / 100), math.cos(position / 100)]
    torch.testing.assert_close(encoding[4:, 0, 2], torch.tensor(want), atol=1e-5, rtol=0)


def test_sine_encoding_1d():
    encoding = sine_encoding_1d(torch.tensor([0, -3]), 8)
    assert encoding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    want = [f(-3 / wavelength) for f in (math.sin, math.cos) for wavelength in (1, 1, 100, 100)]
    torch.testing.assert_close(encoding[1], torch.tensor(want), atol=1e-6, rtol=0)


def test_fourier_grid_encodes_the_centers_of_its_cells():
    encoding = FourierEncoding(DIM)
    grid = encoding.grid(3, 6)
    assert grid.shape == (DIM, 3, 6)
    center = torch.tensor([[4.5 / 6, 1.5 / 3]])  # x, y of row 1, column 4
    torch.testing.assert_close(grid[:, 1, 4], encoding(center)[0])


def test_fourier_encoding_is_not_rounded_by_autocast():
    encoding, points = FourierEncoding(DIM), torch.rand(5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoding(points), encoding(points.clone()))
        inside = encoding(points)
    assert torch.equal(inside, encoding(points))


def test_table_cache_builds_once_and_stays_small():
    cache, built = TableCache(max_entries=2), []

    def get(key):
        return cache.get(key, lambda: (built.append(key), (torch.zeros(1),))[1])

    assert get(1)[0] is get(1)[0]
    assert built == [1]
    for key in (2, 3, 4):
        get(key)
    assert len(cache._entries) <= 2


def test_table_cache_does_not_keep_fake_tensors():
    from torch._subclasses import FakeTensorMode

    cache = TableCache()
    with FakeTensorMode():
        cache.get("table", lambda: (torch.ones(2),))
    (table,) = cache.get("table", lambda: (torch.ones(2),))
    assert type(table) is torch.Tensor


def test_table_cache_filled_in_inference_mode_serves_training():
    cache = TableCache()
    with torch.inference_mode():
        cache.get("table", lambda: (torch.ones(2),))
    weight = torch.ones(2, requires_grad=True)
    (weight * cache.get("table", lambda: (torch.ones(2),))[0]).sum().backward()
