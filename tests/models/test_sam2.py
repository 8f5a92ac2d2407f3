"""The steps of SAM 2 on one frame."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam2fast.models.architecture import architecture
from sam2fast.models.mask_decoder import stable_mask
from sam2fast.models.memory_bank import FrameMemory
from sam2fast.models.sam2 import SAM2, ImageFeatures

SIZE = 64
CLICK = (torch.tensor([[[20.0, 30.0]]]), torch.tensor([[1]], dtype=torch.int32))


@pytest.fixture(scope="module")
def model() -> SAM2:
    return build()


def build(version: str = "2.1", bias: float = 3.0) -> SAM2:
    """Micro model; `bias` decides whether it takes objects for present."""
    torch.manual_seed(0)
    model = SAM2(architecture("micro", version, image_size=SIZE)).eval()
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(bias)
        for parameter in (model.no_obj_ptr.weight, model.no_mem_embed.weight, model.maskmem_tpos_enc.weight):
            parameter.normal_()
    return model


def frames(count: int = 1, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def predict(model: SAM2, features: ImageFeatures, points=CLICK, mask=None, multimask=True, **options):
    conditioned = model.condition_on_memory(features.top, [], 0, 1, initial=True)
    return model.predict_masks(conditioned, features.high_res, points, mask, multimask, **options)


def memories(model: SAM2, count: int = 3, objects: int = 1) -> list[FrameMemory]:
    """Of frames 0 (prompted), 1, 2, ..."""
    torch.manual_seed(2)
    shape = (objects, 64, SIZE // 16, SIZE // 16)
    return [FrameMemory(t, torch.randn(shape), torch.randn(objects, 256), conditioning=t == 0) for t in range(count)]


@torch.no_grad()
def test_normalize(model):
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = torch.stack([-mean / std, (1 - mean) / std])
    torch.testing.assert_close(model.normalize(black_and_white).flatten(1), want)
    floats = torch.randn(1, 3, 2, 2)
    assert model.normalize(floats) is floats


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (32, 32)])
def test_whole_step_at_any_size(model, height, width):
    features = model.encode_images(frames(2, height, width))
    assert features.top.shape == (2, 256, height // 16, width // 16)
    assert [f.shape[1:] for f in features.high_res] == [(32, height // 4, width // 4), (64, height // 8, width // 8)]
    objects = features.select(torch.tensor([1, 1, 0]))
    assert torch.equal(objects.top[0], features.top[1]) and torch.equal(objects.high_res[1][2], features.high_res[1][0])

    points = (CLICK[0].expand(3, 1, 2), CLICK[1].expand(3, 1))
    out = predict(model, objects, points)
    assert out.low_res.shape == (3, 3, height // 4, width // 4)
    assert out.best.shape == (3, 1, height // 4, width // 4)
    assert (out.ious.shape, out.object_score.shape, out.pointer.shape) == ((3, 3), (3, 1), (3, 256))
    torch.testing.assert_close(out.low_res[0], out.low_res[1])
    assert (out.low_res[0] - out.low_res[2]).abs().max() > 1e-3

    spatial = model.encode_memory(objects.top, out.best, out.object_score)
    assert spatial.shape == (3, 64, height // 16, width // 16)
    bank = [FrameMemory(0, spatial, out.pointer, conditioning=True)]
    conditioned = model.condition_on_memory(objects.top, bank, 1, 2)
    assert conditioned.shape == objects.top.shape
    tracked = model.predict_masks(conditioned, objects.high_res, None, None, multimask=True)
    assert tracked.low_res.isfinite().all()


@torch.no_grad()
def test_clicks_are_in_pixels_of_both_axes(model):
    encoder = model.sam_prompt_encoder
    tokens, _ = encoder((torch.tensor([[[96.0, 31.0]]]), CLICK[1]), None, batch=1, grid=(4, 8))
    position = tokens[0, 0] - encoder.point_embeddings[1]()[0]
    pixels = encoder.grid_encoding((64, 128))[0]  # one cell for each pixel of the 64 x 128 input
    torch.testing.assert_close(position, pixels[:, 31, 96], atol=1e-5, rtol=0)


@torch.no_grad()
def test_best_mask_and_pointer_belong_to_the_highest_predicted_iou(model):
    features = model.encode_images(frames())
    out = predict(model, features)
    best = out.ious[0].argmax()
    assert torch.equal(out.best[0, 0], out.low_res[0, best])
    single = predict(model, features, multimask=False)
    assert single.low_res.shape[1] == single.ious.shape[1] == 1
    assert single.best is single.low_res
    assert (single.pointer - out.pointer).abs().max() > 1e-3


@torch.no_grad()
def test_padding_points_change_nothing_but_themselves(model):
    """No points is two padding tokens, as in training; a padding point is the same as none."""
    features = model.encode_images(frames())
    padding = (torch.rand(1, 1, 2) * SIZE, torch.tensor([[-1]], dtype=torch.int32))
    torch.testing.assert_close(predict(model, features, padding).low_res, predict(model, features, None).low_res)


@torch.no_grad()
def test_mask_prompt_and_label_matter(model):
    features = model.encode_images(frames())
    plain = predict(model, features).low_res
    negative = predict(model, features, (CLICK[0], torch.tensor([[0]]))).low_res
    prompted = predict(model, features, mask=torch.randn(1, 1, SIZE // 4, SIZE // 4)).low_res
    assert (plain - negative).abs().max() > 1e-4
    assert (plain - prompted).abs().max() > 1e-4
    with pytest.raises(AssertionError, match="mask prompt"):
        predict(model, features, mask=torch.randn(1, 1, SIZE, SIZE))


@torch.no_grad()
def test_absent_objects():
    model = build(bias=-3.0)
    features = model.encode_images(frames())
    out = predict(model, features)
    assert (out.low_res == -1024).all() and (out.best == -1024).all()
    assert torch.equal(out.pointer, model.no_obj_ptr())
    spatial = model.encode_memory(features.top, out.best, out.object_score)
    present = model.encode_memory(features.top, out.best, -out.object_score)
    embedding = model.no_obj_embed_spatial()[0, :, None, None].expand_as(spatial[0])
    torch.testing.assert_close(spatial[0] - present[0], embedding, atol=1e-5, rtol=0)


@torch.no_grad()
def test_initial_frames_see_no_memory(model):
    features = model.encode_images(frames())
    want = features.top + model.no_mem_embed().view(1, 256, 1, 1)
    assert torch.equal(model.condition_on_memory(features.top, memories(model), 3, 8, initial=True), want)
    assert torch.equal(model.condition_on_memory(features.top, [], 3, 8), want)


@torch.no_grad()
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_time_of_memories_matters(version):
    model = build(version)
    top = model.encode_images(frames()).top
    bank = memories(model)
    out = model.condition_on_memory(top, bank, 3, 8)
    assert (out - model.condition_on_memory(top, bank[:2], 3, 8)).abs().max() > 1e-4
    later = model.condition_on_memory(top, bank, 4, 8)  # the same memories, one frame further away
    assert (out - later).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("version", "differ"), [("2.0", False), ("2.1", True)])
def test_pointer_tokens_carry_time_in_2_1_alone(version, differ):
    model = build(version)
    top = model.encode_images(frames()).top
    pointers = [FrameMemory(m.frame, None, m.pointer, m.conditioning) for m in memories(model, 2)]
    near, far = (model.condition_on_memory(top, pointers, t, 8) for t in (2, 5))
    assert ((near - far).abs().max() > 1e-4) == differ


@torch.no_grad()
def test_conditioning_keeps_objects_apart(model):
    top = model.encode_images(frames()).top.expand(2, -1, -1, -1)
    both = model.condition_on_memory(top, memories(model, objects=2), 3, 8)
    first = [FrameMemory(m.frame, m.spatial[:1], m.pointer[:1], m.conditioning) for m in memories(model, objects=2)]
    torch.testing.assert_close(both[:1], model.condition_on_memory(top[:1], first, 3, 8), atol=1e-5, rtol=0)


@torch.no_grad()
def test_mask_as_output(model):
    features = model.encode_images(frames()).select(torch.tensor([0, 0]))
    masks = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    masks[0, 0, 16:48, 8:40] = True
    out = model.mask_as_output(features, masks)
    assert torch.equal(out.full_res, masks.float() * 20 - 10)
    assert torch.equal(out.best > 0, F.avg_pool2d(masks.float(), 4) > 0.5)
    assert out.object_score.tolist() == [[10], [-10]] and out.ious.tolist() == [[1], [1]]
    assert torch.equal(out.pointer[1:], model.no_obj_ptr())
    heads = model.predict_masks(
        features.top, features.high_res, None, model.mask_downsample(masks.float()), multimask=False
    )
    torch.testing.assert_close(out.pointer[:1], heads.pointer[:1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_memory_of_a_mask(model):
    top = model.encode_images(frames()).top
    logits = torch.randn(1, 1, SIZE // 4, SIZE // 4) * 5
    score = torch.ones(1, 1)
    full = F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    want = model.encode_memory(top, full, score)
    torch.testing.assert_close(model.encode_memory(top, logits, score), want)
    torch.testing.assert_close(want, model.memory_encoder(top, full.sigmoid() * 20 - 10))
    hard = model.encode_memory(top, logits, score, binarize=True)
    torch.testing.assert_close(hard, model.memory_encoder(top, (full > 0) * 20.0 - 10))


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_mask_reaches_the_memory_encoder_in_its_precision(precision):
    """So that nothing copies it at full resolution."""
    model = build().bfloat16() if precision == "bfloat16" else build()
    seen = []
    model.memory_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    top = torch.randn(2, 256, SIZE // 16, SIZE // 16, dtype=model.dtype)
    for side in (SIZE // 4, SIZE):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            model.encode_memory(top, torch.randn(2, 1, side, side), torch.ones(2, 1))
    expected = torch.float32 if precision == "float32" else torch.bfloat16
    assert [(mask.dtype, tuple(mask.shape)) for mask in seen] == [(expected, (2, 1, SIZE, SIZE))] * 2


@torch.no_grad()
def test_stable_mask_falls_back_to_the_best_candidate():
    steady = torch.tensor([[1.0, -1.0]]).repeat(8, 4)
    wavering = torch.linspace(-0.1, 0.1, 64).view(8, 8)
    masks = torch.stack(
        [
            torch.stack([first] + [torch.full((8, 8), float(i)) for i in (1, 2, 3)])
            for first in (steady, wavering, torch.full((8, 8), -5.0))
        ]
    )
    ious = torch.tensor([[0.1, 0.2, 0.9, 0.3]]).repeat(3, 1)
    chosen, iou = stable_mask(masks, ious)
    assert torch.equal(chosen[0, 0], steady) and torch.equal(chosen[2, 0], masks[2, 0])
    assert (chosen[1] == 2).all()
    torch.testing.assert_close(iou[:, 0], torch.tensor([0.1, 0.9, 0.1]))


def test_nothing_in_a_frame_reads_a_value_on_the_host():
    """Tensors of the meta device have no values: reading one would raise."""
    with torch.device("meta"):
        model = SAM2(architecture("micro", image_size=SIZE)).train()
        features = model.encode_images(torch.empty(2, 3, SIZE, SIZE)).select(torch.zeros(3, dtype=torch.long))
        given = model.mask_as_output(features, torch.empty(3, 1, SIZE, SIZE, dtype=torch.bool))
        spatial = model.encode_memory(features.top, given.full_res, given.object_score)
        bank = [FrameMemory(0, spatial, given.pointer, conditioning=True)]
        conditioned = model.condition_on_memory(features.top, bank, 1, 4)
        points = (torch.empty(3, 1, 2), torch.empty(3, 1, dtype=torch.int32))
        first = model.predict_masks(conditioned, features.high_res, points, None, multimask=True)
        second = model.predict_masks(conditioned, features.high_res, points, first.best, multimask=False, stable=True)
        model.encode_memory(features.top, second.best, second.object_score).sum().backward()
    assert all(p.grad is not None for p in model.memory_attention.parameters())


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_half_precision_stays_close(precision):
    model = build()
    with torch.no_grad():
        want = predict(model, model.encode_images(frames()))
        low = build() if precision == "autocast" else build().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            features = low.encode_images(frames())
            out = predict(low, features)
            spatial = low.encode_memory(features.top, out.best, out.object_score)
            bank = [FrameMemory(0, spatial, out.pointer, conditioning=True)]
            assert low.condition_on_memory(features.top, bank, 1, 2).isfinite().all()
    assert out.low_res.dtype == torch.float32
    torch.testing.assert_close(out.low_res, want.low_res, atol=0.1 * want.low_res.std().item(), rtol=0.1)


def test_dropout_is_on_in_training_alone(model):
    torch.manual_seed(0)
    top, bank = torch.randn(1, 256, 4, 4), memories(model)
    with torch.no_grad():
        assert torch.equal(*(model.condition_on_memory(top, bank, 3, 8) for _ in range(2)))
        training = build().train()
        assert not torch.equal(*(training.condition_on_memory(top, bank, 3, 8) for _ in range(2)))
