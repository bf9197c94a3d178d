"""Phasic fusing and directional consistency, by hand, against a translated Gaussian, and through exact denoisers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lossary.diffusion import (
    PhasicContentFusion,
    cross_domain_structure_guidance,
    directional_distribution_consistency_loss,
    phasic_adaptation_loss,
    phasic_content_weight,
)
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import cosine
from lossary.diffusion._samplers import ancestral, euler


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_minimum_is_a_shift():
    """Gradient descent on free samples from anywhere ends at source + w: same spread, mean of the target."""
    source, target = torch.randn(50, 3, generator=rng()), 4 + torch.randn(9, 3, generator=rng(1))
    direction = target.mean(0) - source.mean(0)
    made = torch.zeros(50, 3, requires_grad=True)
    loss = directional_distribution_consistency_loss(made, source, direction=direction)
    (slope,) = torch.autograd.grad(loss.sum(), made)
    torch.testing.assert_close(made - 1.5 * slope, source + direction)  # its Hessian is 2 / 3
    torch.testing.assert_close((made - 1.5 * slope).mean(0), target.mean(0))
    torch.testing.assert_close(loss, (source + direction).pow(2).sum(-1) / 3)


def test_directions_by_replica():
    made, source = torch.randn(2, 4, 5, 3, generator=rng()).unbind()
    direction = torch.randn(4, 1, 3, generator=rng(1))
    found = directional_distribution_consistency_loss(made, source, direction=direction)
    for s in range(4):
        alone = directional_distribution_consistency_loss(made[s], source[s], direction=direction[s, 0])
        torch.testing.assert_close(found[s], alone)


def test_the_weight_is_the_official_one():
    step = torch.tensor([295.0, 300.0, 301.0, 303.0], dtype=torch.float64)
    torch.testing.assert_close(phasic_content_weight(step / 1000), 1 / (1 + (300 - step).exp()))
    other = phasic_content_weight(torch.tensor([0.4]), boundary=0.5, steepness=10.0)
    assert other.item() == pytest.approx(1 / (1 + math.e))


def test_content_gives_way_to_noise():
    fusion = PhasicContentFusion(lambda both: both, dim=-1)
    features, content = torch.full((3, 4, 2), 5.0), torch.full((3, 4, 2), 9.0, requires_grad=True)
    t = torch.tensor([0.1, 0.3, 0.9])[:, None].expand(3, 4)
    generators = [rng(s) for s in range(3)]
    found = fusion(features, content, t, generator=generators)
    expected = torch.stack([torch.randn(4, 2, generator=rng(s)) for s in range(3)])
    assert (found[..., :2] == 5).all()
    torch.testing.assert_close(found[0, :, 2:], expected[0])
    torch.testing.assert_close(found[1, :, 2:], 4.5 + expected[1] / 2)
    torch.testing.assert_close(found[2, :, 2:], torch.full((4, 2), 9.0))
    assert not found.requires_grad
    conv = torch.nn.Conv2d(6, 3, 3, padding=1)
    maps = PhasicContentFusion(conv)(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(2))
    both = torch.cat([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], dim=1)
    torch.testing.assert_close(maps, conv(both))


def test_the_adaptation_loss_by_hand():
    g, seen = rng(), []
    source, target = torch.randn(2, 4, 3, generator=g, dtype=torch.float64).unbind()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)

    def denoise(x, sigma, *content):
        seen.append((x, sigma, content))
        return 0.5 * x + (content[0] if content else 0.0)

    direction = torch.tensor([1.0, -1.0], dtype=torch.float64)
    call = partial(
        phasic_adaptation_loss,
        denoise,
        source,
        target,
        t,
        process=cosine(),
        encode=lambda x: x[..., :2] ** 2,
        consistency=partial(directional_distribution_consistency_loss, direction=direction),
    )
    found = call(style=lambda x: x[..., 2].abs(), generator=rng(7))
    again = rng(7)
    for i in range(4):
        assert seen[0][1][i].item() == pytest.approx(math.tan(math.pi / 2 * t[i].item()))
    first, second = (torch.randn(4, 3, generator=again, dtype=torch.float64) for _ in range(2))
    for i in range(4):
        sigma = math.tan(math.pi / 2 * t[i].item())
        made = 0.5 * (source[i] + sigma * first[i]) + source[i]
        shift = made[:2] ** 2 - source[i, :2] ** 2 - direction
        far = shift.pow(2).mean() + made[2].abs()
        noisy = target[i] + sigma * second[i]
        implied = (noisy - 0.5 * noisy) / sigma
        error = (implied - second[i]).abs().mean()
        alpha = 20 ** t[i].item()
        expected = (20**0.9 - alpha) * error + (alpha * far if i else -0.8 * (20**0.9 - alpha) * error)
        assert found[i].item() == pytest.approx(expected.item())
    assert seen[0][2] == (source,)
    assert seen[1][2] == ()
    plain = call(generator=rng(7))
    made = 0.5 * (source + seen[0][1][:, None] * first) + source
    torch.testing.assert_close(found - plain, 20**t * made[:, 2].abs() * (t >= 0.3))


def test_at_time_0_the_noise_is_that_of_a_thousandth():
    x, target = torch.randn(2, 3, 2, generator=rng()).unbind()
    call = partial(
        phasic_adaptation_loss,
        lambda x, sigma, *content: 0.9 * x,
        x,
        target,
        process=cosine(),
        encode=lambda x: x,
        consistency=None,
    )
    call.keywords["consistency"] = lambda made, source: (made - source).square().mean(-1)
    start, near = (call(torch.full((3,), t), generator=rng(1)) for t in (0.0, 1e-3))
    ratio = (20**0.9 - 1) / (20**0.9 - 20**1e-3)  # the weights are those of 0
    torch.testing.assert_close(start, ratio * near)
    assert start.isfinite().all()


def test_replicas_have_their_own_noise():
    x, t = torch.randn(2, 5, 3, generator=rng()), torch.rand(2, 5, generator=rng(1)) * 0.8
    one = partial(directional_distribution_consistency_loss, direction=torch.ones(3))

    def loss(x, t, generator):
        return phasic_adaptation_loss(
            lambda x, sigma, *content: 0.3 * x,
            x,
            x + 1,
            t,
            process=cosine(),
            encode=lambda x: x,
            consistency=one,
            generator=generator,
        )

    both = loss(x, t, [rng(0), rng(1)])
    for s in range(2):
        torch.testing.assert_close(both[s], loss(x[s], t[s], rng(s)))


def average(x):
    """A projection: the mean of all coordinates."""
    return x.mean(-1, keepdim=True).expand_as(x)


def test_guided_samples_keep_the_low_frequencies():
    """With a projection and guidance to the very end, the low part is that of the reference, the rest the model's."""
    world = Mixture(torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64), 0.1)
    source = torch.tensor([[5.0, 5.0]], dtype=torch.float64).expand(400, 2)
    sigmas = torch.tensor([3.0, 1.5, 0.7, 0.3, 0.1, 1e-3], dtype=torch.float64)
    start = 3 * torch.randn(400, 2, generator=rng(), dtype=torch.float64)

    def denoise(x, sigma):  # the world's difference of coordinates, and whatever their mean is
        return world.denoise(x - average(x), sigma) + average(x)

    found = cross_domain_structure_guidance(
        denoise, start, sigmas, source=source, until=0.0, low_pass=average, generator=rng(1)
    )
    torch.testing.assert_close(average(found), source, atol=0.02, rtol=0)
    apart = (found - average(found))[:, 0]
    assert apart.abs().mean().item() == pytest.approx(2.0, abs=0.1)
    assert 0.3 < (apart > 0).double().mean().item() < 0.7
    none = cross_domain_structure_guidance(
        denoise, start, sigmas, source=source, until=3.0, low_pass=average, generator=rng(1)
    )
    torch.testing.assert_close(none, ancestral(denoise, start, sigmas, generator=rng(1)))
    ddim = cross_domain_structure_guidance(
        denoise, start, sigmas, source=source, until=3.0, low_pass=average, eta=0.0, generator=rng(1)
    )
    torch.testing.assert_close(ddim, euler(denoise, start, sigmas))


