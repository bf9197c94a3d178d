"""Adversarial adaptive sampling against quadrature, autograd's Jacobian and the penalised maximum found on a grid."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lossary.claims.weighting import adversarial_adaptive_sampling_pinn as claims
from lossary.tasks import Seeds, stacked_mlp
from lossary.weighting import AdversarialAdaptiveSampler, adversarial_residual_objective


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(low, high, *, size=0.7, **hyper):
    """A sampler in float64 far from its uniform start."""
    sampler = AdversarialAdaptiveSampler(low, high, generator=generator(), **hyper).double()
    with torch.no_grad():
        for weight, seed in zip(sampler.parameters(), range(100)):
            weight += size * torch.randn(weight.shape, generator=generator(seed), dtype=torch.float64)
    return sampler


def midpoints(low, high, n):
    """Midpoints (n^d, d) of equal cells, and a cell's volume."""
    sides = [a + (b - a) * (torch.arange(n, dtype=torch.float64) + 0.5) / n for a, b in zip(low, high)]
    points = torch.cartesian_prod(*sides).reshape(-1, len(low))
    return points, math.prod(b - a for a, b in zip(low, high)) / len(points)


@pytest.mark.parametrize(
    ("low", "high", "n"), [((-2.0,), (1.0,), 2000), ((0.0, -1.0), (1.0, 3.0), 200), ((0.0,) * 3, (1.0, 2.0, 0.5), 40)]
)
def test_the_density_sums_to_one(low, high, n):
    x, volume = midpoints(low, high, n)
    sampler = perturbed(low, high, size=0.3 if len(low) == 3 else 0.7)
    density = sampler.log_prob(x).exp().detach()
    assert density.max() > 1.5 * density.mean()  # not near uniform
    assert volume * density.sum() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize(("d", "layers"), [(1, 2), (2, 1), (2, 2), (3, 3), (5, 4)])
def test_the_density_is_the_determinant_of_the_map_to_even_points(d, layers):
    sampler = perturbed([-1.0] * d, [0.5 + i for i in range(d)], layers=layers)
    x = sampler.sample(6, generator=generator(1))
    jacobians = [torch.autograd.functional.jacobian(lambda p: sampler._flow(p.unsqueeze(0))[0][0], p) for p in x]
    expected = [float(jacobian.det().abs().log()) for jacobian in jacobians]
    assert sampler.log_prob(x).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_samples_are_even_points_sent_back_through_the_map(d):
    sampler = perturbed([-1.0] * d, [2.0] * d)
    even, _ = sampler._flow(sampler.sample(200, generator=generator(3)))
    assert torch.allclose(even, torch.rand(200, d, generator=generator(3)).double(), atol=1e-12)


def test_samples_fall_into_cells_as_often_as_the_density_says():
    low, high = (0.0, -1.0), (1.0, 1.0)
    sampler = perturbed(low, high)
    x, volume = midpoints(low, high, 240)
    shares = volume * sampler.log_prob(x).exp().detach().view(6, 40, 6, 40).sum((1, 3)).flatten()
    cell = ((sampler.sample(20_000, generator=generator(2)) - sampler.low) / (sampler.high - sampler.low) * 6).long()
    counts = (6 * cell[:, 0] + cell[:, 1]).bincount(minlength=36)
    shares = shares / shares.sum()
    assert stats.chisquare(counts.numpy(), 20_000 * shares.numpy()).pvalue > 0.01


@pytest.mark.parametrize(("d", "within"), [(1, 0.08), (2, 0.15)])
def test_it_starts_nearly_uniform(d, within):
    x, _ = midpoints([0.0] * d, [2.0] * d, 50)
    density = AdversarialAdaptiveSampler([0.0] * d, [2.0] * d, generator=generator()).log_prob(x.float()).exp() * 2**d
    assert (density - 1).abs().max() < within


