"""Adaptive guidance against a loop written out, torch's own cosine, and regressions whose answer is known."""

import math

import pytest
import torch

from lossary.diffusion import AdaptiveGuidance, LinearAG, guidance_similarity
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._mixture import ring
from lossary.diffusion._samplers import dpm_solver_pp, euler, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_similarity_is_the_cosine_of_whole_samples():
    a, b = torch.randn(2, 5, 2, 3, 4, generator=rng()).unbind()
    expected = torch.cosine_similarity(a.reshape(5, -1), b.reshape(5, -1))
    torch.testing.assert_close(guidance_similarity(a, b), expected)
    torch.testing.assert_close(guidance_similarity(a, b, data_dims=1), torch.cosine_similarity(a, b, dim=-1))
    angle = torch.tensor(0.3, dtype=torch.float64)
    turned = torch.stack([angle.cos(), angle.sin()])[None]
    assert guidance_similarity(5 * turned, turned.new_tensor([[2.0, 0.0]])).item() == pytest.approx(math.cos(0.3))
    zero = torch.zeros(1, 2)
    assert guidance_similarity(zero, zero).item() == 1
    assert guidance_similarity(zero, zero + 1).item() == 0


def test_each_sample_switches_for_good():
    guidance = AdaptiveGuidance(3.0, threshold=0.9)
    near, far = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 1.0])
    cond = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    first, state = guidance(cond, torch.stack([near, far]), None)
    assert first.tolist() == [pytest.approx([1.0, -0.2]), [3.0, -2.0]]  # u + 3 (c - u), both still guided
    assert state.tolist() == [True, False]
    assert guidance.needs(state)
    second, state = guidance(cond, torch.stack([far, near]), state)
    assert second.tolist() == [[1.0, 0.0], pytest.approx([1.0, -0.2])]
    assert state.tolist() == [True, True]
    assert not guidance.needs(state)
    assert torch.equal(guidance(cond, None, state)[0], cond)


@pytest.mark.parametrize("data_dims", [None, 1])
def test_evaluations_and_samples_on_an_exact_ring(data_dims):
    """Against Euler steps by hand, sample by sample."""
    truth, scale, bar = ring(5, radius=2.0, scale=0.5), 2.5, 0.97
    one = truth.component(0)
    start = 20 * torch.randn(6, 2, generator=rng(), dtype=torch.float64)
    sigmas = karras_sigmas(15, high=20.0)
    ends, costs = [], []
    for x in start:
        guided, cost = True, 0
        for s, lower in zip(sigmas.tolist(), sigmas.tolist()[1:]):
            c = u = one.denoise(x[None], s)[0]
            cost += 1
            if guided:
                u = truth.denoise(x[None], s)[0]
                cost += 1
                guided = bool((c @ u) / (c.norm() * u.norm()) < bar)
            x = x + (x - (u + scale * (c - u))) / s * (lower - s)
        ends.append(x)
        costs.append(cost)
    counted = Counted(truth.denoise)
    denoise = Guided(AdaptiveGuidance(scale, threshold=bar, data_dims=data_dims), one.denoise, counted)
    torch.testing.assert_close(euler(denoise, start, sigmas), torch.stack(ends))
    assert counted.evaluations + 15 == max(costs)
    assert 15 < min(costs) < max(costs) < 30
    again = euler(denoise, start, sigmas)  # starts anew
    torch.testing.assert_close(again, torch.stack(ends))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_switches_as_high_precision_does(dtype):
    """Cosines near the threshold, of predictions so long that their squares overflow in float16."""
    cond, noise = (p.to(dtype).double() for p in 40 * torch.randn(2, 500, 96, generator=rng(), dtype=torch.float64))
    uncond = (cond + 0.1345 * noise).to(dtype)
    cosine = torch.cosine_similarity(cond, uncond.double(), dim=-1)
    assert 0.1 < (cosine >= 0.991).double().mean() < 0.9
    _, state = AdaptiveGuidance(3.0)(cond.to(dtype), uncond, None)
    assert torch.equal(state, cosine >= 0.991)
    found = guidance_similarity(cond.to(dtype), uncond)
    assert found.dtype is dtype
    torch.testing.assert_close(found, cosine.to(dtype))


def test_similarities_are_cosines_at_any_length():
    tiny = torch.tensor([[3e-30, 4e-30]])
    assert guidance_similarity(tiny, tiny.flip(1)).item() == pytest.approx(0.96)
    cond = torch.randn(1000, 3, generator=rng())
    for found in (guidance_similarity(cond, 3 * cond), -guidance_similarity(cond, -3 * cond)):
        assert found.max() <= 1
        assert found.min() > 1 - 1e-6


def test_its_limits():
    cond, uncond = torch.randn(2, 4, 3, generator=rng()).unbind()
    never, state = AdaptiveGuidance(2.0, threshold=1.0), None
    for _ in range(3):
        guided, state = never(cond, uncond, state)
        torch.testing.assert_close(guided, classifier_free(2.0)(cond, uncond, None)[0])
    always = AdaptiveGuidance(2.0, threshold=-1.0)
    assert not always.needs(always(cond, uncond, None)[1])


