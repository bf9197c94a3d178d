"""Improvable gap balancing: weigh each task's loss by how far it still is from zero, as a share of where it began.

Tasks that share a network and are trained on the plain sum of their losses get as much of it as their units are
large. Here the objective is the sum of w_k log l_k, whose gradient does not depend on units, and the weights w_k
follow the improvable gaps l_k / b_k, b_k being the loss of an early epoch: a task that has improved less counts more.
The first form takes a softmax of the gaps; the second lets a small soft actor-critic agent find weights under
which the task that improves least improves most. Try the first where tasks differ in units or in speed; it costs
nothing. It takes 0 for every task's best loss: a task that cannot improve, since its labels are noisy, say, keeps
the largest weight for good. The second needs thousands of steps before its agent knows anything.
"""

import copy
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Improvable Gap Balancing for Multi-Task Learning",
    year=2023,
    departs=(
        "a loss of 0 or below gets no gradient, where its logarithm would be infinite",
        "losses are averaged over the processes of a distributed run",
        "gradient balancers, with which the paper also combines it, are other libraries' business",
    ),
    equation=(
        r"L=\sum_{k=1}^K w_k\log\ell_k,\qquad "
        r"w_k=K\,\frac{e^{\ell_k/b_k}}{\sum_j e^{\ell_j/b_j}},\qquad "
        r"b_k:\ \text{task }k\text{'s loss in an early epoch}"
    ),
    url="https://openreview.net/forum?id=HIHWYOAKgYz",
)


class ImprovableGapBalancing(nn.Module):
    """The tasks' weighted log-losses w_k log l_k (IGBv1): their sum is the objective.

    In training mode every call is a step. Through epoch `base_epoch` all weights are 1, and over that epoch the base
    losses b_k are averaged. From then on w = K softmax(l / b), without gradient. In evaluation mode nothing is
    recorded. A gradient balancer takes the K values as its losses.

        balance = ImprovableGapBalancing(3, steps_per_epoch=len(loader))
        for x, y in loader:
            balance(task_losses(model(x), y)).sum().backward()

    Losses should be positive: one of 0 or below has nothing left to improve and gets no gradient. A task whose base
    loss is 0 has gap 0. Losses that are not finite come out as such and are recorded nowhere.

    Under `torch.distributed` losses are averaged over all processes, so that they agree on the weights and their
    averaged gradient is that of one process with all samples.

    Args:
        num_tasks: K.
        steps_per_epoch: calls that make up an epoch.
        base_epoch: the epoch, from 0, whose mean losses are the base; the official code takes the second.

    Attributes:
        base: (K,), mean losses of the base epoch so far; a buffer.
        weights: (K,), weights of the last step; a buffer.
        step: calls so far; a buffer.

    Raises:
        ValueError: an argument out of range, or losses that are not (K,).

    >>> balance = ImprovableGapBalancing(2, steps_per_epoch=1, base_epoch=0)
    >>> balance(torch.tensor([1.0, 100.0]))
    tensor([0.0000, 4.6052])
    >>> balance(torch.tensor([1.0, 50.0])), balance.weights  # the second task has come halfway
    (tensor([0.0000, 2.9539]), tensor([1.2449, 0.7551]))
    """

    def __init__(self, num_tasks: int, *, steps_per_epoch: int, base_epoch: int = 1) -> None:
        super().__init__()
        require.whole("num_tasks", num_tasks, at_least=1)
        require.whole("steps_per_epoch", steps_per_epoch, at_least=1)
        require.whole("base_epoch", base_epoch)
        self.steps_per_epoch, self.base_epoch = steps_per_epoch, base_epoch
        self.register_buffer("base", torch.zeros(num_tasks))
        self.register_buffer("averaged", torch.tensor(0))
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        """Weigh, and in training mode record, the tasks' losses."""
        require.same_shape("losses", losses, tuple(self.base.shape))
        losses = _over_processes(losses)
        with torch.no_grad():
            seen = losses.to(self.base.dtype)
            weights = self._weigh(seen)
            if self.training:
                self._record(seen, weights)
        return weights.to(losses.dtype) * losses.clamp(min=torch.finfo(losses.dtype).tiny).log()

    def _weigh(self, losses: Tensor) -> Tensor:
        gap = torch.where(self.base > 0, losses / self.base, 0.0)
        return torch.where(self._epoch() > self.base_epoch, len(gap) * gap.softmax(0), 1.0)

    def _record(self, losses: Tensor, weights: Tensor) -> None:
        self.weights.copy_(weights)
        counts = (self._epoch() == self.base_epoch) & losses.isfinite().all()
        self.averaged += counts
        self.base += torch.where(counts, (losses - self.base) / self.averaged, 0.0)
        self.step += 1

    def _epoch(self) -> Tensor:
        return self.step // self.steps_per_epoch


