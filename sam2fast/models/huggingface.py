"""Export of weights in the layout of Hugging Face transformers (`Sam2VideoModel`): names, config.json, safetensors.

Not needed are transformers; safetensors is, when a file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from .architecture import Architecture

_RENAMES = [
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^sam_mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^sam_mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv", ".pointwise_conv"),
    (r"(fuser\.layers\.\d)\.gamma$", r"\1.scale"),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.norm(\d?)\.", r".layer_norm\1."),
    (r"\.out_proj\.", ".o_proj."),
]
"""Patterns of official names, applied one after the other."""
_MASK_LAYER = re.compile(r"^memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(\w+)$")
_POINT = re.compile(r"^sam_prompt_encoder\.point_embeddings\.\d\.weight$")
_FOURIER = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under the names, and in the shapes, of `Sam2VideoModel`."""
    renamed = {_renamed(name): value for name, value in state.items() if not _POINT.match(name) and name != _FOURIER}
    points = [value for name, value in sorted(state.items()) if _POINT.match(name)]
    renamed["prompt_encoder.point_embed.weight"] = torch.cat(points)
    for part in ("shared_image_embedding", "prompt_encoder.shared_embedding"):  # the same matrix twice
        renamed[f"{part}.positional_embedding"] = state[_FOURIER].clone()
    return renamed


def _renamed(name: str) -> str:
    if (match := _MASK_LAYER.match(name)) and int(match[1]) < 12:  # four times convolution, norm, activation
        layer, kind = divmod(int(match[1]), 3)
        return f"memory_encoder.mask_downsampler.layers.{layer}.{('conv', 'layer_norm')[kind]}.{match[2]}"
    name = _with_named_layers(name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _with_named_layers(name: str) -> str:
    """Layers 0, 1, 2 of an MLP are proj_in, layers.0 and proj_out; of two, 1 is proj_out."""
    if ".mlp.layers." in name:
        names = ("proj_in", "proj_out")
    elif "hypernetworks" in name or "_head." in name or name.startswith("obj_ptr_proj."):
        names = ("proj_in", "layers.0", "proj_out")
    else:
        return name
    return re.sub(r"\.layers\.(\d)(\.\w+)$", lambda match: f".{names[int(match[1])]}{match[2]}", name)


def huggingface_config(arch: Architecture) -> dict[str, Any]:
    """What config.json of `Sam2VideoModel` must say of a model; the rest is as its defaults."""
    grids = [[arch.image_size // stride] * 2 for stride in (4, 8, 16)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "image_size": [arch.image_size] * 2,
        "hidden_size": arch.embed_dim,
        "num_attention_heads": arch.num_heads,
        "blocks_per_stage": list(arch.stages),
        "embed_dim_per_stage": list(arch.channels),
        "num_attention_heads_per_stage": [arch.num_heads * 2**i for i in range(4)],
        "window_size_per_stage": list(arch.window_sizes),
        "window_positional_embedding_background_size": list(arch.position_size),
        "global_attention_blocks": list(arch.global_attention_blocks),
    }
    return {
        "model_type": "sam2_video",
        "architectures": ["Sam2VideoModel"],
        "dtype": "float32",
        "image_size": arch.image_size,
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": list(reversed(arch.channels)),
            "backbone_feature_sizes": grids,
        },
        "prompt_encoder_config": {"model_type": "sam2_video_prompt_encoder", "image_size": arch.image_size},
        "mask_decoder_config": {"model_type": "sam2_video_mask_decoder"},
        "memory_attention_rope_feat_sizes": grids[-1],
        "num_maskmem": arch.num_memories,
        "max_object_pointers_in_encoder": arch.max_pointers,
        "multimask_output_for_tracking": arch.multimask_tracking,
        "enable_occlusion_spatial_embedding": arch.no_object_embed_spatial,
        "enable_temporal_pos_encoding_for_object_pointers": arch.pointer_time_encoding,
    }


def save_huggingface(state: Mapping[str, Tensor], arch: Architecture, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`, for `Sam2VideoModel.from_pretrained(folder)`.

    Args:
        state: official state dict.

    Raises:
        ConfigError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ConfigError("the Hugging Face layout needs safetensors; pip install safetensors") from None
    tensors = {name: value.contiguous() for name, value in to_huggingface(state).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(arch), indent=2))
