"""ACR loss against scikit-learn's PCA, the official piecewise formula with a continuous constant, and its limits."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from lossary.detection import SmoothFace, acr_loss, landmark_difficulty


@pytest.fixture
def faces():
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((4, 10)) * np.array([[1.0], [0.6], [0.3], [0.1]])
    return rng.standard_normal((60, 4)) @ modes + 0.02 * rng.standard_normal((60, 10)) + np.arange(10)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_smooth_faces_are_what_pca_keeps_clipped_at_three_deviations(faces, share):
    pca = PCA(n_components=share).fit(faces)
    new = faces[:5] * np.array([[1.0], [1.0], [-3.0], [9.0], [0.5]])
    redrawn = []
    for face in new:  # one coefficient after another, as the official code does
        b = pca.components_ @ (face - faces.mean(0))
        reach = [3 * math.sqrt(v) for v in pca.explained_variance_]
        b = [min(x, r) if x > 0 else max(x, -r) for x, r in zip(b, reach)]
        redrawn.append(faces.mean(0) + sum(x * mode for x, mode in zip(b, pca.components_)))
    got = SmoothFace(torch.from_numpy(faces))(torch.from_numpy(new), share=share)
    np.testing.assert_allclose(got.numpy(), redrawn, atol=1e-9)


def test_the_default_share_keeps_nine_tenths():
    axes = torch.diag(torch.tensor([0.88, 0.06, 0.06]).sqrt()).double()  # shares of the variance along three axes
    got = SmoothFace(torch.cat([axes, -axes]))(torch.full((1, 3), 0.1, dtype=torch.float64))
    assert sorted(got[0].abs().tolist()) == pytest.approx([0.0, 0.1, 0.1])


def test_a_shape_within_the_kept_modes_has_no_hard_landmark(faces):
    smooth = SmoothFace(torch.from_numpy(faces))
    inside = smooth(torch.from_numpy(faces[:4]))
    torch.testing.assert_close(smooth(inside), inside)
    assert landmark_difficulty(inside, inside).tolist() == torch.zeros(4, 10).tolist()


def test_shapes_that_never_vary_are_redrawn_as_their_mean():
    smooth = SmoothFace(torch.ones(3, 4))
    assert smooth(torch.tensor([[1.0, 5.0, 1.0, 1.0]])).tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_one_coordinate_is_enough():
    assert SmoothFace(torch.tensor([[0.0], [2.0]]))(torch.tensor([[1.5]])).tolist() == [[1.5]]


def test_difficulty_is_relative_to_the_face_and_carries_no_gradient():
    target = torch.tensor([[0.0, 3.0, -1.0], [0.1, 0.0, 0.0]], requires_grad=True)
    got = landmark_difficulty(target, torch.zeros(2, 3))
    assert got.tolist() == [[0.0, 1.0, pytest.approx(1 / 3)], [1.0, 0.0, 0.0]]
    assert not got.requires_grad


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_loss_by_the_official_branches_with_the_continuous_constant(weight):
    rng = np.random.default_rng(1)
    x, y, phi = 1.5 * rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.random((3, 8))
    expected = []
    for row in range(3):
        total = 0.0
        for e, f in zip(np.abs(x[row] - y[row]), phi[row]):
            total += weight * math.log(1 + e ** (2 - f)) if e <= 1 else e**2 + weight * math.log(2) - 1
        expected.append(100 * total / 8)
    got = acr_loss(*map(torch.from_numpy, (x, y)), difficulty=torch.from_numpy(phi), weight=weight)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_default_weight_is_ten():
    zero, half = torch.zeros(1, 1), torch.full((1, 1), 0.5)
    assert acr_loss(half, zero, difficulty=zero).item() == pytest.approx(1000 * math.log(1.25))


def test_pull_of_a_small_error_is_constant_when_hard_and_vanishes_when_easy():
    error = torch.full((2, 1), 1e-6, dtype=torch.float64, requires_grad=True)
    difficulty = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    acr_loss(error, torch.zeros_like(error), difficulty=difficulty, weight=1.0).sum().backward()
    assert error.grad.flatten().tolist() == pytest.approx([100.0, 200e-6], rel=1e-5)


def test_gradient_agrees_with_finite_differences_and_is_finite_at_zero_and_far_out():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=g, dtype=torch.float64).requires_grad_()
    phi = torch.rand(3, 5, generator=g, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: acr_loss(x, torch.zeros_like(x), difficulty=phi), (x,))
    far = torch.tensor([[0.0, 1e15, -1e15]], requires_grad=True)
    acr_loss(far, torch.zeros(1, 3), difficulty=torch.tensor([[1.0, 0.0, 1.0]])).sum().backward()
    assert far.grad.isfinite().all()
    assert far.grad[0, 0] == 0


def test_state_survives_a_state_dict_and_half_precision_runs(faces):
    smooth, other = (SmoothFace(torch.from_numpy(f)) for f in (faces, faces[:9]))
    other.load_state_dict(smooth.state_dict())
    x = torch.from_numpy(faces[:3])
    torch.testing.assert_close(other(x), smooth(x))
    half = acr_loss(*x.bfloat16().split([1, 2])[1:], x[:2].bfloat16(), difficulty=torch.ones(2, 10).bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_refusals():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"difficulty: expected shape \(2, 4\), got \(2, 3\)"):
        acr_loss(x, x, difficulty=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="target: expected a floating-point tensor"):
        acr_loss(x, x.long(), difficulty=x)
    with pytest.raises(ValueError, match="weight: expected a number > 0"):
        acr_loss(x, x, difficulty=x, weight=0.0)
    with pytest.raises(ValueError, match="smooth: expected shape"):
        landmark_difficulty(x, x[:1])
    with pytest.raises(ValueError, match="landmarks: expected at least two rows"):
        SmoothFace(x[:1])
    with pytest.raises(ValueError, match="landmarks: expected 4 coordinates in the last dimension"):
        SmoothFace(x)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="share: expected a number > 0"):
        SmoothFace(x)(x, share=0.0)