class ImprovableGapBalancingRL(ImprovableGapBalancing):
    """Weighted log-losses whose weights a soft actor-critic agent chooses (IGBv2).

    The agent's state are the losses l, its action the weights w = K softmax(u), u normal with a mean and spread that
    the actor gives for l, and its reward for them is min_k (l_k - l'_k) / b_k, l' being the losses of the next step:
    what the task that gained least gained. Weights are random, K softmax(N(0, I)), before epoch
    `policy_epoch`. The agent learns from epoch `learn_epoch` on, at each 50th step: by 25 to 50 updates on batches of
    128 to 256 of the transitions remembered, more of both the fuller the memory. Twin critics, their moving
    averages, and a temperature that holds the entropy at -K are as in Haarnoja et al. (2018); the entropy is
    that of tanh(u), as in the official code, since a softmax has no density in u.

    The rest is as for `ImprovableGapBalancing`; in evaluation mode the last weights hold. The networks, Adam's moments
    and the memory are in the `state_dict`, the generator is not. Do not hand `parameters()` to the model's optimizer:
    the agent has its own. All processes of a `torch.distributed` run agree if their generators were seeded alike.

    Args:
        num_tasks: K.
        steps_per_epoch: calls that make up an epoch.
        generator: of all random numbers, initial weights of the networks among them.
        base_epoch: the epoch, from 0, whose mean losses are the base; transitions are remembered from the next on.
        learn_epoch: the first epoch in which the agent learns.
        policy_epoch: the first epoch in which it chooses the weights.
        lr: step size of its Adam.
        memory: transitions kept, the latest.

    Attributes:
        base: (K,), mean losses of the base epoch so far; a buffer.
        weights: (K,), weights of the last step; a buffer.
        step: calls so far; a buffer.
        remembered: transitions so far; a buffer.

    Raises:
        ValueError: an argument out of range, or losses that are not (K,).

    >>> agent = torch.Generator().manual_seed(0)
    >>> balance = ImprovableGapBalancingRL(2, steps_per_epoch=10, generator=agent)
    >>> values, weights = balance(torch.tensor([1.0, 100.0])), balance.weights
    >>> values / weights, weights.sum()
    (tensor([0.0000, 4.6052]), tensor(2.))
    """

    GAMMA, TAU, HIDDEN, EVERY, BATCH = 0.99, 0.005, 128, 50, 256

    def __init__(
        self,
        num_tasks: int,
        *,
        steps_per_epoch: int,
        generator: Generator,
        base_epoch: int = 1,
        learn_epoch: int = 3,
        policy_epoch: int = 5,
        lr: float = 3e-4,
        memory: int = 10_000,
    ) -> None:
        super().__init__(num_tasks, steps_per_epoch=steps_per_epoch, base_epoch=base_epoch)
        if not isinstance(generator, Generator):
            raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        require.whole("learn_epoch", learn_epoch)
        require.whole("policy_epoch", policy_epoch)
        require.whole("memory", memory, at_least=1)
        if isinstance(lr, Tensor):
            raise ValueError("lr: expected a number, got a tensor")
        require.number("lr", lr, above=0.0)
        self.generator, self.learn_epoch, self.policy_epoch = generator, learn_epoch, policy_epoch
        self.actor = _network(num_tasks, self.HIDDEN, self.HIDDEN, 2 * num_tasks, generator=generator)
        critics = [_network(2 * num_tasks, self.HIDDEN, self.HIDDEN, 1, generator=generator) for _ in range(2)]
        self.critics = nn.ModuleList(critics)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.2)))
        self.adam = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=lr, fused=True)
        self.register_buffer("memory", torch.zeros(memory, 3 * num_tasks + 1))
        self.register_buffer("remembered", torch.tensor(0))
        self.register_buffer("last", torch.full((2, num_tasks), torch.nan))

    def _weigh(self, losses: Tensor) -> Tensor:
        if not self.training:
            return self.weights
        tasks, epoch = len(losses), int(self._epoch())
        self._remember(losses)
        if epoch >= self.learn_epoch and int(self.step) % self.EVERY == 0 and self.remembered:
            fullness = 1 + min(1.0, int(self.remembered) / len(self.memory))
            for _ in range(int(self.EVERY * fullness / 2)):
                self._learn(int(self.BATCH * fullness / 2))
        if epoch < self.policy_epoch:
            weights = tasks * self._normal(losses).softmax(0)
        else:
            weights, _ = self._act(losses)
        self.last.copy_(torch.stack([losses, weights]))
        return weights

    def _remember(self, losses: Tensor) -> None:
        """The step that was before this one, with what came of it, if base losses are known and all is finite."""
        gains = torch.where(self.base > 0, (self.last[0] - losses) / self.base, torch.inf)
        transition = torch.cat([*self.last, losses, gains.amin(0, keepdim=True)])
        if self._epoch() > self.base_epoch and transition.isfinite().all():
            self.memory[self.remembered % len(self.memory)] = transition
            self.remembered += 1

    @torch.enable_grad()
    def _learn(self, batch: int) -> None:
        """One update each of critics, actor and temperature, on a batch drawn from memory."""
        tasks, kept = len(self.base), min(int(self.remembered), len(self.memory))
        rows = torch.randint(kept, (batch,), generator=self.generator, device=self.generator.device)
        state, action, following, reward = self.memory[rows.to(self.memory.device)].split([tasks] * 3 + [1], 1)
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            next_action, log_p = self._act(following)
            wanted = reward + self.GAMMA * (_least(self.targets, following, next_action) - temperature * log_p)
        pair = torch.cat([state, action], 1)
        self._descend(sum(F.mse_loss(q(pair), wanted) for q in self.critics), self.critics.parameters())
        action, log_p = self._act(state)
        self._descend((temperature * log_p - _least(self.critics, state, action)).mean(), self.actor.parameters())
        self._descend(-self.log_temperature * (log_p.detach() - tasks).mean(), [self.log_temperature])
        with torch.no_grad():
            for target, current in zip(self.targets.parameters(), self.critics.parameters()):
                target.lerp_(current, self.TAU)

    def _act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (..., K) drawn for losses (..., K), and the log-density (..., 1) of tanh(u)."""
        mean, log_deviation = self.actor(state).chunk(2, -1)
        log_deviation = log_deviation.clamp(-20, 2)
        noise = self._normal(mean)
        u = mean + log_deviation.exp() * noise
        normal = -(noise**2 / 2 + log_deviation + math.log(2 * math.pi) / 2)
        slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log of 1 - tanh(u)^2
        return state.shape[-1] * u.softmax(-1), (normal - slope).sum(-1, keepdim=True)

    def _normal(self, like: Tensor) -> Tensor:
        draws = torch.randn(like.shape, generator=self.generator, device=self.generator.device, dtype=like.dtype)
        return draws.to(like.device)

    def _descend(self, loss: Any, parameters: Iterable[nn.Parameter]) -> None:
        """A step of Adam that moves these parameters alone."""
        parameters = list(parameters)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        self.adam.step()
        self.adam.zero_grad()

    def get_extra_state(self) -> dict[str, Any]:
        """Adam's moments."""
        return self.adam.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load Adam's moments."""
        self.adam.load_state_dict(state)


def _least(critics: nn.ModuleList, state: Tensor, action: Tensor) -> Tensor:
    """The lower of both critics' values, (batch, 1)."""
    first, second = (critic(torch.cat([state, action], 1)) for critic in critics)
    return torch.minimum(first, second)


def _network(*sizes: int, generator: Generator) -> nn.Sequential:
    """A perceptron with the weights that torch would have drawn from this generator, on its device."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layer = nn.Linear(wide, narrow, device="meta").to_empty(device=generator.device)
        for tensor in (layer.weight, layer.bias):
            nn.init.uniform_(tensor, -(wide**-0.5), wide**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _over_processes(losses: Tensor) -> Tensor:
    """Losses with the value of their mean over all processes, and the gradient of one's own."""
    if not (dist.is_available() and dist.is_initialized()):
        return losses
    mean = losses.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return losses + (mean - losses).detach()
