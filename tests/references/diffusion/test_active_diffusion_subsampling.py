"""Active diffusion subsampling against loops, variances, Gaussian algebra, and the official step in its coordinates."""

import math

import pytest
import torch
from scipy.optimize import brentq

from lossary.diffusion import ActiveDiffusionSampler, dps_step, max_entropy_acquisition
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._mixture import Mixture, ring

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(x):
    return x.unsqueeze(-1)


@pytest.mark.parametrize("kernel", ["positive", "negative"])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_the_score_in_loops(kernel, sigma):
    particles = torch.randn(3, 5, 4, 2, generator=rng(), dtype=DOUBLE)
    measured = torch.tensor([[False, True, False, False]]).repeat(3, 1)
    found = max_entropy_acquisition(particles, measured, sigma=sigma, kernel=kernel)
    for problem in range(3):
        scores = []
        for place in range(4):
            total = 0.0
            for i in range(5):
                inner = 0.0
                for j in range(5):
                    d = sum(float(a - b) ** 2 for a, b in zip(*particles[problem, [i, j], place].tolist()))
                    inner += math.exp((d if kernel == "positive" else -d) / (2 * sigma**2))
                total += math.log(inner)
            scores.append(-math.inf if place == 1 else total if kernel == "positive" else -total)
        assert found[problem] == scores.index(max(scores))


@pytest.mark.parametrize("kernel", ["positive", "negative"])
def test_a_wide_kernel_takes_the_largest_variance(kernel):
    particles = torch.randn(50, 6, 9, 1, generator=rng(), dtype=DOUBLE)
    none = torch.zeros(50, 9, dtype=torch.bool)
    found = max_entropy_acquisition(particles, none, sigma=1e3, kernel=kernel)
    assert torch.equal(found, particles.var(1).squeeze(-1).argmax(-1))


def test_a_narrow_kernel_sees_outliers_or_clusters():
    """Place 0: two halves one apart. Place 1: one particle three away from seven equal ones."""
    halves = torch.tensor([0.0] * 4 + [1.0] * 4)
    outlier = torch.tensor([0.0] * 7 + [3.0])
    particles = torch.stack([halves, outlier], dim=-1)[..., None].double()
    none = torch.zeros(2, dtype=torch.bool)
    assert max_entropy_acquisition(particles, none, sigma=0.2, kernel="positive") == 1
    assert max_entropy_acquisition(particles, none, sigma=0.2, kernel="negative") == 0
    assert max_entropy_acquisition(1e3 * particles, none, sigma=0.01) == 1  # no overflow


def test_where_all_is_measured_there_is_no_place():
    particles = torch.randn(2, 4, 3, 1, generator=rng())
    measured = torch.tensor([[True, True, True], [True, False, True]])
    assert max_entropy_acquisition(particles, measured).tolist() == [-1, 1]


def test_where_the_width_turns_the_choice():
    """Squared distances 1 and 2: halves vary more, the outlier is farther; equal scores at one width alone."""

    def gap(t):  # t = 1 / (2 sigma^2)
        halves = 8 * math.log(4 + 4 * math.exp(t))
        return halves - 7 * math.log(7 + math.exp(2 * t)) - math.log(1 + 7 * math.exp(2 * t))

    turn = math.sqrt(1 / (2 * brentq(gap, 0.1, 20.0)))
    particles = torch.tensor([[0.0] * 4 + [1.0] * 4, [0.0] * 7 + [2.0**0.5]], dtype=DOUBLE).T[..., None]
    none = torch.zeros(2, dtype=torch.bool)
    assert max_entropy_acquisition(particles, none, sigma=1.1 * turn) == 0
    assert max_entropy_acquisition(particles, none, sigma=0.9 * turn) == 1


