"""The engine of diffusion, against closed forms, brute force and automatic differentiation."""

import itertools
import math

import pytest
import torch
from torch import nn

from lossary.diffusion import (
    AbsorbingGraph,
    ContinuousBFN,
    DiscreteBFN,
    NormalizedEmbedding,
    ParticleFilterSampler,
    RidgeTilt,
    StructureAppearanceLoss,
    UniformGraph,
    decode_embeddings,
    mask_uniformly,
    mehler_score,
    minority_score,
    sample_molrg,
    structure_appearance_guidance,
    target_score_estimate,
)
from lossary.diffusion import _discrete as discrete
from lossary.diffusion import _samplers as samplers
from lossary.diffusion._chain import MarkovChain, random_chain
from lossary.diffusion._denoiser import Counted, Denoiser, denoising_error, from_clean, score_of, to_clean
from lossary.diffusion._distil import (
    Frozen,
    OneStepGenerator,
    ScoreDistillation,
    conditions,
    falling,
    karras_levels,
    log_uniform,
    pushed,
)
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import (
    bridge,
    cosine,
    flow,
    mean_reverting,
    over,
    plain,
    tabulated,
    variance_exploding,
    variance_preserving,
)
from lossary.roles.procedure import advance

PROCESSES = {
    "variance preserving": variance_preserving(),
    "cosine": cosine(),
    "variance exploding": variance_exploding(),
    "plain": plain(),
    "flow": flow(),
    "bridge": bridge(0.7),
    "mean-reverting": mean_reverting(3.0, 0.5),
}
TIMES = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> Mixture:
    means = torch.tensor([[0.0, 1.0, 2.0], [-2.0, 0.5, 0.0]], dtype=torch.float64)
    return Mixture(means, torch.tensor([0.5, 1.2], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))


# Processes and predictions


@pytest.mark.parametrize("name", PROCESSES)
def test_the_time_of_a_ratio_is_its_inverse(name):
    process = PROCESSES[name]
    torch.testing.assert_close(process.time(process.ratio(TIMES)), TIMES)
    assert (process.ratio(TIMES).diff() > 0).all()
    torch.testing.assert_close(process.log_snr(TIMES), -2 * process.ratio(TIMES).log())


@pytest.mark.parametrize("name", ["variance preserving", "cosine"])
def test_variance_is_preserved(name):
    process = PROCESSES[name]
    torch.testing.assert_close(process.alpha(TIMES) ** 2 + process.sigma(TIMES) ** 2, torch.ones_like(TIMES))


def test_the_end_point_pulls():
    x, end, zero = torch.randn(3, 10, 4, generator=rng(), dtype=torch.float64).unbind()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(5)
    at = bridge().noised(x, zero, times, end)
    torch.testing.assert_close(at[:5], x[:5])
    torch.testing.assert_close(at[5:], end[5:])
    far = mean_reverting(50.0, 0.1).noised(x, torch.zeros_like(x), times, end)
    torch.testing.assert_close(far[5:], end[5:])
    with pytest.raises(ValueError, match="end"):
        bridge().noised(x, zero, times)