def test_outside_the_box_the_density_is_zero():
    sampler = perturbed([0.0, 0.0], [1.0, 2.0])
    x = torch.tensor([[0.5, 2.1], [-0.1, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert sampler.log_prob(x).isfinite().tolist() == [False, False, True]
    assert sampler.log_prob(x)[:2].tolist() == [-math.inf, -math.inf]


# --- the objective --------------------------------------------------------------------------------------------


def test_the_objective_is_the_penalised_integral():
    """For p = 1/2 + x on (0, 1) and r = x it is 5/12 - beta, from even points as from points of p."""
    even, _ = midpoints((0.0,), (1.0,), 2000)
    for x, proposal in ((even, torch.zeros(2000).double()), ((1 + 8 * even).sqrt() / 2 - 0.5, None)):  # p's quantiles
        p = 0.5 + x
        found = adversarial_residual_objective(x[:, 0], p[:, 0].log(), 1 / p, proposal, beta=0.05)
        assert float(found.mean()) == pytest.approx(5 / 12 - 0.05, abs=1e-6)


def bump(x):
    return torch.exp(-(((x[..., 0] - 0.3) / 0.1) ** 2))


def integral(sampler, beta, n=4000):
    """The objective by midpoints, with the density's slope from differences."""
    x, h = midpoints((0.0,), (1.0,), n)
    density = sampler.log_prob(x).exp()
    return h * (bump(x).square() * density).sum() - beta * (density.diff() / h).square().sum() * h


def gradient_of(value, sampler):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, sampler.parameters(), allow_unused=False)])


@pytest.mark.parametrize("beta", [1e-6, 0.01])
def test_an_update_follows_the_gradient_of_the_penalised_integral(beta):
    """One plain gradient step on many points, for a residual ten thousand times as large."""
    sampler = perturbed([0.0], [1.0], size=0.3, beta=beta, components=3, hidden=4)
    value = integral(sampler, beta)
    expected = gradient_of(value, sampler)
    before = torch.cat([w.detach().flatten().clone() for w in sampler.parameters()])
    sgd = torch.optim.SGD(sampler.parameters(), lr=1e-3)
    returned = sampler.update(lambda x: -1e4 * bump(x), sgd, points=40_000, steps=1, generator=generator(4))
    after = torch.cat([w.detach().flatten() for w in sampler.parameters()])
    assert ((after - before) / 1e-3 - expected).norm() < 0.03 * expected.norm()
    assert float(returned) == pytest.approx(float(value.detach()), rel=0.02)


def test_without_penalty_that_is_the_score_function_estimate():
    """grad E_p[r^2] = E_p[r^2 grad log p]."""
    sampler = perturbed([0.0], [1.0], size=0.3, components=3, hidden=4)
    x = sampler.sample(40_000, generator=generator(5))
    log_p = sampler.log_prob(x)
    scored = gradient_of((bump(x).square() * log_p).mean(), sampler)
    terms = adversarial_residual_objective(bump(x), sampler.log_prob(x), torch.zeros_like(x), log_p.detach(), beta=0.01)
    assert torch.allclose(gradient_of(terms.mean(), sampler), scored, atol=1e-12)
    exact = gradient_of(integral(sampler, 0.0), sampler)
    assert (scored - exact).norm() < 0.1 * exact.norm()


def penalised_maximum(squared, beta):
    """The density p >= 0 on equal cells of the unit cube with the largest sum of r^2 p - beta |grad p|^2, and that sum.

    Its conditions, 2 beta (-Laplace p) = r^2 - c where p > 0 with p' = 0 at the boundary, are solved for a set of such
    cells, which is corrected by the signs until it stays.
    """
    n, d = squared.shape[0], squared.ndim
    line = np.diag(np.r_[1.0, np.full(n - 2, 2.0), 1.0]) - np.eye(n, k=1) - np.eye(n, k=-1)
    minus_laplace = line * n**2 if d == 1 else (np.kron(line, np.eye(n)) + np.kron(np.eye(n), line)) * n**2
    r2, volume = squared.ravel(), 1 / squared.size
    positive = np.ones(len(r2), dtype=bool)
    for _ in range(50):
        m = positive.sum()
        system = np.zeros((m + 1, m + 1))
        system[:m, :m] = 2 * beta * minus_laplace[np.ix_(positive, positive)]
        system[:m, m], system[m, :m] = 1, volume
        solution = np.linalg.solve(system, np.r_[r2[positive], 1])
        p = np.zeros(len(r2))
        p[positive] = solution[:m]
        pull = 2 * beta * minus_laplace @ p + solution[m] - r2
        corrected = np.where(positive, p > 0, pull < 0)
        if (corrected == positive).all():
            return p.reshape(squared.shape), volume * (r2 @ p - beta * p @ minus_laplace @ p)
        positive = corrected
    raise AssertionError("no set of cells was found")


