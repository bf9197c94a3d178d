"""One-step GD in context: does trained attention end at the gradient step that the theorem says is best?

Adam trains the layer on fresh prompts, three queries each, its learning rate falling to 0. All seeds train side by
side: the parameters carry a seed dimension, and each seed has its own prompts and initial weights.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim
from lossary.dynamics import LinearSelfAttention, one_step_gd_predictor, optimal_icl_step_size

LENGTH, DIMENSIONS, NOISE, QUERIES = 20, 5, 0.5, 3
ETA = optimal_icl_step_size(LENGTH, DIMENSIONS, noise=NOISE)
LOSS = DIMENSIONS * (1 - LENGTH * ETA)  # of the best step, E (prediction - w . q)^2
SCALES = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5])  # standard deviations of x where it is anisotropic

Prompts = tuple[Tensor, Tensor, Tensor, Tensor]
"""x (P, n, d), y (P, n), query (P, m, d) and what the query's noiseless y is (P, m)."""


def _linear(generator: Generator, prompts: int) -> Prompts:
    x = torch.randn(prompts, LENGTH + QUERIES, DIMENSIONS, generator=generator)
    w = torch.randn(prompts, DIMENSIONS, 1, generator=generator)
    return _told(x, (x @ w).squeeze(-1), generator)


def _anisotropic(generator: Generator, prompts: int) -> Prompts:
    """x with covariance Sigma = diag(SCALES^2), w with its inverse."""
    x, y, query, truth = _linear(generator, prompts)
    return x * SCALES, y, query * SCALES, truth


def _relu_networks(generator: Generator, prompts: int, width: int = 16) -> Prompts:
    """y from a random two-layer ReLU network, sum_j a_j relu(w_j . x), a_j of variance 1 / width."""
    x = torch.randn(prompts, LENGTH + QUERIES, DIMENSIONS, generator=generator)
    w = torch.randn(prompts, DIMENSIONS, width, generator=generator)
    a = torch.randn(prompts, width, 1, generator=generator) / width**0.5
    return _told(x, ((x @ w).relu() @ a).squeeze(-1), generator)


def _told(x: Tensor, y: Tensor, generator: Generator) -> Prompts:
    noise = NOISE * torch.randn(len(y), LENGTH, generator=generator)
    return x[:, :LENGTH], y[:, :LENGTH] + noise, x[:, LENGTH:], y[:, LENGTH:]


def _batches(draw: Callable[[Generator, int], Prompts], generators: list[Generator], prompts: int) -> list[Tensor]:
    return [torch.stack(side) for side in zip(*(draw(g, prompts) for g in generators))]


def _trained(seeds: Seeds, draw: Callable[[Generator, int], Prompts]) -> list[LinearSelfAttention]:
    models = [LinearSelfAttention(DIMENSIONS, generator=g) for g in seeds.torch("init")]
    parameters, _ = stack_module_state(models)
    call = vmap(lambda p, x, y, q: functional_call(models[0], p, (x, y, q)))
    steps, generators = seeds.few(2000), seeds.torch("prompts")
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=steps)
    for _ in range(steps):
        x, y, query, truth = _batches(draw, generators, 256)
        optimizer.zero_grad()
        (call(parameters, x, y, query) - truth).square().mean((1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    for s, model in enumerate(models):
        model.load_state_dict({name: value[s] for name, value in parameters.items()})
    return models


def _matrices(models: list[LinearSelfAttention]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model.effective_matrix() for model in models])


@claim(
    says="Trained attention multiplies sum_i y_i x_i by eta I, eta = 1 / (n + d + 1 + noise^2): one gradient step",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="entries of A / eta - I; 20 pairs in 5 dimensions, noise 0.5, 2000 steps of Adam on 256 fresh prompts",
)
def attention_takes_one_gradient_step(seeds: Seeds) -> Arms:
    return Arms(_matrices(_trained(seeds, _linear)) / ETA - torch.eye(DIMENSIONS))


@claim(
    says="The loss of trained attention is that of the best gradient step, d (1 - n eta)",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="loss / closed form - 1 on 50,000 fresh prompts; otherwise as for the matrix",
)
def attention_reaches_the_best_loss(seeds: Seeds) -> Arms:
    trained, stepped = [], []
    for model, generator in zip(_trained(seeds, _linear), seeds.torch("test")):
        x, y, query, truth = _linear(generator, seeds.few(50_000, smoke=100))
        with torch.no_grad():
            trained.append((model(x, y, query) - truth).square().mean())
        stepped.append((one_step_gd_predictor(x, y, query, step_size=ETA) - truth).square().mean())
    gap = torch.stack(trained) / LOSS - 1
    return Arms(gap, details={"the step's own loss / closed form - 1": (torch.stack(stepped) / LOSS - 1).tolist()})


@claim(
    says="Where x has covariance Sigma, trained attention preconditions the same step by the inverse of Sigma",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="entries of Sigma^1/2 A Sigma^1/2 / eta - I; deviations of x from 0.5 to 1.5, otherwise as for the matrix",
)
def attention_preconditions(seeds: Seeds) -> Arms:
    whitened = SCALES.unsqueeze(1) * _matrices(_trained(seeds, _anisotropic)) * SCALES
    return Arms(whitened / ETA - torch.eye(DIMENSIONS))


@claim(
    says="For targets from random ReLU networks trained attention still takes one plain gradient step",
    kind="exact",
    metric="deviation",
    tolerance=0.05,
    scale="entries of A / eta - I, eta = 1 / (n + 2 d + 3 + 4 noise^2); 16 hidden units, otherwise as for the matrix",
)
def nonlinear_targets_leave_one_gradient_step(seeds: Seeds) -> Arms:
    # With u = E f(x) x, E |u|^2 = d / 4 and E f(x)^2 |x|^2 = d (d + 2) / 2, the step that minimises
    # eta^2 (n (n - 1) |u|^2 + n E f^2 |x|^2 + n d noise^2) - 2 eta n |u|^2 is this.
    eta = 1 / (LENGTH + 2 * DIMENSIONS + 3 + 4 * NOISE**2)
    return Arms(_matrices(_trained(seeds, _relu_networks)) / eta - torch.eye(DIMENSIONS))


def _step_loss(seeds: Seeds, step_size: float) -> list[float]:
    losses = []
    for generator in seeds.torch("test"):
        x, y, query, truth = _linear(generator, seeds.few(2000, smoke=100))
        losses.append((one_step_gd_predictor(x, y, query, step_size=step_size) - truth).square().mean().item())
    return losses


@claim(
    says="Control: the best step has no tenth less error than itself under other seeds",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="20 pairs in 5 dimensions, noise 0.5, 2000 prompts; baseline under fresh seeds",
    control="A/A",
)
def best_step_beats_itself(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_step_loss(seeds, ETA), _step_loss(other, ETA))


@claim(
    says="Planted: the best step has at least a tenth less error than 1 / n, the step of the mean gradient",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="20 pairs in 5 dimensions, noise 0.5, 2000 prompts; in theory the ratio is n eta, 0.76",
    control="planted",
)
def planted_step_size(seeds: Seeds) -> Arms:
    return Arms(_step_loss(seeds, ETA), _step_loss(seeds, 1 / LENGTH))
