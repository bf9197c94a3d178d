"""Fourier contours against closed forms, numpy's FFT, the official code's sums and OpenCV-like polygons by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lossary.detection import (
    fourier_contour_decode,
    fourier_contour_encode,
    fourier_contour_loss,
    polygon_nms,
    text_region_loss,
)

DOUBLE = torch.float64


def ellipse(a: float, b: float, centre=(0.0, 0.0), corners: int = 4000) -> torch.Tensor:
    t = 2 * math.pi * torch.arange(corners, dtype=DOUBLE) / corners
    return torch.stack([centre[0] + a * t.cos(), centre[1] + b * t.sin()], dim=1)


def blob(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 15))
    radius = rng.uniform(3, 9, 15)
    return torch.from_numpy(np.stack([20 + radius * np.cos(angle), 30 + radius * np.sin(angle)], axis=1))


def test_a_circle_is_its_centre_and_its_radius():
    code = fourier_contour_encode(ellipse(3.0, 3.0, (7.0, -2.0)), degree=3)
    expected = torch.zeros(7, 2, dtype=DOUBLE)
    expected[3], expected[4] = torch.tensor([7.0, -2.0]), torch.tensor([3.0, 0.0])
    torch.testing.assert_close(code, expected, atol=1e-5, rtol=0)


def test_a_triangle_as_its_integral_says():
    """c_k of a polygon walked at unit speed, corners at p = 0: an integral by parts over each edge, worked by hand."""
    corner = np.array([3 + 0j, -1 + 2j, -1 - 2j])  # the rightmost point at the centre's height is the first corner
    edge = np.roll(corner, -1) - corner
    at = np.concatenate([[0], np.cumsum(abs(edge))]) / abs(edge).sum()
    degree, points = 4, 20_000
    expected = []
    for k in range(-degree, degree + 1):
        if k == 0:
            expected.append((abs(edge) * (corner + edge / 2)).sum() / abs(edge).sum())
        else:  # the integral of f is that of f' / (2 pi i k), and f' is constant on an edge
            speed = edge / np.diff(at)
            wave = np.exp(-2j * np.pi * k * at)
            expected.append((speed * (wave[:-1] - wave[1:])).sum() / (2j * np.pi * k) ** 2)
    polygon = torch.from_numpy(np.stack([corner.real, corner.imag], axis=1))
    code = fourier_contour_encode(polygon, degree=degree, samples=points)
    np.testing.assert_allclose(torch.view_as_complex(code).numpy(), expected, atol=1e-6)


def test_a_code_is_unique():
    """Whatever corner comes first and whichever way round: the code is the same, and starts right of its centre."""
    for seed in range(5):
        outline = blob(seed)
        code = fourier_contour_encode(outline, degree=6)
        for other in (outline.roll(4, 0), outline.flip(0), outline.flip(0).roll(7, 0)):
            torch.testing.assert_close(fourier_contour_encode(other, degree=6), code, atol=0.02, rtol=0)
        whole = fourier_contour_decode(fourier_contour_encode(outline, degree=150), points=400)
        assert whole[0, 1] == pytest.approx(code[6, 1].item(), abs=0.05)
        assert whole[0, 0] > code[6, 0]
        x, y = whole.T
        assert (x * y.roll(-1) - y * x.roll(-1)).sum() > 0  # clockwise on a screen


def test_of_several_crossings_the_rightmost_is_the_start():
    """A cup upside down, whose outline is 46 long and 215/46 high on average: four sides cross that height."""
    cup = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 8.0], [4.0, 8.0], [4.0, 0.0], [6.0, 0.0], [6.0, 9.0], [0.0, 9.0]])
    start = fourier_contour_decode(fourier_contour_encode(cup, degree=199), points=400)[0]
    torch.testing.assert_close(start, torch.tensor([6.0, 215 / 46]), atol=0.05, rtol=0)


def test_decode_is_the_inverse_fourier_transform_of_numpy():
    """The official code pads the coefficients with zeros and calls ifft."""
    rng = np.random.default_rng(0)
    code = rng.standard_normal((3, 11)) + 1j * rng.standard_normal((3, 11))
    padded = np.zeros((3, 50), complex)
    padded[:, :6], padded[:, -5:] = code[:, 5:], code[:, :5]
    expected = np.fft.ifft(padded) * 50
    got = fourier_contour_decode(torch.view_as_real(torch.from_numpy(code)), points=50)
    np.testing.assert_allclose(torch.view_as_complex(got).numpy(), expected, atol=1e-12)


def test_encode_undoes_decode():
    code = torch.zeros(5, 2, dtype=DOUBLE)
    code[2], code[3], code[4] = torch.tensor([5.0, 6.0]), torch.tensor([4.0, 0.0]), torch.tensor([0.3, 0.0])
    outline = fourier_contour_decode(code, points=2000)
    again = fourier_contour_decode(fourier_contour_encode(outline, degree=40), points=2000)
    assert torch.cdist(outline, again).amin(1).max() < 0.02  # the same outline, walked at another speed


def test_parseval():
    """What a shorter code loses, in mean squared distance, is the energy of the coefficients it leaves out."""
    code = fourier_contour_encode(blob(1), degree=150)
    whole, short = (fourier_contour_decode(c, points=400) for c in (code, code[145:156]))
    lost = code.pow(2).sum() - code[145:156].pow(2).sum()
    assert (whole - short).pow(2).sum(1).mean().item() == pytest.approx(lost.item(), rel=1e-9)


def test_batches_fillers_and_degenerate_outlines():
    outlines = torch.stack([blob(0), blob(1)])
    codes = fourier_contour_encode(outlines)
    torch.testing.assert_close(codes[1], fourier_contour_encode(blob(1)))
    filled = torch.cat([blob(0), blob(0)[-1:].expand(4, 2)])
    torch.testing.assert_close(fourier_contour_encode(filled), codes[0])
    point = fourier_contour_encode(torch.tensor([[3.0, 4.0]]), degree=1)
    torch.testing.assert_close(point, torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), atol=1e-6, rtol=0)
    line = fourier_contour_encode(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), degree=1)
    assert line.isfinite().all()
    assert line[1].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    assert fourier_contour_encode(torch.zeros(0, 7, 2)).shape == (0, 11, 2)
    assert fourier_contour_encode(outlines.bfloat16()).dtype == torch.bfloat16


def test_loss_by_the_official_sums():
    """mean over points of smooth L1 in x plus the same in y, each times (region + centre) / 2."""
    rng = np.random.default_rng(2)
    predicted, true = rng.standard_normal((2, 7, 11)) + 1j * rng.standard_normal((2, 7, 11))
    centre = torch.tensor([True, False, True, True, False, False, True])
    k, n = np.arange(-5, 6), np.arange(30)
    gap = np.array([[(row * np.exp(2j * np.pi * k * m / 30)).sum() for m in n] for row in predicted - true])
    smooth = sum(np.where(abs(d) < 1, d * d / 2, abs(d) - 0.5) for d in (gap.real, gap.imag))
    expected = smooth.mean(1) * (1 + centre.numpy()) / 2
    as_real = [torch.view_as_real(torch.from_numpy(c)) for c in (predicted, true)]
    np.testing.assert_allclose(fourier_contour_loss(*as_real, centre=centre, points=30).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(fourier_contour_loss(*as_real, points=30)[0].numpy(), expected[0], atol=1e-12)
    code = as_real[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: fourier_contour_loss(c, as_real[1]), (code,))


def test_region_loss_of_the_hardest_pixels():
    logits = torch.tensor([[[2.0, -1.0, 0.5], [-3.0, 1.5, -0.2]]], dtype=DOUBLE)
    text = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=DOUBLE)
    softplus = [math.log1p(math.exp(z)) for z in (-2.0, 1.5, 0.5, -0.2)]  # the text pixel, then the three hardest
    assert text_region_loss(logits, text).item() == pytest.approx(sum(softplus) / 4)
    assert text_region_loss(logits, text, negative_ratio=2.0).item() == pytest.approx(sum(softplus[:3]) / 3)
    assert text_region_loss(logits, text, negative_ratio=9.0).item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, text).item()
    )
    assert text_region_loss(logits, torch.zeros_like(text)).item() == 0.0


def test_polygons_suppress_by_their_own_overlap():
    """Ls of five unit squares whose boxes coincide: they share two corners, 2 of 8 squares. Their boxes' IoU is 1."""
    one = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [0.0, 3.0]])
    other = 3.0 - one
    polygons, scores = torch.stack([one, other]), torch.tensor([0.7, 0.9])
    assert polygon_nms(polygons, scores, iou_threshold=2 / 8 - 0.01).tolist() == [1]
    assert polygon_nms(polygons, scores, iou_threshold=2 / 8 + 0.01).tolist() == [1, 0]
    assert polygon_nms(polygons, scores).tolist() == [1]  # 0.1
    assert polygon_nms(polygons.flip(1), scores[:1].expand(2)).tolist() == [0]  # equal scores, the other way round
    nothing = torch.full((1, 6, 2), math.nan)
    assert polygon_nms(torch.cat([polygons[:1], nothing]), scores).tolist() == [1, 0]
    assert polygon_nms(polygons[:0], scores[:0]).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fourier_contour_encode(torch.zeros(4, 3)), "contours: expected corners"),
        (lambda: fourier_contour_encode(torch.zeros(0, 2)), "contours: expected corners"),
        (lambda: fourier_contour_encode(torch.zeros(4, 2), degree=0), "degree: expected a whole number >= 1"),
        (lambda: fourier_contour_encode(torch.zeros(4, 2), samples=10), "samples: expected a whole number >= 11"),
        (lambda: fourier_contour_decode(torch.zeros(4, 2)), "coefficients: expected"),
        (lambda: fourier_contour_decode(torch.zeros(5, 2), points=2), "points: expected a whole number >= 3"),
        (lambda: fourier_contour_loss(torch.zeros(2, 5, 2), torch.zeros(5, 2)), "target: expected shape"),
        (lambda: fourier_contour_loss(*torch.zeros(2, 5, 2), centre=torch.ones(1)), "centre: expected bool"),
        (lambda: text_region_loss(torch.zeros(2, 2), torch.zeros(2, 3)), "target: expected shape"),
        (lambda: text_region_loss(*torch.zeros(2, 2, 2), negative_ratio=-1.0), "negative_ratio: expected"),
        (lambda: polygon_nms(torch.zeros(3, 4), torch.zeros(3)), "polygons: expected 3 dimensions"),
        (lambda: polygon_nms(torch.zeros(3, 4, 2), torch.zeros(2)), "scores: expected shape"),
        (lambda: polygon_nms(torch.zeros(3, 4, 2), torch.zeros(3), iou_threshold=2.0), "iou_threshold: expected"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
