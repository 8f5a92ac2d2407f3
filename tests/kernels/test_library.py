"""Choice of the back end, and the package without its compiled operators."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from sam2fast_kernels import library
from sam2fast_kernels.rle import decode
from sam2fast_kernels.rle.op import rle_decode


@pytest.fixture
def not_compiled(monkeypatch):
    """The state of an installation without a compiler."""
    monkeypatch.delitem(rle_decode.overloads, "cpp", raising=False)
    library._warn_once.cache_clear()
    yield
    library._warn_once.cache_clear()


def test_auto_falls_back_and_says_so_once(not_compiled):
    with pytest.warns(UserWarning, match="about ten times slower.*install cmake and a C.*compiler") as caught:
        assert decode([[4]], (2, 2)).shape == (1, 2, 2)
        decode([[4]], (2, 2))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_reference_is_no_fallback(not_compiled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode([[4]], (2, 2), backend="reference")


def test_cpp_where_it_was_not_built_is_refused(not_compiled):
    with pytest.raises(ValueError, match="'cpp' of sam2fast::rle_decode was not built; install cmake"):
        decode([[4]], (2, 2), backend="cpp")


def test_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="unknown back end 'gpu'.*auto, reference, cpp, triton"):
        decode([[4]], (2, 2), backend="gpu")


def test_import_needs_torch_only():
    """Nothing outside torch and what torch itself imports."""
    program = (
        "import sys, torch; before = set(sys.modules); import sam2fast_kernels; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sam2fast_kernels"]


def test_compiled_library_that_does_not_load_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "NATIVE_LIBRARY", broken)
    library.load_native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="do not load: .*; install cmake"):
            assert library.load_native() is False
    finally:
        library.load_native.cache_clear()


def test_poison_reaches_what_an_operator_allocates(poison_empty):
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all() and torch.empty(3, dtype=torch.bool).all()


FORKED = """
import torch
from sam2fast_kernels.rle import decode

class Masks(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, n):
        return decode([[4]] * 8, (2, 2)).sum()

torch.set_num_threads(2)
assert Masks()[0] == 0
loader = torch.utils.data.DataLoader(Masks(), num_workers=1, multiprocessing_context="fork")
print(len(list(loader)))
"""


@pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
def test_forked_data_loader_worker_does_not_hang():
    """A parent that has started OpenMP threads forks a worker, which decodes too."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2"], done.stderr