def test_a_table_is_met_at_its_steps():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)
    process, steps = tabulated(alphas), torch.tensor([0.0, 10.0, 500.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(process.alpha(steps) ** 2, alphas[steps.long()])
    torch.testing.assert_close(process.sigma(steps) ** 2, 1 - alphas[steps.long()])
    torch.testing.assert_close(process.time(process.ratio(steps)), steps)
    torch.testing.assert_close(process.time(process.ratio(steps[[0, -1]]) * torch.tensor([0.5, 2.0])), steps[[0, -1]])


def test_outside_a_table():
    """alpha^2 0.8 and 0.2: sigma / alpha is 1/2 and 2, so 2^(2t - 1) on the line through both."""
    process, times = tabulated(torch.tensor([0.8, 0.2])), torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(process.ratio(times), torch.tensor([1 / 8, 1.0, 8.0]).double(), rtol=1e-7, atol=0.0)
    levels = torch.tensor([0.0, 0.1, 1.0, 100.0, torch.inf], dtype=torch.float64)
    torch.testing.assert_close(
        process.time(levels), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]).double(), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.9, 0.5, 0.0], r"strictly between 0 and 1, got 0; .* something small, such as 2\*\*-24"),
        ([1.0, 0.5, 0.1], "strictly between 0 and 1, got 1;"),
        ([0.9, math.nan, 0.1], "strictly between 0 and 1, got nan;"),
        ([1.5, 0.5, 0.1], "strictly between 0 and 1, got 1.5;"),
        ([0.5], r"shape \(T,\) with T >= 2, got \(1,\)"),
        ([[0.9, 0.5]], r"shape \(T,\) with T >= 2, got \(1, 2\)"),
        ([0.9, 0.4, 0.4], "falling values, got 0.4 and then 0.4;"),
        ([0.1, 0.5], "falling values, got 0.1 and then 0.5;"),
    ],
)
def test_a_table_that_is_refused(table, message):
    with pytest.raises(ValueError, match=f"^alphas_cumprod: expected [^\n]*{message}[^\n]*$"):
        tabulated(torch.tensor(table))


