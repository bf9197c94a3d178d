"""Adversarial adaptive sampling: a network that solves a PDE against a density that seeks where it fails.

A physics-informed network minimises the mean square of its residual over points of a domain. Points drawn evenly miss
a narrow peak or layer. Here they come from a normalising flow that in turn maximises that mean, less a penalty on the
slope of its density, without which it would shrink to the single worst point. The network so meets its own failures in
proportion, and its residual becomes flat: then a few points tell its mean well.

Use it where the solution has sharp features in unknown places. It costs some residual evaluations and flow steps at
each redraw; where the solution is smooth even points do as well, and in one or two dimensions drawing from a pool in
proportion to the residual is simpler.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Adversarial Adaptive Sampling: Unify PINN and Optimal Transport for the Approximation of PDEs",
    year=2024,
    departs=(
        "the flow is a coupling flow of logistic mixtures on the box in place of KRnet",
        "each update divides the squared residual by its largest value, so that beta does not depend on the equation,"
        " and subtracts its mean, which takes noise from the gradient and leaves its expectation",
        "numbers of points and steps are ours: we found no published code",
    ),
    equation=(
        r"\min_\theta\max_\alpha\int_\Omega\Bigl(r_\theta(x)^2\,p_\alpha(x) "
        r"-\beta\,\lVert\nabla_x\,p_\alpha(x)\rVert^2\Bigr)dx,\qquad "
        r"r_\theta:\ \text{residual},\quad p_\alpha:\ \text{density of the points}"
    ),
    url="https://arxiv.org/html/2305.18702v2",
)

_NARROWEST, _WIDEST = 0.01, 0.5  # scales of the mixtures' components, in widths of the box


def adversarial_residual_objective(
    residual: Float[Tensor, "*batch"],
    log_prob: Float[Tensor, "*batch"],
    gradient: Float[Tensor, "*batch d"],
    proposal_log_prob: Float[Tensor, "*batch"] | None = None,
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Samples of the integral of r^2 p - beta |grad p|^2, which the network lowers and the density p raises.

    At points drawn from a proposal q they are (r^2 p - beta |grad p|^2) / q, with grad p = p grad log p. For the
    network, which meets only the first term, draw from p itself; the density differentiates at points held fixed.

    Args:
        residual: r of the equation at the points.
        log_prob: log p there, in nats.
        gradient: of log p in the coordinates.
        proposal_log_prob: log q; None stands for q = p, both in value and derivative.
        beta: >= 0, in units of r^2 times (length)^(d + 2).

    Raises:
        ValueError: shapes or dtypes that do not fit, `beta` out of range.

    >>> r, log_p = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    >>> adversarial_residual_objective(r, log_p, torch.tensor([[0.0], [3.0]]), beta=0.1)
    tensor([ 4.0000, -0.9000])
    """
    require.floating("residual", residual)
    require.same_shape("log_prob", log_prob, residual.shape)
    require.floating("gradient", gradient, dims=residual.ndim + 1)
    if gradient.shape[:-1] != residual.shape:
        raise ValueError(f"gradient: expected shape {(*residual.shape, 'd')}, got {tuple(gradient.shape)}")
    require.number("beta", beta, at_least=0.0)
    value = residual.square() - beta * log_prob.exp() * gradient.square().sum(-1)
    if proposal_log_prob is None:
        return value
    require.same_shape("proposal_log_prob", proposal_log_prob, residual.shape)
    return (log_prob - proposal_log_prob).exp() * value


