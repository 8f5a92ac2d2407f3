"""Exchange of state dicts with the official SAM 2 code: names, order, files.

Inside, two things differ: timm's trunk calls the two layers of its MLPs fc1 and fc2 and registers the projection of a
shortcut first; and parameters that SAM 2 itself holds are modules here, with a `weight`. Official files hold
{"model": state_dict}.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import UserError
from .architecture import SIZES, Architecture, architecture

Component = Literal["encoder", "prompt_encoder", "mask_decoder", "memory"]
FILES: dict[str, tuple[Component, ...]] = {
    "encoder": ("encoder",),
    "decoder": ("prompt_encoder", "mask_decoder"),
    "memory": ("memory",),
}
"""Files of a split checkpoint and the components each holds."""

_TRUNK = "image_encoder.trunk."
_BLOCK = re.compile(re.escape(_TRUNK) + r"blocks\.(\d+)\.")

_BARE_NAMES = ("maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial")
"""Parameters that official state dicts hold under a bare name."""
_BARE = {f"{name}.weight" for name in _BARE_NAMES}
_ORDER = (
    *_BARE_NAMES,
    f"{_TRUNK}pos_embed",
    f"{_TRUNK}patch_embed.",
    f"{_TRUNK}blocks.",
    "image_encoder.neck.",
    "mask_downsample.",
    "memory_attention.",
    "memory_encoder.",
    "sam_prompt_encoder.pe_layer.",
    "sam_prompt_encoder.",
    "sam_mask_decoder.",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
)
"""Name prefixes in the order of official state dicts."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says which file, what is wrong and the remedy."""


def official_name(name: str) -> str:
    """Official name of a parameter or buffer of `SAM2`."""
    if name.startswith(_TRUNK):
        return name.replace(".mlp.fc1.", ".mlp.layers.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
    return name.removesuffix(".weight") if name in _BARE else name


def internal_name(name: str) -> str:
    """Name in `SAM2` of an official parameter or buffer."""
    if name.startswith(_TRUNK):
        return name.replace(".mlp.layers.0.", ".mlp.fc1.").replace(".mlp.layers.1.", ".mlp.fc2.")
    return f"{name}.weight" if f"{name}.weight" in _BARE else name


def named_official_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Official names and parameters of a `SAM2`, in its own order."""
    for name, parameter in model.named_parameters():
        yield official_name(name), parameter


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `SAM2` under official names, in the official order (whatever the order of the parts in `state`)."""
    renamed = {official_name(name): value for name, value in state.items()}
    return dict(sorted(renamed.items(), key=lambda item: _position(item[0])))


def _position(name: str) -> tuple[int, int, bool]:
    """Sort key of official names; what it leaves equal is in the right order within each module."""
    part = next((rank for rank, prefix in enumerate(_ORDER) if name.startswith(prefix)), len(_ORDER))
    block = _BLOCK.match(name)
    return part, int(block.group(1)) if block else -1, bool(block) and name.startswith(f"{block.group()}proj.")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official state dict under the names of `SAM2`."""
    return {internal_name(name): value for name, value in state.items()}


def component_of(name: str) -> Component:
    """The part of the model that an official parameter or buffer belongs to."""
    if name.startswith("image_encoder."):
        return "encoder"
    if name.startswith("sam_prompt_encoder."):
        return "prompt_encoder"
    if name.startswith("sam_mask_decoder."):
        return "mask_decoder"
    return "memory"


def parameter_layers(model: nn.Module) -> dict[str, int]:
    """Layer of every parameter (official names) for layer-wise learning rate decay.

    Patch and position embeddings of the trunk are layer 0, its block i is layer i + 1, and all that is not in the trunk
    is one layer above the last block: not decayed.
    """
    names = [name for name, _ in named_official_parameters(model)]
    blocks = [int(match.group(1)) for name in names if (match := _BLOCK.match(name))]
    top = max(blocks) + 2

    def layer(name: str) -> int:
        match = _BLOCK.match(name)
        if match:
            return int(match.group(1)) + 1
        return 0 if name.startswith(_TRUNK) else top

    return {name: layer(name) for name in names}


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Official state dict of a checkpoint file {"model": state_dict}; other entries are ignored.

    Raises:
        CheckpointError: no such file, not a complete checkpoint, code in it (which is not executed), or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pt file such as sam2.1_hiera_tiny.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise CheckpointError(_explain_unreadable(path, error)) from None
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no 'model' state dict (found {found}); SAM 2 checkpoints are {{'model': state_dict}}"
        )
    return dict(state)


def _explain_unreadable(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        plain_pickle = file.read(1) == pickle.PROTO  # files of torch.save are zip archives, or pickles of tensors alone
    if isinstance(error, pickle.UnpicklingError) and (plain_pickle or "GLOBAL" in str(error)):
        return (
            f"{path} is a pickle that asks to run code or holds objects that are not tensors; refused, nothing in it "
            "was executed. If you trust its source, save it again as {'model': state_dict}"
        )
    return (
        f"{path} ({path.stat().st_size} bytes) is not a complete PyTorch checkpoint: truncated, or of another kind."
        " Download or copy it again and compare its size"
    )


def describe(state: Mapping[str, Tensor]) -> str | None:
    """Which SAM 2 an official state dict looks like, for messages: "SAM 2.1 small"; None where it has no trunk."""
    patch = state.get(f"{_TRUNK}patch_embed.proj.weight")
    depth = 1 + max((int(match.group(1)) for name in state if (match := _BLOCK.match(name))), default=-1)
    if patch is None or depth == 0:
        return None
    version = "2.1" if "no_obj_embed_spatial" in state else "2.0"
    for size in SIZES:
        arch = architecture(size)
        if (arch.embed_dim, sum(arch.stages)) == (patch.shape[0], depth):
            return f"SAM {version} {size}"
    return f"SAM {version} of unknown size (width {patch.shape[0]}, {depth} trunk blocks)"


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Load an official checkpoint into a `SAM2`; every tensor must be there, with its shape, and no other.

    Raises:
        CheckpointError: an unreadable file (see `read_state`), or one of another size or version.
    """
    state = read_state(path)
    check_state(state, to_official(model.state_dict()), model.arch, path)
    model.load_state_dict(from_official(state))


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], arch: Architecture, path: Any) -> None:
    """Insist that `state`, read from `path`, has the names and shapes of `wanted`, an official state dict of `arch`.

    Raises:
        CheckpointError: it has not; the message names the kind of model where that is what differs.
    """
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    shapes = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if not (missing or extra or shapes):
        return
    details = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if names
    ]
    found, expected = describe(state), f"SAM {arch.version} {arch.size}"
    if found is None or found == expected:
        problem = f"does not fit {expected}"
        remedy = "The file is damaged, a part of a model (such as encoder.pt), or of another or a modified model"
    else:
        problem = f"looks like {found}, but the model is {expected}"
        remedy = "Set model.size and model.version to those of the file"
    raise CheckpointError(f"{path} {problem}: tensors {', '.join(details)}. {remedy}")


