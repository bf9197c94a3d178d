"""Distribution Transformer: one model for all priors of a family, against swapping the prior of a usual estimator.

x is drawn from a mixture of three normals, itself drawn anew each time, and seen through z = x^2 / 2 + noise, which
leaves its sign to the prior. The usual estimator is a mixture density network of z, trained on the same draws, which
knows the priors on average only; its answer can be weighed anew for the prior at hand, on a grid.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import stacked_mlp
from lossary.uncertainty import DistributionTransformer, prior_posterior_nll

COMPONENTS, SPREAD, NOISE = 3, 1.5, 0.5
BATCH, TEST = 64, 500
GRID = torch.linspace(-8, 8, 801)

Draws = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of the prior: weights, means and deviations (n, 3); then x and z (n, 1)."""


def _draws(n: int, generator: Generator) -> Draws:
    shares = -torch.rand(n, COMPONENTS, generator=generator).clamp_min(1e-6).log()
    weights = shares / shares.sum(1, keepdim=True)
    means = SPREAD * torch.randn(n, COMPONENTS, generator=generator)
    deviations = (0.3 * torch.randn(n, COMPONENTS, generator=generator) - 0.7).exp()
    which = torch.multinomial(weights, 1, generator=generator)
    x = means.gather(1, which) + deviations.gather(1, which) * torch.randn(n, 1, generator=generator)
    return weights, means, deviations, x, x.square() / 2 + NOISE * torch.randn(n, 1, generator=generator)


def _stacked(n: int, generators: list[Generator]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*(_draws(n, g) for g in generators))]


def _mixture(weights: Tensor, means: Tensor, deviations: Tensor) -> MixtureSameFamily:
    normals = MultivariateNormal(means.unsqueeze(-1), scale_tril=deviations[..., None, None], validate_args=False)
    return MixtureSameFamily(Categorical(weights, validate_args=False), normals, validate_args=False)


def _model(seeds: Seeds, s: int) -> DistributionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.torch("init")[s].initial_seed())
        return DistributionTransformer(1, {"z": 1}, heads=4, layers=2, feedforward=128)


def _steps(parameters: list[Tensor], lr: float, steps: int) -> Iterator[torch.optim.Optimizer]:
    """An optimizer at each step's rate: a tenth of the way up, then a cosine down."""
    adam = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        yield adam


@cache
def _transformed(seeds: Seeds, lr: float) -> tuple[Tensor, Tensor]:
    """Log-loss of the posterior at test draws and, for comparison, of the prior as read, (S,) each.

    The models of all seeds are trained side by side.
    """
    models = [_model(seeds, s) for s in range(len(seeds))]
    parameters, _ = stack_module_state(models)

    def losses(own: dict[str, Tensor], *draws: Tensor) -> tuple[Tensor, Tensor]:
        *prior, x, z = draws
        read, posterior = functional_call(models[0], own, (_mixture(*prior),), {"z": z})
        return prior_posterior_nll(read, posterior, x).mean(), -posterior.log_prob(x).mean()

    generators, every = seeds.torch("draws"), vmap(losses)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no rule for vmap
        for adam in _steps(list(parameters.values()), lr, seeds.few(400)):
            objective, _ = every(parameters, *_stacked(BATCH, generators))
            adam.zero_grad()
            objective.sum().backward()
            adam.step()
        with torch.no_grad():
            both, posterior = every(parameters, *_stacked(seeds.few(TEST, smoke=10), seeds.torch("test")))
    return posterior, both - posterior


def _estimated(seeds: Seeds, lr: float) -> dict[str, Tensor]:
    """Log-loss of a mixture density network at test draws, as it is and weighed anew, and the exact one's, (S,)."""
    network, generators = stacked_mlp((1, 64, 64, 15), seeds), seeds.torch("draws")

    def posterior(z: Tensor) -> list[Tensor]:
        logits, means, logs = network(z).chunk(3, -1)
        return [logits.softmax(-1), means, logs.exp() + 1e-3]

    for adam in _steps(list(network.parameters()), lr, seeds.few(400)):
        *_, x, z = _stacked(BATCH, generators)
        adam.zero_grad()
        (-_log_mixture(x, *posterior(z))).mean(1).sum().backward()
        adam.step()
    *prior, x, z = _stacked(seeds.few(TEST, smoke=10), seeds.torch("test"))
    with torch.no_grad():
        learned = posterior(z)
        anew = _normalised(lambda g: _log_mixture(g, *learned) + _log_mixture(g, *prior) - _average(g), x)
        exact = _normalised(lambda g: _log_mixture(g, *prior) + _seen(g, z), x)
        found = {"as it is": _log_mixture(x, *learned), "weighed anew": anew, "exact": exact}
    return {name: -values.mean(1) for name, values in found.items()}