def test_regression_finds_the_combination():
    """Unconditional predictions that are a known combination: u_2 = 0.5 c_2 - 0.3 c_0 + 0.8 u_1."""
    cond, uncond = torch.randn(2, 4, 30, 2, generator=rng(), dtype=torch.float64).unbind()
    uncond[2] = 0.5 * cond[2] - 0.3 * cond[0] + 0.8 * uncond[1]
    guidance = LinearAG.fitted(cond, uncond, scale=4.0, replaced=(2,), until=3)
    expected = torch.tensor([-0.3, 0.0, 0.5, 0.0, 0.8], dtype=torch.float64)  # c_0 c_1 c_2 u_0 u_1
    torch.testing.assert_close(guidance.weights[2], expected)
    state, plain = None, classifier_free(4.0)
    for step in range(4):
        needed = guidance.needs(state)
        assert needed == (step in (0, 1))
        guided, state = guidance(cond[step], uncond[step] if needed else None, state)
        wanted = cond[3] if step == 3 else plain(cond[step], uncond[step], None)[0]
        torch.testing.assert_close(guided, wanted)


def test_the_fit_is_least_squares():
    cond, uncond = torch.randn(2, 3, 50, 4, generator=rng(), dtype=torch.float64).unbind()
    weight = LinearAG.fitted(cond, uncond, scale=4.0, replaced=(1,)).weights[1]
    past = torch.stack([cond[0], cond[1], uncond[0]]).flatten(1)
    residual = uncond[1].flatten() - weight @ past
    assert (past @ residual).abs().max() < 1e-9  # orthogonal to all that it is made of


def test_the_cut_of_the_regression():
    """Two predictions that differ by 1e-4 in one direction: plain least squares uses it, the cut leaves it out."""
    g = rng()
    base, small, rest = torch.linalg.qr(torch.randn(60, 3, generator=g, dtype=torch.float64)).Q.T
    cond = torch.stack([base, base + 1e-4 * small]).view(2, 30, 2)
    uncond = torch.stack([0 * rest, base + 0.5 * small]).view(2, 30, 2)
    # u_1 = base + 5000 (c_1 - c_0)
    plain = LinearAG.fitted(cond, uncond, scale=2.0, replaced=(1,), rtol=0.0).weights[1]
    torch.testing.assert_close(plain, torch.tensor([-4999.0, 5000.0, 0.0]).double())
    cut = LinearAG.fitted(cond, uncond, scale=2.0, replaced=(1,)).weights[1]
    torch.testing.assert_close(cut, torch.tensor([0.5, 0.5, 0.0]).double(), atol=1e-4, rtol=0)


def test_estimates_are_remembered_as_predictions():
    """Steps 1 and 2 both estimated: the second builds on the first, on a Gaussian pair where both are exact."""
    truth, one = ring(1, radius=1.0, scale=1.0), ring(1, radius=3.0, scale=1.0)
    start, sigmas, plain = 5 * torch.randn(40, 2, generator=rng(), dtype=torch.float64), karras_sigmas(8, high=5), []

    def watched(cond, uncond, state):
        plain.append((cond, uncond))
        return classifier_free(2.0)(cond, uncond, state)

    full = dpm_solver_pp(Guided(watched, one.denoise, truth.denoise), start, sigmas)
    cond, uncond = (torch.stack(p) for p in zip(*plain))
    guidance = LinearAG.fitted(cond[:, :20], uncond[:, :20], scale=2.0, replaced=(3, 4, 6))
    counted = Counted(truth.denoise)
    found = dpm_solver_pp(Guided(guidance, one.denoise, counted), start, sigmas)
    assert counted.evaluations == 5
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)  # linear denoisers: nothing is lost


def test_refusals():
    cond = torch.zeros(2, 3)
    recorded = torch.zeros(3, 2, 3)
    for call, message in (
        (lambda: AdaptiveGuidance(2.0, threshold=1.1), "threshold: expected a number >= -1 and <= 1"),
        (lambda: AdaptiveGuidance(2.0, threshold=torch.tensor(0.9)), "threshold: expected a number, got a tensor"),
        (lambda: AdaptiveGuidance(2.0)(cond, None, None), "uncond: expected a tensor"),
        (lambda: guidance_similarity(cond, cond, data_dims=3), "data_dims: expected a whole number"),
        (lambda: LinearAG(2.0, {2: torch.zeros(3)}), "weights: expected 2 step"),
        (lambda: LinearAG(2.0, {}, until=0), "until: expected a whole number"),
        (lambda: LinearAG(2.0, {})(cond, None, None), "uncond: expected a tensor"),
        (lambda: LinearAG.fitted(recorded, recorded, scale=2.0, replaced=(1,), rtol=1.0), "rtol: expected a number"),
        (lambda: LinearAG.fitted(recorded, recorded, scale=2.0, replaced=(0,)), "replaced: expected a whole number"),
        (lambda: LinearAG.fitted(recorded, recorded[:2], scale=2.0, replaced=(1,)), "uncond: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