@pytest.mark.parametrize("kind", ["clean", "noise", "v", "score", "velocity"])
@pytest.mark.parametrize("name", ["variance preserving", "cosine", "flow", "plain"])
def test_a_prediction_gives_back_what_it_was_made_of(name, kind):
    process = PROCESSES[name]
    clean, noise = torch.randn(2, 10, 3, generator=rng(), dtype=torch.float64).unbind()
    x = process.noised(clean, noise, TIMES)
    alpha, sigma = process.alpha(TIMES)[:, None], process.sigma(TIMES)[:, None]
    step = 1e-6
    ahead = process.noised(clean, noise, TIMES + step) - process.noised(clean, noise, TIMES - step)
    expected = {
        "clean": clean,
        "noise": noise,
        "v": alpha * noise - sigma * clean,
        "score": -noise / sigma,
        "velocity": ahead / (2 * step),
    }[kind]
    torch.testing.assert_close(from_clean(clean, x, TIMES, process, kind), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_clean(expected, x, TIMES, process, kind), clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clean", "noise", "v", "score", "velocity"])
def test_a_perfect_network_of_any_kind_is_the_same_denoiser(kind):
    process, truth = variance_preserving(), mixture()

    class Perfect(nn.Module):
        def forward(self, x_t, t):
            alpha = process.alpha(t)[:, None]
            clean = truth.denoise(x_t / alpha, process.ratio(t))
            return from_clean(clean, x_t, t, process, kind)

    x = 2 * torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    for sigma in (0.3, torch.linspace(0.1, 5, 6, dtype=torch.float64)):
        torch.testing.assert_close(Denoiser(Perfect(), process, kind)(x, sigma), truth.denoise(x, sigma))


@pytest.mark.parametrize("process", [bridge(), mean_reverting()])
@pytest.mark.parametrize("kind", ["clean", "noise", "v", "score", "velocity"])
def test_a_perfect_network_between_two_ends_is_the_same_denoiser(process, kind):
    """It is handed x_t with the second end point in it, and told that point, as an image-to-image network is."""
    truth, end = mixture(), torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64)
    step = 1e-6

    class Perfect(nn.Module):
        def forward(self, x_t, t, end):
            share = process.end_weight(t)[:, None] * end
            clean = truth.denoise((x_t - share) / process.alpha(t)[:, None], process.ratio(t))
            noise = (x_t - share - process.alpha(t)[:, None] * clean) / process.sigma(t)[:, None]
            if kind == "velocity":
                later, sooner = (process.noised(clean, noise, t + s, end.expand_as(clean)) for s in (step, -step))
                return (later - sooner) / (2 * step)
            return from_clean(clean, x_t - share, t, process, kind)

    x = 2 * torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    denoise, ends = Denoiser(Perfect(), process, kind), end.expand_as(x)
    for sigma in (0.3, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)):
        torch.testing.assert_close(denoise(x, sigma, end, end=ends), truth.denoise(x, sigma), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="end"):
        denoise(x, 0.3, end)
    with pytest.raises(ValueError, match="end"):
        Denoiser(Perfect(), cosine(), "clean")(x, 0.3, end, end=ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_are_told_the_time_whole(dtype):
    process, told = tabulated(torch.linspace(0.999, 0.005, 1000)), []

    class Listening(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x, t):
            told.append((x.dtype, t))
            return self.scale * x

    steps = torch.tensor([333.0, 987.0])
    Denoiser(Listening(), process)(torch.ones(2, 3), process.ratio(steps))
    ((found, t),) = told
    assert found == dtype
    torch.testing.assert_close(t, steps, rtol=0, atol=1e-2)


def test_arithmetic_is_that_of_x_whatever_the_network():
    network = nn.Linear(3, 3).bfloat16()

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            assert (x.dtype, t.dtype) == (torch.bfloat16, torch.float32)
            return self.inner(x)

    x = torch.randn(4, 3, generator=rng())
    assert Denoiser(Timeless(), cosine(), "v")(x, 1.0).dtype == torch.float32
    with pytest.raises(ValueError, match="kind"):
        Denoiser(network, cosine(), "x0")


# The mixture


@pytest.mark.parametrize("sigma", [0.0, 0.7, torch.linspace(0.1, 3, 8, dtype=torch.float64)])
def test_the_score_is_the_gradient_of_the_log_density(sigma):
    truth = mixture()
    x = torch.randn(8, 3, generator=rng(), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(truth.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(truth.score(x, sigma), slope)
    if not isinstance(sigma, float) or sigma > 0:
        torch.testing.assert_close(score_of(truth.denoise, x, sigma), slope)


def test_the_mixture_is_what_it_samples():
    truth = mixture()
    x, component = truth.sample(200_000, generator=rng())
    torch.testing.assert_close(component.double().mean(), torch.tensor(0.75, dtype=torch.float64), atol=4e-3, rtol=0)
    torch.testing.assert_close(x.mean(0), 0.25 * truth.means[0] + 0.75 * truth.means[1], atol=0.02, rtol=0)
    # E log p = minus the entropy; by a second sample and scipy's own density.
    from scipy.stats import multivariate_normal

    peer = sum(
        w * multivariate_normal(m, s**2).pdf(x[:500]) for w, m, s in zip((0.25, 0.75), truth.means.tolist(), (0.5, 1.2))
    )
    torch.testing.assert_close(truth.log_density(x[:500]).exp(), torch.as_tensor(peer))


def test_the_posterior_mean_minimises_the_denoising_error():
    truth = mixture()
    x, _ = truth.sample(20_000, generator=rng(1))
    noise = torch.randn(x.shape, generator=rng(2), dtype=x.dtype)
    sigma = torch.full((len(x),), 0.8, dtype=x.dtype)
    best = denoising_error(truth.denoise, x, sigma, noise).mean()
    for shift in (0.02, -0.02):
        worse = denoising_error(lambda y, s, d=shift: truth.denoise(y, s) + d, x, sigma, noise).mean()
        assert worse - best == pytest.approx(shift**2, abs=3e-4)
    assert denoising_error(truth.denoise, x.view(20, 1000, 3), sigma.view(20, 1000), noise.view(20, 1000, 3)).shape == (
        20,
        1000,
    )


# Samplers

GAUSS = Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.5)
HIGH = 20.0


def exact(start: torch.Tensor, sigma: float) -> torch.Tensor:
    """The ODE's solution for one Gaussian: distances from the mean shrink like the standard deviation."""
    return GAUSS.means + (start - GAUSS.means) * math.sqrt((0.25 + sigma**2) / (0.25 + HIGH**2))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_pp", 2)])
def test_the_error_falls_at_its_order(sampler, order):
    run, low = getattr(samplers, sampler), 0.1
    start = HIGH * torch.randn(50, 2, generator=rng(), dtype=torch.float64)
    errors = []
    for steps in (80, 160):
        sigmas = samplers.karras_sigmas(steps + 1, low=low, high=HIGH)[:-1]
        errors.append((run(GAUSS.denoise, start, sigmas) - exact(start, low)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("sampler", ["ancestral", "sde", "predictor_corrector"])
def test_noisy_samplers_reach_the_variance(sampler):
    sigmas = samplers.karras_sigmas(150, low=0.01, high=HIGH)
    start = HIGH * torch.randn(20_000, 2, generator=rng(), dtype=torch.float64)
    counted = Counted(GAUSS.denoise)
    found = getattr(samplers, sampler)(counted, start, sigmas, generator=rng(1))
    torch.testing.assert_close(found.mean(0), GAUSS.means[0], atol=0.02, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    assert counted.evaluations == (299 if sampler == "predictor_corrector" else 150)


FALLING = torch.tensor([2.0, 1.0, 0.0])
DRAWS = {
    "ancestral": lambda x, g: samplers.ancestral(lambda x, s: x / 2, x, FALLING, generator=g),
    "sde": lambda x, g: samplers.sde(lambda x, s: x / 2, x, FALLING, generator=g),
    "predictor-corrector": lambda x, g: samplers.predictor_corrector(lambda x, s: x / 2, x, FALLING, generator=g),
    "Bayesian flow": lambda x, g: ContinuousBFN(0.1).sample(
        lambda x, s: x / 2, x.shape, steps=2, generator=g, device=x.device
    ),
    "messages": lambda x, g: DiscreteBFN(4).beliefs(x.long(), x[:, 0], generator=g),
    "structure and appearance": lambda x, g: structure_appearance_guidance(
        lambda x, s: x / 2,
        StructureAppearanceLoss(lambda x: (x.flatten(2).mT, x.mean((2, 3))), 0 * x[None, None], x[None, None]),
        FALLING,
        generator=g,
    ),
    "embeddings": lambda x, g: decode_embeddings(lambda z, s: z, NormalizedEmbedding(x), (1, 2), steps=2, generator=g),
    "particles": lambda x, g: ParticleFilterSampler(lambda x, s: x[:, 0], particles=1, at=(), churn=0.1)(
        lambda x, s: x / 2, x, FALLING, generator=g
    ),
    "uniform masks": lambda x, g: mask_uniformly(x.long(), mask=5, generator=g),
    "minority": lambda x, g: minority_score(lambda x, s: x / 2, x, 1.0, generator=g),
    "absorbing graph": lambda x, g: AbsorbingGraph(4).noised(x.long(), x[:, 0], generator=g),
    "uniform graph": lambda x, g: UniformGraph(4).noised(x.long(), x[:, 0], generator=g),
    "Mehler": lambda x, g: mehler_score(x, 0.5, lambda x: x[..., 0], samples=4, generator=g),
    "target scores": lambda x, g: target_score_estimate(
        x, lambda x: x[..., 0], lambda x: x, alpha=0.6, sigma=0.8, samples=2, mixing=0.5, generator=g
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_are_drawn_where_the_generator_is(name):
    """For data elsewhere, such as on a GPU, as many of the generator's numbers are taken as for data beside it."""
    states = []
    for device in ("cpu", "meta"):
        generator = rng(3)
        found = DRAWS[name](torch.ones(3, 2, device=device), generator)
        assert found.device.type == device
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert not torch.equal(states[0], rng(3).get_state())


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: Mixture(x, 0.1).sample(5)[0],
        lambda x: Mixture(x, 0.1).sample(5)[1],
        lambda x: sample_molrg(x[None, :, :1], 5)[0],
        lambda x: sample_molrg(x[None, :, :1], 5)[1],
        lambda x: RidgeTilt(x[0], torch.sin).sample(5),
        lambda x: discrete.draw(x),
    ],
)
def test_samples_are_where_their_distribution_is(draw):
    for device in ("cpu", "meta"):
        found = draw(torch.ones(3, 2, device=device))
        assert found.device.type == device
        assert len(found) in (3, 5)


def test_ancestral_at_eta_0_is_euler():
    sigmas = samplers.process_sigmas(cosine(), 12, first=0.99)
    start = sigmas[0] * torch.randn(9, 2, generator=rng(), dtype=torch.float64)
    ddim = samplers.ancestral(GAUSS.denoise, start, sigmas, eta=0.0)
    torch.testing.assert_close(ddim, samplers.euler(GAUSS.denoise, start, sigmas))


def test_ancestral_steps_are_the_gaussian_posterior():
    """One component of no width: x_0 is known, and the step is q(x_lower | x_sigma, x_0)."""
    point = Mixture(torch.tensor([[3.0]], dtype=torch.float64), 0.0)
    sigma, lower, x = 2.0, 1.2, torch.full((100_000, 1), 4.0, dtype=torch.float64)
    found = samplers.ancestral(point.denoise, x, torch.tensor([sigma, lower]), generator=rng())
    share = (lower / sigma) ** 2
    assert found.mean().item() == pytest.approx(3 + share * 1.0, abs=0.02)
    assert found.var().item() == pytest.approx(lower**2 * (1 - share), rel=0.02)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0], [0.5, 1.0], [1.0, -0.1], [[1.0, 0.0]]])
def test_wrong_levels_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        samplers.euler(GAUSS.denoise, torch.zeros(2, 2), torch.tensor(sigmas))


def test_levels_start_and_end_where_they_say():
    levels = samplers.karras_sigmas(5, low=0.1, high=10.0)
    ends = [level ** (1 / 7) for level in (10.0, 0.1)]
    between = [(ends[0] + k / 4 * (ends[1] - ends[0])) ** 7 for k in (1, 2, 3)]
    assert levels.tolist() == pytest.approx([10.0, *between, 0.1, 0.0])
    with pytest.raises(ValueError, match="first"):
        samplers.process_sigmas(flow(), 4)


# Guidance


def test_guidance_starts_anew_with_each_sample():
    class Counting:
        def needs(self, state):
            return state is None or state < 2

        def __call__(self, cond, uncond, state):
            assert (uncond is None) == (not self.needs(state))
            return cond, (state or 0) + 1

    truth = mixture()
    conditional, unconditional = Counted(truth.component(0).denoise), Counted(truth.denoise)
    guided = Guided(Counting(), conditional, unconditional)
    start, sigmas = torch.randn(4, 3, generator=rng()), samplers.karras_sigmas(6, high=10.0)
    for _ in range(2):
        samplers.euler(guided, 10 * start, sigmas)
    assert (conditional.evaluations, unconditional.evaluations) == (12, 4)


def test_guidance_starts_anew_with_runs_of_one_evaluation_and_where_the_level_rises():
    seen = []

    def remembers(cond, uncond, state):
        seen.append(state)
        return cond, (state or 0) + 1

    truth, x = mixture(), torch.randn(4, 3, generator=rng())
    guided = Guided(remembers, truth.denoise, truth.denoise)
    for level in (10.0, 10.0, torch.tensor([10.0, 3.0, 10.0, 1.0]), 5.0, 5.0, 2.0, 4.0, 3.0, 10.0, 7.0, 7.0):
        guided(x, level)
    assert seen == [None, None, None, 1, 2, 3, None, 1, None, 1, 2]


def test_classifier_free_guidance_is_linear():
    cond, uncond = torch.randn(2, 5, 3, generator=rng()).unbind()
    torch.testing.assert_close(classifier_free(0.0)(cond, uncond, None)[0], uncond)
    torch.testing.assert_close(classifier_free(1.0)(cond, uncond, None)[0], cond)
    torch.testing.assert_close(classifier_free(3.0)(cond, uncond, None)[0], 3 * cond - 2 * uncond)
    with pytest.raises(ValueError, match="uncond"):
        classifier_free(2.0)(cond, None, None)


# Tokens

SMALL = random_chain(3, 4, generator=rng(5))
TOKENS = {
    "absorbing": discrete.absorbing(3),
    "uniform": discrete.uniform(3),
    "absorbing, bent": discrete.absorbing(3, lambda t: (math.pi / 2 * t).cos()),
}


def by_enumeration(process, x: torch.Tensor, t: float) -> torch.Tensor:
    """P(x_0 | x_t = x) over all 81 sequences, (81,), and the sequences."""
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    matrix = process.cumulative(torch.tensor(t, dtype=torch.float64))
    likelihood = matrix[every, x.expand_as(every)].prod(-1)
    joint = SMALL.log_prob(every).exp() * likelihood
    return joint, every


@pytest.mark.parametrize("name", TOKENS)
def test_the_chain_knows_every_posterior(name):
    process = TOKENS[name]
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x = process.noised(SMALL.sample(2, generator=rng(1)), t, generator=rng(2))
    found, ratios = SMALL.predict(process, x, t), SMALL.ratios(process, x, t)
    for b in range(2):
        joint, every = by_enumeration(process, x[b], t[b].item())
        for place in range(4):
            expected = torch.stack([joint[every[:, place] == v].sum() for v in range(3)])
            torch.testing.assert_close(found[b, place], expected / expected.sum())
            for y in range(process.states):
                other = x[b].clone()
                other[place] = y
                there = by_enumeration(process, other, t[b].item())[0].sum()
                torch.testing.assert_close(ratios[b, place, y], there / joint.sum())


def test_probabilities_of_a_chain_sum_to_one():
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    assert SMALL.log_prob(every).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", TOKENS)
def test_the_posterior_of_an_earlier_time_is_bayes(name):
    process = TOKENS[name]
    s, t = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    q_s, q_t, onward = process.cumulative(s)[0], process.cumulative(t)[0], process.between(s, t)[0]
    torch.testing.assert_close(q_s @ onward, q_t)  # Chapman and Kolmogorov
    clean = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for x in range(process.states):
        reachable = q_t[:3, x] > 0
        each = q_s[:3] * onward[:, x] / q_t[:3, x, None]  # P(x_s | x_t, x_0 = v)
        expected = (clean[reachable, None] * each[reachable]).sum(0)
        found = process.posterior(torch.tensor([[x]]), clean.view(1, 1, 3), s, t)[0, 0]
        torch.testing.assert_close(found, expected / expected.sum())


@pytest.mark.parametrize("name", TOKENS)
def test_the_token_sampler_with_the_perfect_network_draws_from_the_chain(name):
    """One token at a time is exact; many steps come close for all tokens together."""
    process, n = TOKENS[name], 20_000
    start = discrete.draw(process.prior.expand(n, 4, -1), generator=rng(3))
    times = torch.linspace(0.999, 0, 60, dtype=torch.float64)
    found = discrete.ancestral_tokens(
        lambda x, t: SMALL.predict(process, x, t), process, start, times, generator=rng(4)
    )
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    expected = SMALL.log_prob(every).exp()
    share = torch.bincount((found * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81) / n
    assert 0.5 * (share - expected).abs().sum() < 0.045  # 0.025 to 0.03 is chance
    assert found.max() < 3


def test_a_stepwise_process_multiplies_its_steps():
    steps = torch.rand(5, 3, 3, generator=rng(), dtype=torch.float64)
    steps = steps / steps.sum(-1, keepdim=True)
    process, t = discrete.stepwise(3, steps), torch.tensor([3.0])
    torch.testing.assert_close(process.cumulative(t)[0], steps[0] @ steps[1] @ steps[2])
    torch.testing.assert_close(process.between(t - 1, t)[0], steps[2])
    with pytest.raises(ValueError, match="s:"):
        process.between(t - 2, t)
    with pytest.raises(ValueError, match="steps"):
        discrete.stepwise(5, steps)


def test_rare_tokens_are_drawn_in_double_precision():
    rare = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64)
    found = discrete.draw(rare.expand(20_000_000, 2), generator=rng()).sum()
    assert found <= 2  # 0.02 expected
    often = discrete.draw(torch.tensor([[0.0, 3.0, 1.0]]).expand(40_000, 3), generator=rng())
    assert (often == 0).sum() == 0
    assert (often == 2).double().mean().item() == pytest.approx(0.25, abs=0.01)


# Distillation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_push_is_the_gradient_in_any_precision(dtype):
    """A push of a thousandth of x would vanish in bfloat16 next to it."""
    x = torch.randn(50, 3, generator=rng()).to(dtype).requires_grad_()
    push = (1e-3 * torch.randn(50, 3, generator=rng(1))).to(dtype)
    values = pushed(x, push)
    torch.testing.assert_close(values, push.square() / 2)
    values.sum().backward()
    assert torch.equal(x.grad, push)


def test_a_generator_of_gaussians_learns_the_teacher():
    """The generator is mean + scale * latent, the fake score is known exactly: it must end at the teacher's."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, latent):
            return self.mean + self.log_scale.exp() * latent

    class Exact(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = (of,)

        def forward(self, x, sigma):
            affine = self.of[0]
            return Mixture(affine.mean.detach()[None], affine.log_scale.detach().exp()).denoise(x, sigma)

    generator = Affine()
    procedure = ScoreDistillation(
        generator, Exact(generator), GAUSS.denoise, levels=log_uniform(0.1, 5.0), fake_steps=0
    )
    optimizer, g = torch.optim.Adam(generator.parameters(), lr=0.02), rng(7)
    for step in range(400):
        batch = {"latent": torch.randn(256, 2, generator=g, dtype=torch.float64)}
        optimizer.zero_grad()
        procedure.objective("generator", batch, step=step, generator=g).mean().backward()
        optimizer.step()
    torch.testing.assert_close(generator.mean.detach(), GAUSS.means[0], atol=0.05, rtol=0)
    assert generator.log_scale.exp().item() == pytest.approx(0.5, rel=0.05)


def test_the_teacher_stays_as_it_is():
    teacher = Denoiser(nn.Linear(2, 2), cosine())
    procedure = ScoreDistillation(nn.Linear(2, 2), None, teacher, levels=log_uniform(0.1, 5.0))
    assert not any(p.requires_grad for p in procedure.teacher.parameters())
    assert all(p.requires_grad for p in procedure.fake.parameters())
    assert procedure.turns(0) == ("fake", "generator")
    with pytest.raises(ValueError, match="fake"):
        ScoreDistillation(nn.Linear(2, 2), None, GAUSS.denoise, levels=log_uniform(0.1, 5.0))


def test_a_frozen_copy_neither_drops_nor_counts():
    """Dropout of a teacher stays off and its BatchNorm still, while generator and fake network train."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))

        def forward(self, x, *sigma):
            return self.layers(x)

    torch.manual_seed(0)
    teacher = Layers()
    procedure = ScoreDistillation(Layers(), None, teacher, levels=log_uniform(0.1, 5.0)).train()
    assert {m.training for m in procedure.teacher.modules()} == {False}
    assert {m.training for part in (procedure.fake, procedure.generator) for m in part.modules()} == {True}
    assert teacher.training
    assert teacher.layers[0].weight.requires_grad
    before = {name: value.clone() for name, value in procedure.state_dict().items()}
    optimizers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in procedure.players().items()}
    x = torch.randn(8, 2, generator=rng())
    told = procedure.teacher(x, 1.0)
    advance(procedure, {"latent": x}, optimizers, step=0, generator=rng())
    assert torch.equal(procedure.teacher(x, 1.0), told)
    still = {name for name, value in procedure.state_dict().items() if torch.equal(value, before[name])}
    assert still >= {name for name in before if name.startswith("teacher")}
    assert not {name for name in still if "running" in name and not name.startswith("teacher")}
    assert not torch.equal(Frozen(teacher).train()(x), teacher(x))


def test_levels_are_those_of_karras():
    grid = samplers.karras_sigmas(1001)[:-1]
    found = karras_levels()((200_000,), rng()).double()
    assert found.min() >= grid[-1]
    assert found.max() <= grid[200] * (1 + 1e-6)
    for share in (0.25, 0.5, 0.75):  # of a range cut at 0.8
        assert found.quantile(share).item() == pytest.approx(grid[1000 - round(800 * share)].item(), rel=0.03)
    stacked = karras_levels(0.1, 1.0, first=0.5, last=1.0)((2, 9), [rng(3), rng(4)])
    alone = karras_levels(0.1, 1.0, first=0.5, last=1.0)((9,), rng(4))
    torch.testing.assert_close(stacked[1], alone)
    assert stacked.min() > ((0.1 ** (1 / 7) + 1) / 2) ** 7 - 1e-6


def test_it_starts_as_a_step_of_the_denoiser():
    latent = torch.randn(5, 2, generator=rng(), dtype=torch.float64)
    found = OneStepGenerator(GAUSS.denoise, sigma=3.0)(latent)
    torch.testing.assert_close(found, GAUSS.denoise(3 * latent, 3.0))
    conditional = OneStepGenerator(lambda x, sigma, c: x + sigma * c)(latent, torch.ones(5, 1))
    torch.testing.assert_close(conditional, 2.5 * latent + 2.5)


def test_distillation_refuses():
    x = torch.zeros(2, 2)
    made = ScoreDistillation(nn.Linear(2, 2), nn.Linear(2, 2), GAUSS.denoise, levels=log_uniform(0.1, 5.0))
    for call, message in (
        (lambda: karras_levels(2.0, 1.0), "high: expected a number > 2"),
        (lambda: karras_levels(first=0.9), "last: expected a number > 0.9"),
        (lambda: OneStepGenerator(None, sigma=0.0), "sigma: expected a number > 0"),
        (lambda: ScoreDistillation(x, x, x, levels=None, fake_steps=-1), "fake_steps: expected a whole number >= 0"),
        (lambda: ScoreDistillation(x, x, x, levels=None, fake_steps=1.5), "fake_steps: expected a whole number"),
        (lambda: made.objective("fake", {"real": x}, step=0), "batch: expected 'latent', got 'real'"),
        (lambda: made.objective("fake", {}, step=0), "batch: expected 'latent', got nothing"),
        (lambda: conditions({"condition": x}, "real_condition"), "batch: expected 'real_condition' beside 'condition'"),
        (lambda: falling("steps", (1.0, 1.0)), "steps: expected falling levels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert conditions({}, "real_condition") == conditions({}) == []
    assert falling("steps", [3, 1]) == (3.0, 1.0)


def test_a_ring_is_a_ring():
    found = ring(6, radius=2.0).means
    torch.testing.assert_close(found.norm(dim=1), torch.full((6,), 2.0, dtype=torch.float64))
    assert torch.cdist(found, found).add(10 * torch.eye(6)).min().item() == pytest.approx(2.0)
    assert MarkovChain(torch.ones(2) / 2, torch.eye(2), 3).sample(4, generator=rng()).unique(dim=1).shape == (4, 1)


@pytest.mark.parametrize("player", ["fake", "generator"])
def test_distillation_draws_a_noise_level_for_each_sample_of_any_shape(player):
    """Images, and replicas of vectors: a value for each sample, and the networks see one level for each."""
    seen = []

    def teacher(x, sigma):
        seen.append(tuple(sigma.shape))
        return x / (1 + over(sigma, x) ** 2)

    for shape, generator, batch in (
        ((5, 1, 4, 4), rng(), (5,)),
        ((5, 3), rng(), (5,)),
        ((2, 5, 3), [rng(), rng(1)], (2, 5)),
    ):
        procedure = ScoreDistillation(nn.Identity(), Shrinking(), teacher, levels=log_uniform(0.1, 5.0))
        values = procedure.objective(player, {"latent": torch.randn(shape)}, step=0, generator=generator)
        assert values.shape == batch
        if player == "generator":
            assert seen.pop() == batch


class Shrinking(nn.Module):
    def forward(self, x, sigma):
        return x / (1 + over(sigma, x) ** 2)
