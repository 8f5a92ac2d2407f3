"""Memory of an image step at full size, computed from the shapes of its tensors, on any machine and without its memory.

    python benchmarks/estimate_memory.py --size base_plus --side 1024 --objects 64

runs the step of the case image_step (forward and backward, bfloat16 autocast) on fake tensors and follows which
storages are alive. Counted: activations, gradients, results. Not counted: parameters, inputs, optimizer state, scratch
inside an operator, fragmentation. The last line is JSON. These are computed figures: none of them is a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref

import torch
from cases.image_step import SWITCHES, image_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam2fast.data.sample import Batch
from sam2fast.models.architecture import architecture
from sam2fast.models.sam2 import SAM2


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def to_fake(model: SAM2, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(mode.from_tensor(parameter.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer))


def estimate(size: str, side: int, objects: int, provider: str) -> dict[str, object]:
    """Bytes that are alive after the forward pass, and at the peak of the step."""
    fused, recompute = SWITCHES[provider]
    mode = FakeTensorMode()
    model = SAM2(architecture(size, image_size=side, drop_path=0.0, memory_dropout=0.0)).train()
    to_fake(model, mode)
    with mode:
        frames = torch.empty(1, 1, 3, side, side, dtype=torch.uint8)
        masks = torch.empty(1, objects, side, side, dtype=torch.bool)
        batch = Batch(frames, masks, torch.zeros(objects, dtype=torch.long), ["fake"])
        with LiveBytes() as live:
            total = image_step(model, batch, fused, recompute)
            forward = live.now
            total.backward()
    return {"provider": provider, "forward_bytes": forward, "peak_bytes": live.peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small", "base_plus", "large"), default="base_plus")
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels; a multiple of 32")
    parser.add_argument("--objects", type=int, default=64)
    args = parser.parse_args()
    if args.side < 32 or args.side % 32 or args.objects < 1:
        parser.error(f"--side must be a multiple of 32 and --objects at least 1, not {args.side} and {args.objects}")
    rows = [estimate(args.size, args.side, args.objects, provider) for provider in SWITCHES]
    print(f"{args.size}, {args.side} px, {args.objects} objects, a click and 7 corrections (computed, not measured)")
    print(f"{'provider':>10} {'after forward':>14} {'peak':>9} {'ratio':>6}")
    for row in rows:
        row["memory_ratio"] = rows[0]["peak_bytes"] / row["peak_bytes"]
        forward, peak = row["forward_bytes"] / 1e9, row["peak_bytes"] / 1e9
        print(f"{row['provider']:>10} {forward:11.2f} GB {peak:6.2f} GB {row['memory_ratio']:6.2f}")
    print(json.dumps({"case": "estimate_memory", "computed": True, **vars(args), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