def score_on_cells(sampler, squared, beta):
    """The same sum for the flow's density."""
    n, d = squared.shape[0], squared.ndim
    x, volume = midpoints((0.0,) * d, (1.0,) * d, n)
    p = sampler.log_prob(x.float()).exp().detach().double().numpy().reshape(squared.shape)
    steepness = sum((np.diff(p, axis=axis) ** 2).sum() for axis in range(d)) * n**2
    return p, volume * ((squared * p).sum() - beta * steepness)


@pytest.mark.parametrize(("d", "n", "beta"), [(1, 400, 0.001), (1, 400, 0.01), (2, 24, 0.005)])
def test_updates_reach_the_penalised_maximum(d, n, beta):
    x, _ = midpoints((0.0,) * d, (1.0,) * d, n)

    def residual(x):
        return 7 * torch.exp(-(((x - 0.35) / 0.12) ** 2).sum(-1) / 2)

    squared = (residual(x) ** 2 / 49).numpy().reshape((n,) * d)
    best, value = penalised_maximum(squared, beta)
    sampler = AdversarialAdaptiveSampler(
        [0.0] * d, [1.0] * d, beta=beta, components=6, hidden=16, generator=generator()
    )
    ascent = torch.optim.Adam(sampler.parameters(), lr=0.05)
    for stage in range(24):
        sampler.update(residual, ascent, points=400, steps=8, generator=generator(stage))
        if stage >= 16:  # the noise is averaged out
            ascent.param_groups[0]["lr"] *= 0.7
    found, reached = score_on_cells(sampler, squared, beta)
    assert found.max() == pytest.approx(best.max(), rel=0.1)
    assert squared.mean() + 0.9 * (value - squared.mean()) < reached < 1.001 * value  # uniform gives the mean


# --- behaviour ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_flat_residual_brings_it_back_to_uniform(constant):
    """Only the penalty is left, which is least at the uniform density."""
    sampler = perturbed([0.0], [1.0], size=0.5, beta=0.1)
    x, _ = midpoints((0.0,), (1.0,), 50)

    def unevenness():
        return float((sampler.log_prob(x).exp() - 1).detach().abs().max())

    before = unevenness()
    ascent = torch.optim.Adam(sampler.parameters(), lr=0.05)
    for stage in range(10):
        sampler.update(lambda x: constant * torch.ones_like(x[..., 0]), ascent, points=100, generator=generator(stage))
    assert unevenness() < 0.2 * before


def test_what_is_the_same_everywhere_moves_nothing():
    """The mean that is subtracted leaves no noise of r^2 = 1, here on twenty points, where beta is next to nothing."""
    sampler = perturbed([0.0], [1.0], beta=1e-12)
    before = [weight.detach().clone() for weight in sampler.parameters()]
    sgd = torch.optim.SGD(sampler.parameters(), lr=1.0)
    sampler.update(lambda x: torch.ones_like(x[..., 0]), sgd, points=20, steps=2, generator=generator())
    for weight, old in zip(sampler.parameters(), before):
        assert torch.allclose(weight, old, atol=1e-6, rtol=0)


def test_stacked_samplers_are_single_ones_side_by_side():
    def residual(x):
        return (4 * x[..., 0] - x[..., 1]).tanh() + 1

    def trained(replicas, seeds):
        drawn = [generator(s) for s in seeds]
        sampler = AdversarialAdaptiveSampler([0, 0], [1, 1], replicas=replicas, generator=drawn).double()
        ascent = torch.optim.Adam(sampler.parameters(), lr=0.05)
        for _ in range(3):
            sampler.update(residual, ascent, points=50, steps=2, generator=drawn)
        return sampler.sample(4, generator=drawn)

    stacked = trained((2,), (0, 1))
    for s in (0, 1):
        assert torch.allclose(stacked[s], trained((), (s,)), atol=1e-6)