def test_a_step_is_the_official_one_in_its_coordinates():
    """Signal and noise rates, the norm over all particles, and a gradient by x_t = signal x_0 + noise."""
    truth = ring(3, radius=1.0, scale=0.4)
    angle, after = 1.2, 0.9
    signal, noise, next_signal, next_noise = math.cos(angle), math.sin(angle), math.cos(after), math.sin(after)
    x_t = torch.randn(5, 2, generator=rng(), dtype=DOUBLE, requires_grad=True)
    y, mask, omega = torch.tensor([0.7, 0.0], dtype=DOUBLE), torch.tensor([1.0, 0.0], dtype=DOUBLE), 0.85
    image = truth.denoise(x_t / signal, noise / signal)
    eps = (x_t - signal * image) / noise
    (omega * torch.linalg.norm(y - mask * image)).backward()
    expected = next_signal * image + next_noise * eps - x_t.grad

    def error(clean):
        return (y - mask * clean).square().sum()

    start = (x_t / signal).detach()
    found, clean = dps_step(truth.denoise, start, noise / signal, next_noise / next_signal, error, weight=omega)
    torch.testing.assert_close(found, (expected / next_signal).detach())
    torch.testing.assert_close(clean, image.detach())
    plain, _ = dps_step(truth.denoise, start, 1.0, 0.0, lambda clean: 0 * clean.sum())
    torch.testing.assert_close(plain, truth.denoise(start, 1.0))
    nothing, _ = dps_step(truth.denoise, start, 1.0, 0.5, lambda clean: clean.new_zeros(()))
    assert nothing.isfinite().all()


LEVELS = torch.tensor([20.0, 10.0, 6.0, 4.0, 2.5, 1.6, 1.0, 0.7, 0.5, 0.35, 0.2, 0.0], dtype=DOUBLE)


def test_it_asks_what_tells_the_modes_apart_and_believes_the_answer():
    """Four Gaussians that differ in coordinates 1 and 3 alone; each problem is another of them."""
    means = torch.zeros(4, 5, dtype=DOUBLE)
    means[:, 1] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    means[:, 3] = torch.tensor([-0.8, 0.8, -0.8, 0.8])
    truth = Mixture(means, 0.1)
    target = means[[2, 1, 3]]
    counted = Counted(truth.denoise)
    sampler = ActiveDiffusionSampler(pixels, budget=2, window=(0.0, 0.5), data_dims=1)
    sigmas = torch.cat([torch.linspace(math.log(20), math.log(0.05), 60, dtype=DOUBLE).exp(), torch.zeros(1)])
    x = 20 * torch.randn(3, 16, 5, generator=rng(), dtype=DOUBLE)

    def observe(place):
        return target.gather(1, place[:, None])

    found = sampler(counted, x, sigmas, observe)
    assert counted.evaluations == 60
    assert found.order.sort().values.tolist() == [[1, 3]] * 3
    assert found.measured.sum(-1).tolist() == [2, 2, 2]
    torch.testing.assert_close(found.values.squeeze(-1), torch.where(found.measured, target, 0.0))
    near = torch.cdist(found.particles, truth.means.expand(3, -1, -1)).argmin(-1)
    assert (near == torch.tensor([[2], [1], [3]])).double().mean() > 0.9
    blind = ActiveDiffusionSampler(pixels, budget=0, data_dims=1)(truth.denoise, x, sigmas, observe)
    assert blind.order.shape == (3, 0)
    short = ActiveDiffusionSampler(pixels, budget=0, window=(0.0, 0.1), data_dims=1)
    assert short(truth.denoise, x, sigmas[::30], observe).order.shape == (3, 0)  # no step in the window
    assert torch.cdist(blind.particles, truth.means.expand(3, -1, -1)).argmin(-1).unique().numel() == 4


