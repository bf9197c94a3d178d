"""Adaptive projected guidance against diffusers' guider, angles worked out by hand, and an exact mixture."""

import math

import pytest
import torch

from lossary.diffusion import AdaptiveProjectedGuidance, project_parallel_orthogonal
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._mixture import ring
from lossary.diffusion._samplers import euler, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predictions(steps=4, shape=(3, 2, 4, 4)):
    g = rng()
    return [tuple(torch.randn(2, *shape, generator=g).unbind()) for _ in range(steps)]


@pytest.mark.parametrize("setting", [(0.0, -0.5, 2.5), (1.0, 0.0, 1e6), (0.3, -0.75, 7.0), (0.0, 0.6, 4.0)])
def test_diffusers_guider_says_the_same(setting):
    guiders = pytest.importorskip("diffusers.guiders")
    eta, momentum, radius = setting
    theirs = guiders.AdaptiveProjectedGuidance(
        guidance_scale=7.5 - 1,  # its "original formulation" is D_c + scale (...)
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=radius,
        eta=eta,
        use_original_formulation=True,
    )
    theirs.momentum_buffer = type(theirs).forward.__globals__["MomentumBuffer"](momentum)
    ours, state = AdaptiveProjectedGuidance(7.5, eta=eta, momentum=momentum, radius=radius), None
    for cond, uncond in predictions():
        guided, state = ours(cond, uncond, state)
        torch.testing.assert_close(guided, theirs.forward(cond, uncond).pred, rtol=1e-4, atol=1e-4)


def test_its_limit_is_classifier_free_guidance():
    ours = AdaptiveProjectedGuidance(5.0, eta=1.0, momentum=0.0, radius=None)
    state = None
    for cond, uncond in predictions():
        guided, state = ours(cond, uncond, state)
        torch.testing.assert_close(guided, classifier_free(5.0)(cond, uncond, None)[0])
    cond, uncond = predictions(1)[0]
    torch.testing.assert_close(AdaptiveProjectedGuidance(1.0)(cond, uncond, None)[0], cond)


def test_the_parts_by_angle():
    """At 60 degrees a vector of length 2 has a parallel part of length 1 and a rest of sqrt(3)."""
    angle = torch.tensor(math.pi / 3, dtype=torch.float64)
    turned = 2 * torch.stack([angle.cos(), angle.sin()])[None]
    parallel, rest = project_parallel_orthogonal(turned, torch.tensor([[7.0, 0.0]], dtype=torch.float64))
    assert parallel.tolist()[0] == pytest.approx([1.0, 0.0])
    assert rest.tolist()[0] == pytest.approx([0.0, 3**0.5])
    zero, whole = project_parallel_orthogonal(turned, torch.zeros_like(turned))
    assert (zero == 0).all()
    assert torch.equal(whole, turned)


def test_samples_are_apart_and_stacks_are_declared():
    v, onto = torch.randn(2, 4, 5, 3, generator=rng()).unbind()
    stacked = project_parallel_orthogonal(v, onto, data_dims=1)
    by_hand = [project_parallel_orthogonal(a, b) for a, b in zip(v, onto)]
    for k in range(2):
        torch.testing.assert_close(stacked[k], torch.stack([pair[k] for pair in by_hand]))
    assert (stacked[1] * onto).sum(-1).abs().max() < 1e-5
    guidance = AdaptiveProjectedGuidance(3.0, radius=0.5, data_dims=1)
    guided, state = guidance(v, onto, None)
    one, _ = AdaptiveProjectedGuidance(3.0, radius=0.5)(v[1], onto[1], None)
    torch.testing.assert_close(guided[1], one)
    torch.testing.assert_close(state, v - onto)
    low, _ = guidance(v.bfloat16(), onto.bfloat16(), None)
    assert low.dtype is torch.bfloat16
    assert low.isfinite().all()


def test_the_difference_is_limited_and_remembered():
    cond, uncond = torch.tensor([[0.0, 1.0]]), torch.tensor([[-10.0, 1.0]])
    guidance = AdaptiveProjectedGuidance(3.0, radius=2.0, momentum=-0.5)
    first, state = guidance(cond, uncond, None)
    assert first.tolist() == [[4.0, 1.0]]  # twice a difference of 10 cut to 2
    again, state = guidance(cond, cond - torch.tensor([[6.0, 0.0]]), state)
    assert again.tolist() == [[2.0, 1.0]]  # 6 - 5 = 1
    assert state.tolist() == [[1.0, 0.0]]
    still, _ = guidance(cond, cond, None)
    assert torch.equal(still, cond)


def test_squares_that_overflow_in_half_precision():
    """400 numbers of 20 have the length 400, whose square float16 does not hold; limited to 50 they are 2.5 each."""
    cond = torch.zeros(1, 400, dtype=torch.float16)
    guided, state = AdaptiveProjectedGuidance(2.0, radius=50.0)(cond, cond - 20, None)
    assert guided.dtype is torch.float16
    torch.testing.assert_close(guided, torch.full_like(guided, 2.5))
    assert torch.equal(state, torch.full_like(state, 20.0))


def test_gradients_where_both_predictions_agree():
    """There guided = cond + 3 P (cond - uncond), P dropping what is parallel to (2, 0)."""
    cond = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    uncond = cond.detach().clone().requires_grad_()
    guided, _ = AdaptiveProjectedGuidance(4.0)(cond, uncond, None)
    by_cond, by_uncond = torch.autograd.grad(guided.sum(), (cond, uncond))
    assert by_cond.tolist() == [[1.0, 4.0]]
    assert by_uncond.tolist() == [[0.0, -3.0]]


def test_on_a_ring_it_does_not_push_outwards():
    """Classes at radius 4: what tells them from the rest is mostly their direction from the origin."""
    truth, x = ring(8, scale=0.7), 80 * torch.randn(400, 2, generator=rng(), dtype=torch.float64)
    beyond = {}
    for name, guidance in (("free", classifier_free(8.0)), ("projected", AdaptiveProjectedGuidance(8.0))):
        denoise = Guided(guidance, truth.component(0).denoise, truth.denoise)
        found = euler(denoise, x, karras_sigmas(24))
        torch.testing.assert_close(found, euler(denoise, x, karras_sigmas(24)))  # the state starts anew
        assert truth.responsibilities(found)[:, 0].mean() > 0.95
        beyond[name] = found[:, 0].mean().item() - 4
    assert beyond["free"] > 2
    assert abs(beyond["projected"]) < beyond["free"] / 10


def test_refusals():
    cond = torch.zeros(2, 3)
    for call, message in (
        (lambda: AdaptiveProjectedGuidance(-1.0), "scale: expected a number >= 0"),
        (lambda: AdaptiveProjectedGuidance(2.0, momentum=-1.0), "momentum: expected a number > -1 and < 1"),
        (lambda: AdaptiveProjectedGuidance(2.0, radius=0.0), "radius: expected a number > 0"),
        (lambda: AdaptiveProjectedGuidance(2.0, eta=-0.1), "eta: expected a number >= 0"),
        (lambda: AdaptiveProjectedGuidance(2.0)(cond, None, None), "uncond: expected a tensor"),
        (lambda: AdaptiveProjectedGuidance(2.0, data_dims=3)(cond, cond, None), "data_dims: expected a whole number"),
        (lambda: project_parallel_orthogonal(cond, torch.zeros(3)), "onto: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
