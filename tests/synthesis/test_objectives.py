"""What images are made with: objectives fall, views and perturbations are what they say, starts stay inside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.calibration.method import D4C, PUBLISHED
from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.synthesis.foreground import crop_boxes, cut_boxes, draw_boxes
from d4c_onnx.synthesis.objectives import Seen, build_objective, guidance, structure, total_variation
from d4c_onnx.synthesis.param import fourier_scale, start_images
from d4c_onnx.synthesis.perturb import affine, blur, color_jitter, erase, perturb, published

MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def _descends(objective, mini_vit) -> None:
    """Every objective falls in five steps: the whole chain from pixels to loss is differentiable and signed right."""
    torch.manual_seed(0)
    image, _ = mini_vit.deployed_towers()
    texts = F.normalize(
        mini_vit.model.encode_text(torch.from_numpy(mini_vit.tokenize(list(mini_vit.embedded.nouns)))), dim=-1
    )
    values = torch.randn(4, 3, 48, 48, requires_grad=True)
    boxes = draw_boxes(4, (0.4, 0.7), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([values], lr=0.05)
    losses = []
    for _ in range(6):
        views = {"whole": values, "box": crop_boxes(values, boxes), "background": cut_boxes(values, boxes, values * 0)}
        embeds = {name: F.normalize(image(view), dim=-1) for name, view in views.items()}
        loss, shown = objective(Seen(values, embeds, texts, torch.arange(4)))
        assert all(np.isfinite(value) for value in shown.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["guidance", "structure", "total_variation", "published", "default"])
def test_objectives_descend(name: str, mini_vit) -> None:
    objectives = {
        "guidance": guidance("whole", 0.1),
        "structure": structure(0.1),
        "total_variation": total_variation(),
        "published": build_objective(PUBLISHED),
        "default": build_objective(D4C),
    }
    _descends(objectives[name], mini_vit)


def test_structure_is_one_choice_among_prompts_and_backgrounds() -> None:
    """Source: arXiv 2511.15411, SCG; written out image by image."""
    generator = torch.Generator().manual_seed(0)
    box, background, texts = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (3, 3, 5))
    labels = torch.tensor([4, 0, 4])
    seen = Seen(torch.zeros(3, 3, 4, 4), {"box": box, "background": background}, texts, labels)
    expected = 0.0
    for image, label in zip(box, labels, strict=True):
        to_texts, to_backgrounds = (image @ texts.T / 0.2).exp(), (image @ background.T / 0.2).exp()
        expected -= float((to_texts[label] / (to_texts.sum() + to_backgrounds.sum())).log()) / 3
    assert float(structure(0.2)(seen)[0]) == pytest.approx(expected, rel=1e-5)


def test_objectives_add_and_weigh() -> None:
    x = torch.randn(2, 3, 8, 8)
    seen = Seen(
        x, {"whole": F.normalize(torch.randn(2, 4), dim=1)}, F.normalize(torch.randn(3, 4), dim=1), torch.arange(2)
    )
    both = guidance("whole", 0.1) + 0.5 * total_variation()
    assert both.views == {"whole"}
    total, shown = both(seen)
    assert float(total) == pytest.approx(shown["pgsi_whole"] + 0.5 * shown["tv"], rel=1e-5)


def test_published_switches_choose_the_terms() -> None:
    names = [term.name for term in build_objective(PUBLISHED, keeps_statistics=True).terms]
    assert sorted(names) == ["scg", "tv"]
    without = build_objective(replace(PUBLISHED, scg=False))
    assert sorted(term.name for term in without.terms) == ["pgsi_whole", "tv"]


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_boxes_have_the_asked_area_and_stay_inside(seed: int) -> None:
    boxes = draw_boxes(16, (0.4, 0.7), torch.Generator().manual_seed(seed))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert bool((boxes >= -1e-6).all() & (boxes <= 1 + 1e-6).all())
    assert bool((area > 0.399).all() & (area < 0.701).all())


def test_views_are_what_they_say() -> None:
    x = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    assert torch.allclose(crop_boxes(x, whole), x, atol=1e-3)
    quarter = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).expand(2, 4)
    left = cut_boxes(x, quarter, torch.zeros_like(x))
    assert bool((left[:, :, :4, :4] == 0).all())
    assert torch.equal(left[:, :, 4:], x[:, :, 4:])
    assert torch.equal(left[:, :, :4, 4:], x[:, :, :4, 4:])
    crop = crop_boxes(x, quarter)  # the top-left quarter at twice the size
    assert float(crop[0, 0].mean()) == pytest.approx(float(x[0, 0, :4, :4].mean()), rel=0.05)


@pytest.mark.parametrize(
    "perturbation", [affine(), color_jitter(MEAN, STD), blur(1.0), erase(1.0)], ids=["affine", "color", "blur", "erase"]
)
def test_perturbations_change_images_repeatably_and_pass_gradients(perturbation) -> None:
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    a, b = (perturb(x, [perturbation], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == x.shape
    assert not torch.allclose(a, x)
    a.square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_affine_without_strength_is_the_identity() -> None:
    x = torch.randn(2, 3, 16, 16)
    same = affine(0, 0, 0, 0)(x, torch.Generator())
    assert torch.allclose(same, x, atol=1e-5)
    flipped = affine(1, 0, 0, 0)(x, torch.Generator())
    assert torch.allclose(flipped, x.flip(-1), atol=1e-5)


def test_erase_covers_a_fifth_of_the_side() -> None:
    x = torch.ones(8, 3, 50, 50)
    holes = (erase(1.0)(x, torch.Generator().manual_seed(0)) == 0).float().mean((1, 2, 3))
    assert bool(((holes - 0.04).abs() < 0.005).all())


def test_published_perturbations_are_complete() -> None:
    assert len(published(MEAN, STD)) == 4


def test_fourier_images_stay_inside_whatever_the_optimiser_does() -> None:
    images = start_images("fourier", (2, 3, 25, 48), MEAN, STD, torch.Generator().manual_seed(0))
    for factor in (1.0, 100.0):
        shown = images.render(images.values * factor) * STD + MEAN
        assert shown.shape == (2, 3, 25, 48)
        assert float(shown.min()) >= 0
        assert float(shown.max()) <= 1
    part = images.render(images.values[1:])
    assert torch.allclose(part, images.render(images.values)[1:], atol=1e-6)


@pytest.mark.parametrize("kind", ["fourier", "pixel"])
@pytest.mark.parametrize("size", [(25, 48), (32, 31)])
def test_images_can_start_as_pictures(kind: str, size: tuple[int, int]) -> None:
    """Pixels exactly; Fourier images with nine tenths of the contrast, since a sigmoid never reaches 0 and 1."""
    pictures = torch.from_numpy(dead_leaves(2, size, 0))
    images = start_images(kind, (2, 3, *size), MEAN, STD, torch.Generator(), pictures)
    shown = images.render(images.values) * STD + MEAN
    expected = 0.5 + 0.9 * (pictures - 0.5) if kind == "fourier" else pictures
    assert torch.allclose(shown, expected, atol=1e-4)


@given(st.integers(4, 40), st.integers(4, 40))
@settings(max_examples=25, deadline=None)
def test_fourier_coefficients_of_unit_variance_render_unit_variance(height: int, width: int) -> None:
    noise = torch.randn(400, height, width // 2 + 1, 2, generator=torch.Generator().manual_seed(0))
    pixels = torch.fft.irfft2(
        torch.view_as_complex(noise) * fourier_scale(height, width), s=(height, width), norm="ortho"
    )
    assert 0.9 < float(pixels.var()) < 1.1
