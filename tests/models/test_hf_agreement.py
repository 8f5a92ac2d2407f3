"""The SAM 2 of Hugging Face transformers, with random weights, predicts the same masks.

An implementation by other people of the same paper and checkpoints, and one that this project's code never saw.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from sam2fast.cli import main
from sam2fast.evaluation.propagation import PointPrompt, propagate
from sam2fast.models.architecture import architecture
from sam2fast.models.huggingface import huggingface_config, to_huggingface
from sam2fast.models.official import from_official, to_official
from sam2fast.models.sam2 import SAM2

SIZE = 128
TOLERANCE = 1e-4

RENAMES = [
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$",
     "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "sam_prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "sam_prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "sam_prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "sam_prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "sam_prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling.3."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^memory_encoder\.mask_downsampler\.final_conv\.", "memory_encoder.mask_downsampler.encoder.12."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv", ".pwconv"),
    (r"(fuser\.layers\.\d)\.scale$", r"\1.gamma"),
    (r"(fuser\.layers\.\d)\.layer_norm\.", r"\1.norm."),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"layer_norm(\d?)\.", r"norm\1."),
    (r"\.o_proj\.", ".out_proj."),
]  # fmt: skip


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's state dict under official names."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("shared_image_embedding."):
            continue  # a second copy of the prompt encoder's
        if name == "prompt_encoder.point_embed.weight":
            renamed |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in enumerate(value)}
            continue
        if match := re.match(r"memory_encoder\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)\.(\w+)", name):
            index = 3 * int(match[1]) + (match[2] == "layer_norm")
            renamed[f"memory_encoder.mask_downsampler.encoder.{index}.{match[3]}"] = value
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[_mlp_name(name)] = value
    return renamed


def _mlp_name(name: str) -> str:
    """proj_in, layers.0, proj_out of three layers (without layers.0: of two) are official layers.0, 1, 2."""
    two = ".mlp." in name
    if "hypernetworks" in name or "_head." in name or name.startswith("obj_ptr_proj."):
        name = name.replace(".layers.0.", ".layers.1.")
    return name.replace(".proj_in.", ".layers.0.").replace(".proj_out.", f".layers.{1 if two else 2}.")


@pytest.fixture(scope="module")
def models():
    """(image model, video model, ours) with the same weights."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    backbone = transformers.Sam2HieraDetConfig(
        image_size=[SIZE, SIZE], hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 2, 3, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[4],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[SIZE // stride, SIZE // stride] for stride in (4, 8, 16)],
    )
    grid = [SIZE // 16, SIZE // 16]
    video = transformers.Sam2VideoModel(
        transformers.Sam2VideoConfig(
            vision_config=vision,
            prompt_encoder_config={"image_size": SIZE},
            image_size=SIZE,
            memory_attention_rope_feat_sizes=grid,
        )
    ).eval()
    _randomize(video)
    image_config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": SIZE})
    image = transformers.Sam2Model(image_config).eval()
    missing, _ = image.load_state_dict(video.state_dict(), strict=False)
    assert not missing
    ours = SAM2(architecture("micro", image_size=SIZE)).eval()
    state = official_names(video.state_dict())
    assert state.keys() == to_official(ours.state_dict()).keys()
    ours.load_state_dict(from_official(state))
    return image, video, ours


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.normal_(mean=1, std=0.1)
        else:
            parameter.normal_(std=0.05)
    model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3)  # objects are present
    matrix = torch.randn(2, 128)
    model.shared_image_embedding.positional_embedding.copy_(matrix)
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)


