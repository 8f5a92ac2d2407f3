"""The official package (PyPI sam2) loads an exported checkpoint, strictly, and predicts the same masks.

Runs where that package is installed. It asks for a CUDA torch: on a CPU machine install it with --no-deps, with
hydra-core and iopath beside it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam2fast.evaluation.propagation import PointPrompt, propagate
from sam2fast.models.architecture import architecture
from sam2fast.models.official import from_official, save_checkpoint, to_official
from sam2fast.models.sam2 import SAM2

pytest.importorskip("sam2")
pytest.importorskip("hydra")

SIZE = 128
TOLERANCE = 1e-4
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
OVERRIDES = [f"++model.image_size={SIZE}"]
CLICKS = (np.array([[50.0, 30.0], [15.0, 100.0]], dtype=np.float32), np.array([1, 0], dtype=np.int32))


@pytest.fixture(scope="module")
def ours() -> SAM2:
    torch.manual_seed(0)
    model = SAM2(architecture("tiny", image_size=SIZE)).eval()
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3)  # objects are present
    return model


@pytest.fixture(scope="module")
def checkpoint(ours, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("export") / "model.pt"
    save_checkpoint(ours, path)
    return str(path)


def picture(seed: int) -> np.ndarray:
    """Blurred noise, uint8 [S, S, 3]."""
    noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    return (128 + 300 * smooth[0].permute(1, 2, 0)).clamp(0, 255).byte().numpy()


def as_points(clicks: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(clicks[0])[None], torch.from_numpy(clicks[1])[None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "size", "version"),
    [
        ("sam2/sam2_hiera_t", "tiny", "2.0"),
        ("sam2.1/sam2.1_hiera_b+", "base_plus", "2.1"),
        ("sam2.1/sam2.1_hiera_l", "large", "2.1"),
    ],
)
def test_image_encoder_of_every_size_agrees(config, size, version):
    from sam2.build_sam import build_sam2

    side = 96  # windows of 7 and 14 are padded
    theirs = build_sam2(f"configs/{config}.yaml", device="cpu", hydra_overrides_extra=[f"++model.image_size={side}"])
    torch.nn.init.normal_(theirs.image_encoder.trunk.pos_embed)  # zeros otherwise
    torch.nn.init.normal_(theirs.image_encoder.trunk.pos_embed_window)
    with torch.device("meta"):
        model = SAM2(architecture(size, version, image_size=side)).eval()
    assert list(theirs.state_dict()) == list(to_official(model.state_dict()))
    model.load_state_dict(from_official(theirs.state_dict()), assign=True)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = model.encode_images(images)
    for got, want in zip((*features.high_res, features.top), theirs.forward_image(images)["backbone_fpn"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
def test_image_predictor_agrees(ours, checkpoint, multimask):
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    model = build_sam2(CONFIG, checkpoint, device="cpu", hydra_overrides_extra=OVERRIDES)
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(SIZE // stride, SIZE // stride) for stride in (4, 8, 16)]  # fixed for 1024 otherwise
    image = picture(0)
    predictor.set_image(image)
    _, ious, low_res = predictor.predict(*CLICKS, multimask_output=multimask)

    features = ours.encode_images(torch.from_numpy(image).permute(2, 0, 1)[None])
    conditioned = ours.condition_on_memory(features.top, [], 0, 1, initial=True)
    out = ours.predict_masks(conditioned, features.high_res, as_points(CLICKS), None, multimask, stable=True)
    assert out.low_res.std() > 0.01
    np.testing.assert_allclose(out.low_res[0].numpy(), low_res, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(out.ious[0].numpy(), ious, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["click", "mask"])
def test_video_predictor_agrees(ours, checkpoint, prompt, tmp_path, monkeypatch):
    from PIL import Image
    from sam2.build_sam import build_sam2_video_predictor

    for t in range(3):
        Image.fromarray(picture(t)).save(tmp_path / f"{t:05d}.jpg")
    predictor = build_sam2_video_predictor(CONFIG, checkpoint, device="cpu", hydra_overrides_extra=OVERRIDES)
    # The predictor stores memories in torch.bfloat16; its rounding would hide what is compared here.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    state = predictor.init_state(str(tmp_path))
    if prompt == "click":
        given = PointPrompt(CLICKS[0][:1], CLICKS[1][:1])
        predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=given.coords, labels=given.labels)
    else:
        given = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        given[25:66, 35:100] = True
        predictor.add_new_mask(state, frame_idx=0, obj_id=1, mask=given)
    want = [masks[0, 0] for _, _, masks in predictor.propagate_in_video(state)]

    frames = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.jpg"))]
    options = {"memory_dtype": torch.float32, "low_res_prompts": True}
    got = [logits[1] for _, logits in propagate(ours, frames, {1: (0, given)}, num_frames=3, **options)]
    for ours_t, theirs_t in zip(got, want, strict=True):
        torch.testing.assert_close(ours_t, theirs_t, atol=TOLERANCE, rtol=0)
    assert (got[2] - got[1]).abs().max() > 1e-2