def save_checkpoint(model_or_state: nn.Module | Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write an official checkpoint, through a temporary file, so that `path` is never incomplete."""
    _write({"model": _portable(model_or_state)}, Path(path))


def _portable(model_or_state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official state dict of plain tensors in main memory, each with its own storage."""
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in to_official(state).items()}


def _write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    torch.save(content, partial)
    partial.replace(path)


def split_checkpoint(
    source: nn.Module | Mapping[str, Tensor] | str | os.PathLike, folder: str | os.PathLike
) -> dict[str, Path]:
    """Write encoder.pt, decoder.pt and memory.pt, in parallel, from a model, a state dict or an official checkpoint.

    Each file is {"model": part of the official state dict}. Returns the paths by name of the part.
    """
    state = read_state(source) if isinstance(source, (str, os.PathLike)) else _portable(source)
    paths = {part: Path(folder) / f"{part}.pt" for part in FILES}

    def write(part: str) -> None:
        content = {name: value for name, value in state.items() if component_of(name) in FILES[part]}
        _write({"model": content}, paths[part])

    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(write, paths))
    return paths


def load_components(model: nn.Module, folder: str | os.PathLike, parts: Iterable[str] = tuple(FILES)) -> None:
    """Load parts of a split checkpoint (encoder, decoder, memory), read in parallel; the rest of the model stays.

    Raises:
        CheckpointError: an unknown part, an unreadable file, or one of another size or version.
    """
    parts = tuple(parts)
    unknown = [part for part in parts if part not in FILES]
    if unknown:
        raise CheckpointError(f"unknown checkpoint part {unknown[0]!r}; choose from {', '.join(FILES)}")
    paths = [Path(folder) / f"{part}.pt" for part in parts]
    with ThreadPoolExecutor(max(1, len(paths))) as pool:
        states = list(pool.map(read_state, paths))
    wanted = to_official(model.state_dict())
    for part, path, state in zip(parts, paths, states, strict=True):
        own = {name: value for name, value in wanted.items() if component_of(name) in FILES[part]}
        check_state(state, own, model.arch, path)
    for state in states:
        model.load_state_dict(from_official(state), strict=False)