def test_its_state_continues_a_run():
    def fresh():
        sampler = AdversarialAdaptiveSampler([0.0], [1.0], generator=generator())
        return sampler, torch.optim.Adam(sampler.parameters(), lr=0.05)

    old, new = fresh(), fresh()
    old[0].update(bump, old[1], points=50, generator=generator(1))
    for part, source in zip(new, old):
        part.load_state_dict(copy.deepcopy(source.state_dict()))
    for sampler, ascent in (old, new):
        sampler.update(bump, ascent, points=50, generator=generator(2))
    assert torch.equal(old[0].sample(5, generator=generator(3)), new[0].sample(5, generator=generator(3)))


def test_draws_come_from_the_generator_alone_and_stay_in_the_box():
    state = torch.get_rng_state()
    sampler = AdversarialAdaptiveSampler([-1.0, 2.0], [1.0, 2.5], generator=generator())
    first, second = (sampler.sample(1000, generator=generator(6)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler.sample(1000, generator=generator(7)))
    assert ((first >= sampler.low) & (first <= sampler.high)).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    sampler = AdversarialAdaptiveSampler([0.0, 0.0], [1.0, 1.0], generator=generator()).to(dtype)
    ascent = torch.optim.SGD(sampler.parameters(), lr=0.01)
    assert sampler.update(bump, ascent, points=20, steps=2, generator=generator()).isfinite()
    x = sampler.sample(7, generator=generator())
    assert x.dtype == sampler.log_prob(x).dtype == dtype
    assert sampler.log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    ("named", "hyper"),
    [
        ("low", {"low": [], "high": []}),
        ("high", {"high": [1.0, 1.0]}),
        ("high", {"high": [0.0]}),
        ("high", {"high": [math.inf]}),
        ("beta", {"beta": 0.0}),
        ("components", {"components": 0}),
        ("hidden", {"hidden": 2.0}),
        ("layers", {"layers": 0}),
        ("replicas", {"replicas": (0,)}),
        ("generator", {"generator": [generator(), generator()]}),
    ],
)
def test_refuses_at_construction(named, hyper):
    with pytest.raises(ValueError, match=named):
        AdversarialAdaptiveSampler(**{"low": [0.0], "high": [1.0], **hyper})


def test_refuses_in_use():
    sampler = AdversarialAdaptiveSampler([0.0, 0.0], [1.0, 1.0], generator=generator())
    ascent = torch.optim.Adam(sampler.parameters())
    for x in (torch.zeros(3), torch.zeros(3, 3), torch.zeros(2, 3, 2), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x: "):
            sampler.log_prob(x)
    with pytest.raises(ValueError, match="n: "):
        sampler.sample(0, generator=generator())
    with pytest.raises(ValueError, match="steps"):
        sampler.update(bump, ascent, steps=0)
    for wrong in (lambda x: x, lambda x: x[..., 0] * math.nan, lambda x: 1e30 + x[..., 0]):
        with pytest.raises(ValueError, match="residual"):
            sampler.update(wrong, ascent, points=10, generator=generator())
    flat = torch.zeros(4)
    for named, arguments, beta in (
        ("residual", (flat.long(), flat, flat[:, None]), 0.1),
        ("log_prob", (flat, flat[:3], flat[:, None]), 0.1),
        ("gradient", (flat, flat, flat), 0.1),
        ("gradient", (flat, flat, flat[:3, None]), 0.1),
        ("proposal_log_prob", (flat, flat, flat[:, None], flat[:3]), 0.1),
        ("beta", (flat, flat, flat[:, None]), -0.1),
    ):
        with pytest.raises(ValueError, match=named):
            adversarial_residual_objective(*arguments, beta=beta)


def test_the_claims_laplacians_are_autograds():
    x = torch.rand(2, 5, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    model = stacked_mlp((2, 8, 8, 1), Seeds((0, 1)), activation="tanh").double()
    centre = torch.full((2, 1, 2), 0.4, dtype=torch.float64)
    for value, laplacian in (claims._network(model, x), claims._truth(x, centre)):
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        bends = [torch.autograd.grad(slope[..., i].sum(), x, retain_graph=True)[0][..., i] for i in (0, 1)]
        assert torch.allclose(laplacian, sum(bends), atol=1e-10)
