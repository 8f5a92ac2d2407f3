"""Fixtures and markers of all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Operations of small models are too short to share between threads: with two on two busy cores they take ten times as
# long. `make test` runs two processes instead. Those that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

import sam2fast.compat  # noqa: F401  (before any test imports torchvision, timm or transformers)

REPOSITORY = Path(__file__).resolve().parent.parent


LONGEST_FIRST = ("train", "benchmarks", "parallel")
"""Folders whose files take minutes: of two processes none must start one of them when the other is done."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONGEST_FIRST)
    if "exhaustive" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "exhaustive" in item.keywords])
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: SAM2FAST_TEST_DATA, or shared/data beside the checkout. Skips where there is none."""
    folder = Path(os.environ.get("SAM2FAST_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set SAM2FAST_TEST_DATA to a folder that has it")
    return folder


@pytest.fixture
def poison_empty():
    """Uninitialized memory of torch.empty and its like holds NaN (floats) or the largest value (integers, bool)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
