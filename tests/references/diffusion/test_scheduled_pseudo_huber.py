"""Scheduled pseudo-Huber, against scipy's loss, the schedules as trainers write them, and a mixture's posterior."""

import math

import pytest
import torch
from scipy.special import pseudo_huber

from lossary.diffusion import exponential_delta, pseudo_huber_loss, scheduled_pseudo_huber_loss, snr_delta
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._process import cosine


@pytest.mark.parametrize("delta", [0.01, 0.7, 20.0])
def test_it_is_twice_scipys(delta):
    r = torch.linspace(-30, 30, 41, dtype=torch.float64)
    expected = 2 * torch.from_numpy(pseudo_huber(delta, r.numpy()))
    torch.testing.assert_close(pseudo_huber_loss(r + 1, torch.ones_like(r), delta=delta), expected)
    trainers = 2 * delta * ((r.square() + delta**2).sqrt() - delta)
    torch.testing.assert_close(pseudo_huber_loss(r, torch.zeros_like(r), delta=delta), trainers)


def test_small_residuals_keep_their_digits():
    """The formula as printed cancels to 0 here in float32."""
    r = torch.tensor([1e-5])
    assert pseudo_huber_loss(r, torch.zeros(1)).item() == pytest.approx(1e-10, rel=1e-5)


def test_an_outlier_pulls_no_harder_than_twice_delta():
    input = torch.tensor([0.0, 0.0], requires_grad=True)
    pseudo_huber_loss(input, torch.tensor([1e4, 1e-4]), delta=0.3).sum().backward()
    assert input.grad.tolist() == pytest.approx([-0.6, -2e-4], rel=1e-4)


def test_the_schedules_as_trainers_have_them():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler()
    t, c = torch.tensor([0, 1, 500, 999]), 0.07
    exponential = torch.exp(math.log(c) / scheduler.config.num_train_timesteps * t)
    torch.testing.assert_close(exponential_delta(t / scheduler.config.num_train_timesteps, smallest=c), exponential)
    cumulative = scheduler.alphas_cumprod[t]
    sigmas = ((1 - cumulative) / cumulative) ** 0.5
    by_noise = (1 - c) / (1 + sigmas) ** 2 + c
    torch.testing.assert_close(snr_delta(sigmas, smallest=c), by_noise)
    assert (by_noise.diff() < 0).all()


def test_each_sample_has_its_delta():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, **blocks
    )
    scheduler, t = diffusers.DDPMScheduler(), torch.tensor([3, 500, 990])
    clean, noise = torch.randn(2, 3, 1, 8, 8)
    predicted = model(scheduler.add_noise(clean, noise, t), t).sample
    delta = exponential_delta(t / 1000)
    found = scheduled_pseudo_huber_loss(predicted, noise, delta=delta)
    for s in range(3):
        r = (predicted[s] - noise[s]).detach().double().numpy()
        assert found[s].item() == pytest.approx(2 * pseudo_huber(delta[s].item(), r).mean(), rel=1e-5)
    found.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_leads_from_a_mixtures_posterior_mean_to_its_median():
    """One tenth of the data lies far off; x_t leaves open where it came from."""
    truth = Mixture(torch.tensor([[0.0], [6.0]], dtype=torch.float64), 0.3, torch.tensor([0.9, 0.1]))
    t = torch.tensor(0.8, dtype=torch.float64)
    alpha, sigma, x_t = cosine().alpha(t), cosine().sigma(t), 1.4
    clean = torch.linspace(-3, 9, 20_001, dtype=torch.float64)
    noise = (x_t - alpha * clean) / sigma
    posterior = (truth.log_density(clean[:, None]) - 0.5 * noise.square()).softmax(0)

    def best(delta):
        """Where the slope of the expected loss is 0."""
        low, high = noise.min().item(), noise.max().item()
        for _ in range(60):
            guess = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
            values = scheduled_pseudo_huber_loss(
                guess.expand(len(noise), 1), noise[:, None], delta=torch.full_like(noise, delta)
            )
            (posterior * values).sum().backward()
            low, high = (low, guess.item()) if guess.grad > 0 else (guess.item(), high)
        return low

    mean = truth.denoise(x_t / alpha[None, None], sigma / alpha).item()
    assert best(1e4) == pytest.approx(((x_t - alpha * mean) / sigma).item(), abs=1e-6)
    middle = noise[(posterior.cumsum(0) < 0.5).sum()].item()
    assert best(1e-4) == pytest.approx(middle, abs=1e-3)
    delta = exponential_delta(t, smallest=0.1).item()
    pull = noise - best(delta)
    assert (posterior * pull / (1 + (pull / 0.1**0.8).square()).sqrt()).sum().item() == pytest.approx(0, abs=1e-9)


def test_refusals():
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: pseudo_huber_loss(x, x, delta=0.0), "delta: expected a number > 0"),
        (lambda: exponential_delta(torch.ones(2), smallest=0.0), "smallest: expected a number > 0 and <= 1"),
        (lambda: exponential_delta(torch.ones(2, dtype=torch.long)), "time: expected a floating-point tensor"),
        (lambda: snr_delta(torch.ones(2), smallest=1.5), "smallest: expected a number > 0 and <= 1"),
        (lambda: scheduled_pseudo_huber_loss(x, x, delta=torch.ones(3)), "delta: expected shape"),
        (lambda: scheduled_pseudo_huber_loss(x, x[:1], delta=torch.ones(2)), "target: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