def _log_mixture(x: Tensor, weights: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log-density (..., n) at x (..., n, 1)."""
    return (weights.log() + Normal(means, deviations, validate_args=False).log_prob(x)).logsumexp(-1)


def _seen(x: Tensor, z: Tensor) -> Tensor:
    return Normal(x.squeeze(-1).square() / 2, NOISE).log_prob(z.squeeze(-1))


def _average(x: Tensor) -> Tensor:
    """Log-density of x under the priors on average: normals about 0 with the variances of means and of components."""
    deviations = (0.3 * Normal(0.0, 1.0).icdf((torch.arange(64) + 0.5) / 64) - 0.7).exp()
    return Normal(0.0, (SPREAD**2 + deviations**2).sqrt()).log_prob(x).logsumexp(-1) - math.log(64)


def _normalised(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Log-density (S, n) at x, divided by its integral, a sum over the grid."""
    total = torch.tensor(-torch.inf)
    for point in GRID:
        total = torch.logaddexp(total, log_density(point.view(1)))
    return log_density(x) - total - math.log(float(GRID[1] - GRID[0]))


RATES = (0.002, 0.005)


def _against(seeds: Seeds, answer: str) -> Arms:
    def ours(seeds: Seeds, lr: float) -> Tensor:
        return _transformed(seeds, lr)[0]

    def theirs(seeds: Seeds, lr: float) -> Tensor:
        return _estimated(seeds, lr)[answer]

    grid = [{"lr": lr} for lr in RATES]
    method, baseline = (partial(tune, grid=grid, seeds=seeds, better="lower", n=2)(score) for score in (ours, theirs))
    posterior, prior = _transformed(seeds, **method)
    others = _estimated(seeds, **baseline)
    means = {name: values.mean().item() for name, values in others.items()}
    return Arms(
        posterior,
        others[answer],
        {"method": method, "baseline": baseline, **means, "prior as read": prior.mean().item()},
    )


@claim(
    says="Given a new prior, the transformer's posterior is as good as an estimator's that is weighed anew on a grid",
    kind="noninferiority",
    metric="log-loss",
    scale="1-D, priors of 3 normals, z = x^2 / 2 + noise; 2 decoder layers of width 32, 400 steps of 64; 2 rates each",
)
def as_good_as_weighing_anew(seeds: Seeds) -> Arms:
    return _against(seeds, "weighed anew")


@claim(
    says="Given a new prior, the transformer's posterior is better than that of an estimator for the priors on average",
    kind="superiority",
    metric="log-loss",
    scale="1-D, priors of 3 normals, z = x^2 / 2 + noise; 2 decoder layers of width 32, 400 steps of 64; 2 rates each",
)
def beats_the_average_prior(seeds: Seeds) -> Arms:
    return _against(seeds, "as it is")


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@claim(
    says="Five hundred posteriors take the transformer less than a tenth of the time of variational inference",
    kind="ratio",
    metric="time",
    margin=0.1,
    scale="1-D, priors of 3 normals, z = x^2 / 2 + noise; untrained, against 200 Adam steps of 16 draws, all at once",
)
def faster_than_variational_inference(seeds: Seeds) -> Arms:
    method, baseline = [], []
    for s, generator in enumerate(seeds.torch("test")):
        *parameters, _, z = _draws(TEST, generator)
        prior, model, noise = _mixture(*parameters), _model(seeds, s), torch.randn(16, TEST, generator=generator)

        def vary(parameters: list[Tensor] = parameters, z: Tensor = z, noise: Tensor = noise) -> None:
            """A normal for every posterior, by the reparametrised evidence lower bound."""
            mean, log = (torch.zeros(TEST, requires_grad=True) for _ in range(2))
            for adam in _steps([mean, log], 0.1, seeds.few(200)):
                x = (mean + log.exp() * noise).unsqueeze(-1)
                bound = (_log_mixture(x, *parameters) + _seen(x, z)).mean(0) + log
                adam.zero_grad()
                (-bound).sum().backward()
                adam.step()

        def transform(prior: MixtureSameFamily = prior, z: Tensor = z, model: nn.Module = model) -> None:
            with torch.no_grad():
                model(prior, z=z)

        transform()  # the first call warms up
        method.append(min(_seconds(transform) for _ in range(3)))
        baseline.append(_seconds(vary))
    return Arms(torch.tensor(method), torch.tensor(baseline))


@claim(
    says="The order of a prior's components and of the observations says nothing: posteriors agree at every point",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="log-densities, 2-D, 50 priors of 4 normals, 3 observations each, random weights, 2 layers, double precision",
)
def order_says_nothing(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("order"):
        model = DistributionTransformer(2, {"z": 2}, heads=4, layers=2, feedforward=64).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

        def random(*shape: int, generator: Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights, means, factors = random(50, 4).softmax(1), random(50, 4, 2), (random(50, 4, 2, 2) / 2).tril()
        factors = factors - factors.diagonal(dim1=-2, dim2=-1).diag_embed() + torch.eye(2)
        z, x = random(50, 3, 2), random(50, 2)
        values = []
        for parts, points in ((range(4), range(3)), ((2, 0, 3, 1), (1, 2, 0))):
            k, t = list(parts), list(points)
            normals = MultivariateNormal(means[:, k], scale_tril=factors[:, k])
            with torch.no_grad():
                _, posterior = model(MixtureSameFamily(Categorical(weights[:, k]), normals), z=z[:, t])
            values.append(posterior.log_prob(x))
        deviations.append(values[0] - values[1])
    return Arms(torch.stack(deviations))