class AdversarialAdaptiveSampler(nn.Module):
    """Draws points of a box from a density that follows the squared residual of whoever trains on them.

    Layers in turn move the even and the odd coordinates, given the others, by the distribution function of a mixture
    of logistics cut to the unit interval, one component being uniform. The density is smooth and positive up to the
    boundary, which keeps the penalty finite; affine layers behind a logit map would make it 0 or infinite there. It
    begins within 8% of uniform in each coordinate. With one coordinate the flow is such a mixture.

        sampler = AdversarialAdaptiveSampler([0, 0], [1, 1], generator=g)
        ascent = torch.optim.Adam(sampler.parameters(), lr=0.02)
        for stage in range(20):
            x = sampler.sample(500, generator=g)
            ...  # train the network on x and the boundary
            sampler.update(residual, ascent, generator=g)

    Args:
        low, high: corners of the box, d numbers each.
        beta: of the penalty, > 0, for a squared residual of at most 1 and in units of (length)^(d + 2): the larger,
            the nearer to uniform; on the unit interval 0.001 to 0.01.
        components: logistics of each mixture.
        hidden: width of the network that sets a layer's mixtures.
        layers: at least 2 reach every coordinate.
        replicas: leading dimensions of stacked samplers, which do not know of each other.
        generator: of the initial weights, or a sequence of them, one for each replica; None is torch's global one.

    Raises:
        ValueError: a box or a hyper-parameter out of range.

    >>> g = torch.Generator().manual_seed(0)
    >>> sampler = AdversarialAdaptiveSampler([-1.0], [1.0], generator=g)
    >>> ascent = torch.optim.Adam(sampler.parameters(), lr=0.05)
    >>> for _ in range(10):
    ...     _ = sampler.update(lambda x: torch.exp(-20 * x[..., 0] ** 2), ascent, points=100, generator=g)
    >>> sampler.log_prob(torch.tensor([[-0.9], [0.0], [0.9]])).exp() > 0.5  # 0.5 is uniform
    tensor([False,  True, False])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        *,
        beta: float = 0.003,
        components: int = 8,
        hidden: int = 32,
        layers: int = 2,
        replicas: tuple[int, ...] = (),
        generator: Generator | Sequence[Generator] | None = None,
    ) -> None:
        super().__init__()
        for name, corner in (("low", low), ("high", high)):
            if not len(corner) or len(corner) != len(low):
                raise ValueError(f"{name}: expected as many numbers as coordinates, {len(low)}, got {corner}")
            for value in corner:
                require.number(name, value)
        if not all(a < b for a, b in zip(low, high)):
            raise ValueError(f"high: expected more than low, {low}, in each coordinate, got {high}")
        require.number("beta", beta, above=0.0)
        for name, width in (("components", components), ("hidden", hidden), ("layers", layers)):
            require.whole(name, width, at_least=1)
        for count in replicas:
            require.whole("replicas", count, at_least=1)
        self.beta, self.components, self.replicas = beta, components, tuple(replicas)
        self.register_buffer("low", torch.tensor(low, dtype=torch.get_default_dtype()))
        self.register_buffer("high", torch.tensor(high, dtype=torch.get_default_dtype()))
        even, odd = list(range(0, len(low), 2)), list(range(1, len(low), 2))
        # What a layer moves and what it is given.
        self._moves = [(odd, even) if odd and layer % 2 else (even, odd) for layer in range(layers if odd else 1)]
        start = torch.zeros(3 * components + 1)
        start[0] = math.log(9 * components)  # nine tenths of the mass is uniform
        self.weights = nn.ParameterList()
        for moved, given in self._moves:
            drawn = 2 * _draw(torch.randn, (hidden, len(given)), self.replicas, generator)
            for weight in (
                drawn,
                torch.zeros(*self.replicas, 1, hidden),
                torch.zeros(*self.replicas, len(moved) * len(start), hidden),
                start.repeat(len(moved)).expand(*self.replicas, 1, -1).clone(),
            ):
                self.weights.append(nn.Parameter(weight))

    def log_prob(self, x: Float[Tensor, "*replicas n d"]) -> Float[Tensor, "*replicas n"]:
        """Logarithm of the density at points, in nats; -inf outside the box.

        Raises:
            ValueError: points that do not fit the box.
        """
        require.floating("x", x, dims=len(self.replicas) + 2)
        if x.shape[:-2] != self.replicas or x.shape[-1] != len(self.low):
            raise ValueError(f"x: expected shape {(*self.replicas, 'n', len(self.low))}, got {tuple(x.shape)}")
        _, log_prob = self._flow(x)
        inside = ((x >= self.low) & (x <= self.high)).all(-1)
        return torch.where(inside, log_prob, -torch.inf)

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: Generator | Sequence[Generator] | None = None
    ) -> Float[Tensor, "*replicas n d"]:
        """Draw n points for each replica, without gradient; a sequence of generators gives each its own.

        Raises:
            ValueError: `n` < 1.
        """
        require.whole("n", n, at_least=1)
        drawn = _draw(torch.rand, (n, len(self.low)), self.replicas, generator).to(self.low)
        columns = list(drawn.unbind(-1))
        for layer, (moved, given) in reversed(list(enumerate(self._moves))):
            mixture = self._mixture(layer, [columns[i] for i in given], drawn)
            wanted = torch.stack([columns[i] for i in moved], -1)
            # Bisection: as many halvings as the dtype has digits.
            place, step = torch.full_like(wanted, 0.5), 0.25
            while step > torch.finfo(wanted.dtype).eps / 4:
                below, _ = _cut_logistics(place, *mixture)
                place, step = torch.where(below < wanted, place + step, place - step), step / 2
            for i, column in zip(moved, place.unbind(-1)):
                columns[i] = column
        return torch.minimum(self.low + (self.high - self.low) * torch.stack(columns, -1), self.high)

    def update(
        self,
        residual: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        points: int = 1000,
        steps: int = 10,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "*replicas"]:
        """Ascend the objective by some steps on one set of points drawn from the density as it is now.

        A residual that is zero everywhere leaves the penalty alone, which draws the density to the uniform one.

        Args:
            residual: maps points (*replicas, points, d) to the residual there, (*replicas, points); it may use
                autograd inside, and is asked once.
            optimizer: of this module's parameters, such as Adam with a learning rate of 0.01 to 0.05.
            points: how many are drawn for each replica.
            steps: of the optimizer; few, since many would fit the density to the points.
            generator: as in `sample`.

        Returns:
            The mean objective before the last step, of the residual divided by its largest size.

        Raises:
            ValueError: a number out of range; a residual that is not (*replicas, points) or not finite.
        """
        require.whole("steps", steps, at_least=1)
        x = self.sample(points, generator=generator)
        squared = residual(x).detach().square()
        require.same_shape("residual", squared, x.shape[:-1])
        if not squared.isfinite().all():
            raise ValueError("residual: expected finite values whose squares are finite too, got others")
        size = (squared / squared.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)).sqrt()
        average = size.square().mean(-1, keepdim=True)
        with torch.no_grad():
            proposal = self.log_prob(x)
        x = x.detach().requires_grad_()
        for _ in range(steps):
            with torch.enable_grad():
                log_prob = self.log_prob(x)
                (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
                value = adversarial_residual_objective(size, log_prob, gradient, proposal, beta=self.beta)
                # A constant has no gradient in expectation, as p stays a density: it only takes noise away.
                descent = (average * (log_prob - proposal).exp() - value).mean(-1).sum()
            optimizer.zero_grad()
            torch.autograd.backward(descent, inputs=list(self.weights))
            optimizer.step()
        return value.detach().mean(-1)

    def _flow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where x goes in the unit cube, evenly if x comes from the density, and log |det| of the map's Jacobian."""
        width = self.high - self.low
        columns = list(((x - self.low) / width).unbind(-1))
        log_det = -width.log().sum()
        for layer, (moved, given) in enumerate(self._moves):
            mixture = self._mixture(layer, [columns[i] for i in given], x)
            below, density = _cut_logistics(torch.stack([columns[i] for i in moved], -1), *mixture)
            log_det = log_det + density.log().sum(-1)
            for i, column in zip(moved, below.unbind(-1)):
                columns[i] = column
        return torch.stack(columns, -1), log_det

    def _mixture(self, layer: int, given: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares (..., moved, 1 + components), centres and scales (..., moved, components) of a layer's mixtures."""
        first, first_bias, second, second_bias = self.weights[4 * layer : 4 * layer + 4]
        inputs = torch.stack(given, -1) - 0.5 if given else x[..., :0]
        raw = (inputs @ first.mT + first_bias).tanh() @ second.mT + second_bias
        share, centre, scale = raw.unflatten(-1, (-1, 3 * self.components + 1)).split(
            [self.components + 1, self.components, self.components], -1
        )
        even = (torch.arange(self.components, device=x.device, dtype=raw.dtype) + 0.5) / self.components
        scale = _NARROWEST * (math.log(_WIDEST / _NARROWEST) * scale.sigmoid()).exp()
        return share.softmax(-1), (even.logit() + centre).sigmoid(), scale


def _cut_logistics(x: Tensor, share: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution function and density at x of a uniform and some logistic components on the unit interval."""
    start, end = (-centre / scale).sigmoid(), ((1 - centre) / scale).sigmoid()
    below = ((x.unsqueeze(-1) - centre) / scale).sigmoid()
    uniform, share = share[..., 0], share[..., 1:] / (end - start)
    density = uniform + (share * below * (1 - below) / scale).sum(-1)
    return uniform * x + (share * (below - start)).sum(-1), density


def _draw(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    replicas: tuple[int, ...],
    generator: Generator | Sequence[Generator] | None,
) -> Tensor:
    """Random numbers (*replicas, *shape), from one generator or from one for each replica."""
    if generator is None or isinstance(generator, Generator):
        return draw(*replicas, *shape, generator=generator, device=None if generator is None else generator.device)
    if len(generator) != math.prod(replicas):
        raise ValueError(f"generator: expected one for each of {math.prod(replicas)} replicas, got {len(generator)}")
    return torch.stack([draw(*shape, generator=g, device=g.device) for g in generator]).view(*replicas, *shape)
