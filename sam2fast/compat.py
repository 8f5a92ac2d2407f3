"""Makes `import timm` work where a CPU build of torch meets the CUDA build of torchvision.

A package index may serve a CPU torch but only a CUDA torchvision, whose compiled operators cannot load without
libtorch_cuda. Its Python code registers shape functions for `torchvision::nms` all the same, so `import torchvision`
(and with it timm and transformers) stops with "operator torchvision::nms does not exist". Declaring the schemas of the
operators it asks for is enough: nothing here calls them. Importing this module before timm does so where it is needed,
and nothing anywhere else.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_operators_load() -> bool:
    """Load torchvision's own operators the way torchvision does; False where its binary does not fit this torch."""
    spec = importlib.util.find_spec("torchvision")
    binaries = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("_C*.*")]
    for binary in binaries:
        try:
            torch.ops.load_library(str(binary))
        except (ImportError, OSError):
            continue
        return True
    return False


def _declare_missing_schemas() -> torch.library.Library | None:
    """Declare what is missing; the returned library owns the declarations and must stay alive."""
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return None
    if importlib.util.find_spec("torchvision") is None or _compiled_operators_load():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    return library


_LIBRARY = _declare_missing_schemas()