def test_the_reference_has_the_level_it_is_used_at():
    """An exact denoiser of the source: the moments of one posterior step are known; and evaluations count."""
    world, levels = Mixture(torch.zeros(1, 1, dtype=torch.float64), 0.5), []
    source = world.sample(40_000, generator=rng())[0]
    sigmas = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)

    def denoise(x, sigma):
        levels.append(float(sigma))
        return world.denoise(x, sigma)

    start = source + 3 * torch.randn(40_000, 1, generator=rng(1), dtype=torch.float64)
    found = cross_domain_structure_guidance(
        denoise, start, sigmas, source=source, until=0.2, low_pass=lambda x: x, step=0.4, generator=rng(2)
    )
    assert levels == pytest.approx([3.0, 1.4, 1.0, 0.7])
    share = 0.5**2 / 0.7**2
    kept = share + (1 - share) * 0.25 / (0.25 + 0.49)  # of x in the posterior mean
    variance = kept**2 * (0.25 + 0.49) + 0.25 * (1 - share)
    assert found.var().item() == pytest.approx(variance, rel=0.02)
    assert (found * source).mean().item() == pytest.approx(kept * 0.25, rel=0.03)
    levels.clear()
    cross_domain_structure_guidance(denoise, start, sigmas, source=source, until=0.5, low_pass=lambda x: x)
    assert levels == pytest.approx([3.0, 1.01, 1.0])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pictures_are_resized_as_pillow_does(factor):
    """A network that says 0 first and the source then: what comes out is the source's low frequencies."""
    source = torch.randn(1, 2, 16, 24, generator=rng())
    found = cross_domain_structure_guidance(
        lambda x, sigma: source if float(sigma) < 0.5 else torch.zeros_like(source),
        torch.zeros(1, 2, 16, 24),
        torch.tensor([1.0, 1e-6]),
        source=source,
        until=0.0,
        low_pass=factor,
        eta=0.0,
        generator=rng(),
    )
    for channel in range(2):
        picture = Image.fromarray(source[0, channel].numpy())
        small = picture.resize((24 // factor, 16 // factor), Image.Resampling.BICUBIC)
        again = torch.from_numpy(np.array(small.resize((24, 16), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[0, channel], again, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_in_half_precision(dtype):
    def found(source):
        return cross_domain_structure_guidance(
            lambda x, sigma: source if float(sigma) < 0.5 else torch.zeros_like(source),
            torch.zeros_like(source),
            torch.tensor([1.0, 1e-3], dtype=source.dtype),
            source=source,
            until=0.0,
            eta=0.0,
            generator=rng(),
        )

    source = torch.randn(1, 2, 16, 24, generator=rng()).to(dtype)
    low = found(source)
    assert low.dtype is dtype
    torch.testing.assert_close(low.float(), found(source.float()), atol=0.02, rtol=0)


def test_adapting_a_ring_moves_it():
    """A denoiser that is exact but for a shift b, tuned by the loss: b becomes the direction."""
    world, g = ring(4, radius=1.0, scale=0.1), rng()
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([0.5, -1.0], dtype=torch.float64)
    optimizer = torch.optim.SGD([b], lr=0.05)
    for _ in range(60):
        source, target = (world.sample(64, generator=g)[0] for _ in range(2))
        optimizer.zero_grad()
        phasic_adaptation_loss(
            lambda x, sigma, *content: content[0] + b if content else x.detach(),
            source,
            target + direction,
            0.3 + 0.5 * torch.rand(64, generator=g, dtype=torch.float64),
            process=cosine(),
            encode=lambda x: x,
            consistency=partial(directional_distribution_consistency_loss, direction=direction),
            generator=g,
        ).mean().backward()
        optimizer.step()
    torch.testing.assert_close(b.detach(), direction, atol=1e-3, rtol=0)


def test_refusals():
    x, t, levels = torch.zeros(2, 3), torch.full((2,), 0.5), torch.tensor([1.0, 0.0])
    guided = partial(cross_domain_structure_guidance, None, x, levels, until=0.1)
    adapt = partial(phasic_adaptation_loss, None, process=cosine(), encode=None, consistency=None)
    for call, message in (
        (lambda: directional_distribution_consistency_loss(x, x[:1], direction=x[0]), "source: expected shape"),
        (lambda: directional_distribution_consistency_loss(x, x, direction=t), "direction: expected 3 features"),
        (lambda: phasic_content_weight(t, boundary=2.0), "boundary: expected a number"),
        (lambda: phasic_content_weight(t, steepness=0.0), "steepness: expected a number > 0"),
        (lambda: PhasicContentFusion(None)(x, x[:1], t), "content: expected shape"),
        (lambda: adapt(x, x[:1], t), "target: expected shape"),
        (lambda: adapt(x, x, t[:1]), "t: expected shape"),
        (lambda: guided(source=x[:1]), "source: expected shape"),
        (lambda: guided(source=x, low_pass=0), "low_pass: expected a whole number >= 1"),
        (lambda: guided(source=x, step=0.0), "step: expected a number > 0"),
        (lambda: guided(source=x, eta=2.0), "eta: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
