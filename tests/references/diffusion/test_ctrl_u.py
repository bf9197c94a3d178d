"""Ctrl-U against torch.distributions, its optimum and its gradients in closed form, and diffusers' scheduler."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch.distributions import Categorical, kl_divergence

from lossary.diffusion import CtrlULoss, reading_disagreement, uncertainty_aware_reward_loss
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import tabulated


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def readings(*shape):
    return torch.randn(2, *shape, generator=rng(), dtype=torch.float64).unbind()


def test_disagreement_is_the_divergence_of_the_second_from_the_first():
    first, second = readings(4, 3, 5)
    expected = kl_divergence(Categorical(logits=second), Categorical(logits=first))
    torch.testing.assert_close(reading_disagreement(first, second), expected)
    assert not torch.allclose(reading_disagreement(second, first), expected)
    numbers = reading_disagreement(torch.tensor([0.5, 1.0]), torch.tensor([0.75, -1.0]), on="real")
    assert numbers.tolist() == [0.25, 2.0]


def test_classes_that_a_reading_rules_out():
    """Of three classes: neither allows the third; or only the second rules it out; or only the first."""
    inf = math.inf
    first, second = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_().unbind()
    assert reading_disagreement(first, first).item() == 0.0
    assert reading_disagreement(second, first).item() == pytest.approx(math.log(3 / 2))
    assert reading_disagreement(first, second).item() == inf
    z = torch.tensor([[0.0, 1.0, -inf], [2.0, 0.0, -inf]], requires_grad=True)
    reading_disagreement(z[0], z[1]).backward()
    p, q = z[0, :2].detach().softmax(0), z[1, :2].detach().softmax(0)
    torch.testing.assert_close(z.grad[0], torch.cat([p - q, torch.zeros(1)]))
    assert z.grad.isfinite().all()


def test_values_by_hand():
    """L = log 4 with p = (1/4, 3/4); U of (1/2, 1/2) from it is log 2 - log(3) / 2."""
    first, second = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    u = math.log(2) - math.log(3) / 2
    for penalty, trust in ((1.0, 1.0), (0.5, 2.0), (3.0, 0.0)):
        found = uncertainty_aware_reward_loss(first, torch.tensor([0]), other=second, penalty=penalty, trust=trust)
        expected = math.exp(-trust * u) * math.log(4) + penalty * trust * u
        assert found.item() == pytest.approx(expected, rel=1e-5)
    hidden = uncertainty_aware_reward_loss(first, torch.tensor([-1]), other=second)
    assert hidden.item() == 0
    a, b, c = torch.tensor([[1.0], [3.0], [1.5]])
    real = uncertainty_aware_reward_loss(a, b, other=c, on="real", penalty=2.0)
    assert real.item() == pytest.approx(4 * math.exp(-0.5) + 1.0)


def test_an_infinite_disagreement():
    """First: class 0 alone; second: both classes alike, so U is infinite. L is 0 for class 0, infinite for class 1."""
    z = torch.tensor([[0.0, -math.inf], [0.0, 0.0]], dtype=torch.float64).expand(2, 2, 2).clone().requires_grad_()
    first, second, target = z[:, 0], z[:, 1], torch.tensor([0, 1])

    def found(**given):
        return uncertainty_aware_reward_loss(first, target, other=second, **given)

    plain = F.cross_entropy(first, target, reduction="none")
    assert plain.tolist() == [0.0, math.inf]
    assert torch.equal(found(trust=0.0), plain)
    assert found().tolist() == [math.inf, math.inf]
    assert found(penalty=0.0).tolist() == [0.0, 0.0]
    (slope,) = torch.autograd.grad(found(trust=0.0)[0], z)
    assert torch.equal(slope, torch.zeros_like(z))  # p is the target already, and the second reading does not count
    near = torch.tensor([[0.0, -700.0]], dtype=torch.float64)  # U is 349.3, L 700
    value = uncertainty_aware_reward_loss(near, target[1:], other=second[1:], penalty=0.0)
    assert value.item() == pytest.approx(700 * math.exp(math.log(2) - 350), rel=1e-9)  # on its way to 0
    a, b = torch.tensor([math.inf]), torch.tensor([1.0])
    assert uncertainty_aware_reward_loss(a, b, other=b, on="real").item() == math.inf
    assert uncertainty_aware_reward_loss(b, b, other=a, on="real", trust=0.0).item() == 0.0


@pytest.mark.parametrize(("loss", "penalty"), [(5.0, 0.5), (0.3, 0.1), (0.2, 1.0)])
def test_a_free_uncertainty_makes_large_losses_logarithmic(loss, penalty):
    """One number for U, by the squared error of 0 from sqrt(L) and a second reading U away."""

    def value(u):
        numbers = torch.tensor([[0.0], [math.sqrt(loss)], [u]], dtype=torch.float64)
        return uncertainty_aware_reward_loss(
            numbers[0], numbers[1], other=numbers[2], on="real", penalty=penalty
        ).item()

    found = minimize_scalar(value, bounds=(0.0, 10.0), method="bounded", options={"xatol": 1e-9})
    best = max(0.0, math.log(loss / penalty))
    assert found.x == pytest.approx(best, abs=1e-4)
    expected = penalty * (1 + math.log(loss / penalty)) if best else loss
    assert found.fun == pytest.approx(expected, abs=1e-6)


def test_gradients_in_closed_form():
    """p, q softmax of both readings: e^-U (p - y) + (penalty - L e^-U) (p - q), and that factor times dU / d second."""
    first, second = (z.requires_grad_() for z in readings(6, 4))
    target, penalty = torch.tensor([0, 1, 2, 3, 0, 1]), 0.7
    loss = uncertainty_aware_reward_loss(first, target, other=second, penalty=penalty)
    by_first, by_second = torch.autograd.grad(loss.sum(), (first, second))
    p, q = first.detach().softmax(-1), second.detach().softmax(-1)
    u = (q * (q / p).log()).sum(-1, keepdim=True)
    missed = -p.gather(1, target[:, None]).log()
    factor = penalty - missed * (-u).exp()
    torch.testing.assert_close(by_first, (-u).exp() * (p - F.one_hot(target, 4)) + factor * (p - q))
    torch.testing.assert_close(by_second, factor * q * ((q / p).log() - u))


def test_the_whole_loss_by_hand():
    """An exact denoiser, its responsibilities as the reward, some samples above the threshold."""
    world, g = ring(3, radius=2.0, scale=0.5), rng(2)
    clean, target = world.sample(5, generator=g)
    noise = torch.randn(5, 2, generator=g, dtype=torch.float64)
    sigma = torch.tensor([0.2, 2.0, 0.9, 3.0, 1.0], dtype=torch.float64)

    def reward(x):
        return world.responsibilities(x, 0.5).log()

    loss = CtrlULoss(reward, threshold=1.0, weight=0.3, penalty=2.0)
    found = loss(world.denoise, clean, target, sigma, 1.5 * sigma, noise)
    estimates = [world.denoise(clean + s[:, None] * noise, s) for s in (sigma, 1.5 * sigma)]
    for i in range(5):
        error = 0.0
        for estimate, level in zip(estimates, (sigma[i], 1.5 * sigma[i])):
            implied = (clean[i] + level * noise[i] - estimate[i]) / level
            error += (implied - noise[i]).square().mean().item() / 2
        p, q = (world.responsibilities(e[i], 0.5) for e in estimates)
        u = (q * (q / p).log()).sum().item()
        rewarded = math.exp(-u) * -p[target[i]].log().item() + 2.0 * u
        expected = error + (0.3 * 5 / 3 * rewarded if sigma[i] <= 1 else 0.0)
        assert found[i].item() == pytest.approx(expected)
    stacked = loss(world.denoise, clean[None], target[None], sigma[None], 1.5 * sigma[None], noise[None])
    torch.testing.assert_close(stacked[0], found)
    none = loss(world.denoise, clean, target, sigma + 1, sigma + 2, noise)
    plain = CtrlULoss(reward, threshold=1.0, weight=0.0)(world.denoise, clean, target, sigma + 1, sigma + 2, noise)
    torch.testing.assert_close(none, plain)


@pytest.mark.parametrize("on", ["classes", "real"])
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_nothing_gets_through_from_above_the_threshold(on, wrong):
    """A reward that breaks down on large estimates, as they are where noise is strong; other samples do not notice."""
    clean, noise = torch.randn(2, 4, 3, generator=rng()).unbind()
    target = torch.tensor([0, 1, 2, 0]) if on == "classes" else clean[:, 0]
    sigma = torch.tensor([0.1, 50.0, 0.2, 60.0])

    def reward(x, broken):
        x = x * torch.where(x.abs() > 10, broken, 1.0)
        return x if on == "classes" else x[:, 0]

    found = []
    for broken in (wrong, 0.0):
        scale = torch.ones(3, requires_grad=True)
        loss = CtrlULoss(lambda x, broken=broken: reward(x, broken), threshold=1.0, on=on, penalty=1.0)
        values = loss(lambda x, s, scale=scale: scale * x, clean, target, sigma, 1.1 * sigma, noise)
        found.append((values, *torch.autograd.grad(values.sum(), scale)))
    for broken, sound in zip(*found):
        assert broken.isfinite().all()
        torch.testing.assert_close(broken, sound)


def test_the_first_level_decides_alone():
    clean, noise, level = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.5, 2.0])
    loss = CtrlULoss(lambda x: x, threshold=1.0, weight=1.0, penalty=1.0)
    found = loss(lambda x, s: x, clean, torch.tensor([0, 0]), level, level.flip(0), noise)
    assert found.tolist() == pytest.approx([1 + 2 * math.log(3), 1.0])  # one of two counts, twice


def test_maps_are_averaged_over_what_is_known():
    """A label map with one element hidden; the reward reads classes off the last dimension."""
    clean = torch.zeros(2, 2, 3)
    target = torch.tensor([[0, -1], [-1, -1]])
    sigma, noise = torch.full((2,), 0.5), torch.randn(2, 2, 3, generator=rng())
    loss = CtrlULoss(lambda x: x, threshold=1.0, weight=1.0, penalty=1.0)

    def denoise(x, sigma):
        return 2 * x

    found = loss(denoise, clean, target, sigma, 2 * sigma, noise)
    values = uncertainty_aware_reward_loss(noise, target, other=2 * noise, penalty=1.0)
    errors = ((2 * noise.flatten(1) * 0.5 / 0.5) ** 2).mean(1)
    torch.testing.assert_close(found, errors + torch.stack([values[0, 0], torch.tensor(0.0)]))
    numbers = CtrlULoss(lambda x: x[..., 0], threshold=1.0, on="real", weight=1.0, penalty=1.0)
    found = numbers(denoise, clean, torch.ones(2, 2), sigma, 2 * sigma, noise)
    gap = noise[..., 0]
    expected = ((-gap.abs()).exp() * (gap - 1) ** 2 + gap.abs()).mean(1)
    torch.testing.assert_close(found, errors + expected)


def test_the_official_loop_on_diffusers_scheduler():
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = ddpm.DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 1, 3, padding=1).double()

    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, t):
            return self.conv(x) * (1 + t.view(-1, 1, 1, 1) / 100)

    network, segmenter = Noise(), torch.nn.Conv2d(1, 4, 1).double()
    latents = torch.randn(3, 1, 4, 4, generator=rng(), dtype=torch.float64)
    noise = torch.randn(3, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    labels = torch.randint(4, (3, 4, 4), generator=rng(2))
    t = torch.tensor([3, 90, 30])

    both, twice = torch.cat([t, t + 1]), torch.cat([noise, noise])
    noisy = scheduler.add_noise(torch.cat([latents, latents]), twice, both)
    predicted = network(noisy, both.double())
    pretrain = F.mse_loss(predicted, twice)
    clean = torch.cat([scheduler.step(*a, generator=rng()).pred_original_sample for a in zip(predicted, both, noisy)])
    output = segmenter(clean[:, None])
    primary, auxiliary = output[:3], output[3:]
    u = F.kl_div(primary.log_softmax(1), auxiliary.softmax(1), reduction="none").sum(1)
    reward = (F.cross_entropy(primary, labels, reduction="none") * (-u).exp()).mean((-1, -2))
    below = t <= 40
    expected = pretrain + 0.1 * reward[below].mean() + u.mean((-1, -2))[below].mean()

    process = tabulated(scheduler.alphas_cumprod.double())
    sigma, other = (process.ratio(s.double()) for s in (t, t + 1))
    loss = CtrlULoss(lambda x: segmenter(x).movedim(1, -1), threshold=process.ratio(torch.tensor(40.0)).item())
    found = loss(Denoiser(network, process), latents, labels, sigma, other, noise)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-4, atol=1e-5)


def test_other_precisions():
    first, second = (z.to(torch.bfloat16) for z in readings(3, 4))
    found = uncertainty_aware_reward_loss(first, torch.tensor([0, 1, 2]), other=second)
    assert found.dtype is torch.bfloat16
    assert found.isfinite().all()
    extreme = torch.tensor([[1e4, -1e4]])
    assert uncertainty_aware_reward_loss(extreme, torch.tensor([1]), other=-extreme).isfinite().all()


def test_refusals():
    z, none, level = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2)
    loss = CtrlULoss(lambda x: x, threshold=1.0)
    for call, message in (
        (lambda: reading_disagreement(z, z[:1]), "second: expected shape"),
        (lambda: reading_disagreement(z, z, on="pixels"), "on: expected one of"),
        (lambda: uncertainty_aware_reward_loss(z, z, other=z), "target: expected an int64 tensor"),
        (lambda: uncertainty_aware_reward_loss(z, z[:1], other=z, on="real"), "target: expected shape"),
        (lambda: uncertainty_aware_reward_loss(z, none, other=z, penalty=-1.0), "penalty: expected a number >= 0"),
        (lambda: CtrlULoss(None, threshold=1.0, weight=-1.0), "weight: expected a number >= 0"),
        (lambda: CtrlULoss(None, threshold=1.0, on="depth"), "on: expected one of"),
        (lambda: loss(None, z, none, level, level[:1], z), "other: expected shape"),
        (lambda: loss(None, z[:1], none, level, level, z), "clean: expected shape"),
        (lambda: loss(None, z, none, level, level, z[:1]), "noise: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