def frames(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * F.avg_pool2d(torch.randn(count, 3, SIZE, SIZE, generator=generator), 5, 1, 2)


def clicks(*points: tuple[float, float, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y, label) of one object."""
    table = torch.tensor([points])
    return table[..., :2], table[..., 2].int()


POINTS = {
    "positive click": clicks((40, 70, 1)),
    "three clicks": clicks((40, 70, 1), (90.5, 20, 0), (12, 100, 1)),
    "box": clicks((20, 30, 2), (90, 101.5, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", POINTS)
def test_image_prediction_agrees(models, prompt, multimask):
    theirs, _, ours = models
    coords, labels = POINTS[prompt]
    if prompt == "box":
        inputs = {"input_boxes": coords.flatten(1)[None]}
    else:
        inputs = {"input_points": coords[None], "input_labels": labels[None]}
    want = theirs(pixel_values=frames(1), multimask_output=multimask, **inputs)
    features = ours.encode_images(frames(1))
    conditioned = ours.condition_on_memory(features.top, [], 0, 1, initial=True)
    # Theirs applies the predictor's rule for unstable masks in eval mode.
    got = ours.predict_masks(conditioned, features.high_res, (coords, labels), None, multimask, stable=True)
    assert got.low_res.std() > 0.1
    torch.testing.assert_close(got.low_res, want.pred_masks[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got.ious, want.iou_scores[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got.object_score, want.object_score_logits[0], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_mask_prompt_agrees(models):
    theirs, _, ours = models
    coords, labels = POINTS["positive click"]
    mask = torch.randn(1, 1, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(2)) * 5
    want = theirs(pixel_values=frames(1), input_points=coords[None], input_labels=labels[None], input_masks=mask)
    features = ours.encode_images(frames(1))
    conditioned = ours.condition_on_memory(features.top, [], 0, 1, initial=True)
    got = ours.predict_masks(conditioned, features.high_res, (coords, labels), mask, multimask=True)
    torch.testing.assert_close(got.low_res, want.pred_masks[0], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prompt", POINTS)
def test_video_tracking_agrees(models, prompt, monkeypatch):
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    _, theirs, ours = models
    # Theirs stores memories in torch.bfloat16; its rounding would hide what is compared here.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    coords, labels = POINTS[prompt]
    pixels = (128 + 40 * frames(9)).clamp(0, 255).byte()  # more frames than the memory bank holds
    session = Sam2VideoInferenceSession(ours.normalize(pixels), SIZE, SIZE, dtype=torch.float32)
    inputs = {"point_coords": coords[None], "point_labels": labels[None]}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, inputs)
    session.obj_with_new_inputs = [1]
    want = [theirs(inference_session=session, frame_idx=t).pred_masks.view(1, 1, SIZE // 4, -1) for t in range(9)]

    prompts = {1: (0, PointPrompt(coords[0].numpy(), labels[0].numpy()))}
    tracked = propagate(ours, pixels.permute(0, 2, 3, 1), prompts, num_frames=9, memory_dtype=torch.float32)
    got = [logits[1] for _, logits in tracked]
    for ours_t, theirs_t in zip(got, want, strict=True):
        theirs_t = F.interpolate(theirs_t, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(ours_t, theirs_t, atol=TOLERANCE, rtol=0)
    assert (got[-1] - got[0]).abs().max() > 0.1


def test_export_is_what_transformers_reads(tmp_path):
    """Against the names above, which were written the other way round, and by reading the files strictly."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    state = to_official(SAM2(architecture("micro", image_size=SIZE)).state_dict())
    source, folder = tmp_path / "model.pt", tmp_path / "exported"
    torch.save({"model": state}, source)
    arguments = ["export", "--checkpoint", str(source), "--layout", "huggingface", "--out", str(folder)]
    assert main([*arguments, "--image-size", str(SIZE)]) == 0
    video, report = transformers.Sam2VideoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    back = official_names(video.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert video.config.image_size == SIZE and video.config.memory_attention_rope_feat_sizes == [SIZE // 16] * 2


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", ["tiny", "small", "base_plus", "large"])
def test_exported_configuration_has_the_shapes_of_each_size(size, version):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    arch = architecture(size, version)
    with torch.device("meta"):
        video = transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**huggingface_config(arch)))
        wanted = to_huggingface(to_official(SAM2(arch).state_dict()))
    got = video.state_dict()
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in wanted.items()}
