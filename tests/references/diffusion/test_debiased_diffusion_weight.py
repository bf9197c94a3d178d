"""Debiased weight, against formulas as trainers write them, diffusers' own SNR, one objective in three forms, and a
mixture's posterior mean."""

import numpy as np
import pytest
import torch

from lossary.diffusion import debiased_estimation_loss, snr_weight
from lossary.diffusion._denoiser import from_clean
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._process import cosine, tabulated

KINDS = ("constant", "clean", "debiased", "min_snr", "soft_min_snr", "p2")


def test_the_weight_of_the_linear_schedule():
    """As in the official code: numpy, from the betas."""
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    expected = 1 / np.sqrt(1 / (1 - cumulative) - 1)
    found = snr_weight(torch.from_numpy(cumulative / (1 - cumulative)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[0].item() == pytest.approx(0.0100, abs=1e-4)
    assert found[-1].item() == pytest.approx(157.4, rel=1e-3)


@pytest.mark.parametrize("snr", [0.02, 3.0, 40.0])
def test_every_weight_as_it_is_known_for_noise(snr):
    noise = {kind: snr_weight(torch.tensor(snr, dtype=torch.float64), kind=kind).item() for kind in KINDS}
    assert noise == {
        "constant": pytest.approx(1.0),
        "clean": pytest.approx(1 / snr),
        "debiased": pytest.approx(snr**-0.5),
        "min_snr": pytest.approx(min(1.0, 5 / snr)),
        "soft_min_snr": pytest.approx(1 / (snr + 1)),  # (sigma^2 / (sigma^2 + 1)) in sigma
        "p2": pytest.approx(1 / (1 + snr)),
    }
    at = torch.tensor(snr, dtype=torch.float64)
    assert snr_weight(at, kind="min_snr", prediction="v", gamma=3.0).item() == pytest.approx(min(snr, 3) / (snr + 1))
    assert snr_weight(at, kind="p2", gamma=0.5).item() == pytest.approx((1 + snr) ** -0.5)
    assert snr_weight(at, kind="soft_min_snr", gamma=4.0).item() == pytest.approx(4 / (snr + 4))
    assert snr_weight(at, kind="clean", prediction="v").item() == pytest.approx(1 / (1 + snr))


@pytest.mark.parametrize("kind", KINDS)
def test_one_objective_whatever_is_predicted(kind):
    """The same wrong guess at x_0, told as noise and as v, is charged the same."""
    g = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 8, 3, generator=g, dtype=torch.float64).unbind()
    alpha = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)[:, None]
    sigma = (1 - alpha**2).sqrt()
    noise_of = (alpha * clean + sigma * noise - alpha * wrong) / sigma
    errors = {
        "clean": wrong - clean,
        "noise": noise_of - noise,
        "v": (alpha * noise_of - sigma * wrong) - (alpha * noise - sigma * clean),
    }
    snr = (alpha / sigma).square()
    charged = [snr_weight(snr, kind=kind, prediction=p) * error.square() for p, error in errors.items()]
    torch.testing.assert_close(charged[1], charged[0])
    torch.testing.assert_close(charged[2], charged[0])


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [("noise", lambda snr: snr**-0.5), ("clean", lambda snr: snr**0.5), ("v", lambda snr: snr**0.5 / (1 + snr))],
)
def test_a_mixtures_posterior_mean_minimises_it(prediction, weight):
    """Off it by h at all times, the expected loss, integrated exactly, is higher by h^2 times the mean weight."""
    truth, process = Mixture(torch.tensor([[-1.0], [0.5]]).double(), 0.4, torch.tensor([1.0, 2.0])), cosine()
    nodes, shares = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    clean = (truth.means[:, None] + truth.scales[:, None, None] * nodes[:, None])[:, :, None]  # (2, 60, 1, 1)
    probability = truth.weights[:, None, None] * shares[:, None] * shares / shares.sum() ** 2
    clean, noise = clean.expand(2, 60, 60, 1).reshape(-1, 1), nodes.repeat(120)[:, None]
    times = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    snr = process.log_snr(times).exp()

    def expected(off):
        losses = []
        for t in times.expand(len(clean), 3).T:
            x_t = process.noised(clean, noise, t)
            mean = truth.denoise(x_t / process.alpha(t)[:, None], process.ratio(t))
            best, target = (from_clean(x, x_t, t, process, prediction) for x in (mean, clean))
            values = debiased_estimation_loss(best + off, target, snr=process.log_snr(t).exp(), prediction=prediction)
            losses.append((probability.flatten() * values).sum())
        return torch.stack(losses).mean().item()

    for off in (-0.1, 0.1, 1.0):
        assert expected(off) - expected(0.0) == pytest.approx(off**2 * weight(snr).mean().item(), rel=1e-4)


def test_with_diffusers():
    """A scheduler's SNR, its noising and its model, unchanged."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    t = torch.tensor([5, 400, 900])
    process = tabulated(scheduler.alphas_cumprod)
    snr = compute_snr(scheduler, t)
    torch.testing.assert_close(snr, process.log_snr(t.float()).exp(), rtol=1e-3, atol=0)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    clean, noise = torch.randn(2, 3, 1, 8, 8)
    predicted = model(scheduler.add_noise(clean, noise, t), t).sample
    losses = debiased_estimation_loss(predicted, noise, snr=snr)
    by_hand = torch.stack([(p - n).square().mean() / s.sqrt() for p, n, s in zip(predicted, noise, snr)])
    torch.testing.assert_close(losses, by_hand)
    losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bounds_and_the_end_of_the_schedule():
    snr = torch.tensor([0.0, 1e6])
    clamped = snr_weight(snr, bounds=(0.01, 1000.0))
    torch.testing.assert_close(clamped, torch.tensor([10.0, 1000.0**-0.5]))
    assert snr_weight(snr, prediction="v")[0] == 0  # finite in pure noise
    assert snr_weight(snr.bfloat16() + 1).dtype == torch.bfloat16
    stacked = debiased_estimation_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), snr=torch.full((2, 3), 0.25))
    torch.testing.assert_close(stacked, torch.full((2, 3), 2.0))


def test_refusals():
    snr, x = torch.ones(2), torch.zeros(2, 3)
    for call, message in (
        (lambda: snr_weight(snr, kind="snr"), "kind: expected one of"),
        (lambda: snr_weight(snr, prediction="x0"), "prediction: expected one of"),
        (lambda: snr_weight(snr, gamma=2.0), "gamma: kind 'debiased' takes none"),
        (lambda: snr_weight(snr, kind="p2", gamma=0.0), "gamma: expected a number > 0"),
        (lambda: snr_weight(snr, bounds=(2.0, 1.0)), "bounds: expected 0 <= lowest < highest"),
        (lambda: snr_weight(torch.ones(2, dtype=torch.long)), "snr: expected a floating-point tensor"),
        (lambda: debiased_estimation_loss(x, x[:1], snr=snr), "target: expected shape"),
        (lambda: debiased_estimation_loss(x, x, snr=torch.ones(3)), "snr: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