def test_problems_are_apart_and_given_places_count():
    truth = ring(5, radius=1.0, scale=0.2)
    x = 20 * torch.randn(2, 6, 2, generator=rng(), dtype=DOUBLE)
    target = torch.tensor([[0.9, 0.1], [-0.5, 0.8]], dtype=DOUBLE)
    sampler = ActiveDiffusionSampler(pixels, budget=1, data_dims=1)
    given = torch.tensor([[1], [0]])
    both = sampler(truth.denoise, x, LEVELS, lambda p: target.gather(1, p[:, None]), initial=given)
    assert both.order.tolist() == [[1, 0], [0, 1]]
    assert both.measured.all()
    torch.testing.assert_close(both.values.squeeze(-1), target)
    for k in range(2):
        one = ActiveDiffusionSampler(pixels, budget=1)(
            truth.denoise, x[k], LEVELS, lambda p, k=k: target[k, p, None], initial=given[k]
        )
        torch.testing.assert_close(one.particles, both.particles[k])
        assert one.order.tolist() == both.order[k].tolist()


def test_columns_with_channels_and_the_moments():
    """Columns of a picture of two channels; places are asked for at steps 2, 4 and 6 of 10."""
    asked, step, last = [], 0, None
    scale = torch.tensor([0.1, 1.0, 0.5, 2.0], dtype=DOUBLE)  # of the columns

    def denoise(x, sigma):
        nonlocal step, last
        step, last = step + 1, x * scale**2 / (scale**2 + sigma**2)
        return last

    def observe(place):
        asked.append((step, place.item()))
        return torch.arange(6, dtype=DOUBLE)

    sampler = ActiveDiffusionSampler(lambda x: x.movedim(-1, -3).flatten(-2), budget=3, window=(0.2, 0.8))
    sigmas = torch.linspace(10.0, 0.0, 11, dtype=DOUBLE)
    found = sampler(denoise, 10 * torch.randn(12, 2, 3, 4, generator=rng(), dtype=DOUBLE), sigmas, observe)
    assert asked == [(3, 3), (5, 1), (7, 2)]  # the widest first, after the evaluations of steps 2, 4 and 6
    assert found.values[3].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.values[0].tolist() == [0] * 6
    torch.testing.assert_close(found.particles, last.detach())  # the prediction, not pulled any more


def test_only_measured_places_pull():
    """Independent coordinates: the one that was not measured ends where it ends without measurements."""
    x = torch.randn(4, 2, generator=rng(), dtype=DOUBLE)
    sampler = ActiveDiffusionSampler(pixels, budget=0)

    def half(x, sigma):
        return x / 2

    def observe(place):
        return torch.full((1,), 5.0)

    pulled = sampler(half, x, LEVELS, observe, initial=torch.tensor([1]))
    free = sampler(half, x, LEVELS, observe)
    torch.testing.assert_close(pulled.particles[:, 0], free.particles[:, 0])
    assert (pulled.particles[:, 1] - free.particles[:, 1]).min() > 0.1


def test_refusals():
    x, none = torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)

    def same(x, sigma):
        return x

    for call, message in (
        (lambda: max_entropy_acquisition(pixels(x), none[:2]), "measured: expected bool of shape"),
        (lambda: max_entropy_acquisition(pixels(x), none, kernel="cosine"), "kernel: expected one of"),
        (lambda: max_entropy_acquisition(pixels(x), none, sigma=0.0), "sigma: expected a number > 0"),
        (lambda: max_entropy_acquisition(x, none), "particles: expected at least 3 dimensions"),
        (lambda: dps_step(same, x, 1.0, 2.0, torch.sum), "lower: expected a number >= 0 and < 1"),
        (lambda: ActiveDiffusionSampler(pixels, budget=-1), "budget: expected a whole number >= 0"),
        (lambda: ActiveDiffusionSampler(pixels, budget=1, window=(0.5, 0.2)), r"window\[0\]: expected a number"),
        (lambda: ActiveDiffusionSampler(pixels, budget=4)(same, x, LEVELS, None), "budget: expected at most 3 more"),
        (lambda: ActiveDiffusionSampler(pixels, budget=3)(same, x, LEVELS[:3], None), "budget: expected at most 2 for"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
