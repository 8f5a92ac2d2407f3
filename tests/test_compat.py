"""timm and torchvision import beside a CPU torch, and a working torchvision is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sam2fast import compat


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_timm_imports_after_compat():
    done = run(
        "import sam2fast.compat, sys; before = 'torchvision' in sys.modules; import timm; "
        "print(before, 'torchvision' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_declared_only_where_torchvision_alone_fails():
    alone = run("import torchvision")
    helped = run("from sam2fast.compat import _LIBRARY; print(_LIBRARY is not None)")
    assert helped.stdout.split() == [str("torchvision::nms does not exist" in alone.stderr)], helped.stderr


@pytest.mark.parametrize("case", ["cuda torch", "torchvision loads", "no torchvision", "already imported"])
def test_nothing_is_declared_elsewhere(case, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if case == "cuda torch" else None)
    monkeypatch.setattr(compat, "_compiled_operators_load", lambda: case == "torchvision loads")
    if case == "no torchvision":
        monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    if case == "already imported":
        monkeypatch.setitem(sys.modules, "torchvision", torch)
    assert compat._declare_missing_schemas() is None
