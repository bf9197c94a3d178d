"""One-step GD in context: what one layer of linear self-attention learns is a single gradient step.

Show a network prompts of n pairs (x, y), each prompt with a regression of its own, and ask for y at a new x. Among
all single layers of attention without softmax, the best in expected squared error takes exactly one gradient step
on the prompt's least squares, from zero; for inputs with covariance Sigma the step is preconditioned by the
inverse of Sigma, and for targets that are not linear it is still one step. So such a layer can do no more than
that, and the size of the step is known in closed form: a test bed for in-context learning, and a baseline that a
deeper or softmax network has to beat. It says nothing about those.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="One Step of Gradient Descent is Provably the Optimal In-Context Learner with One Layer of Linear"
    " Self-Attention",
    year=2023,
    helps=("in-context-learning",),
    url="https://arxiv.org/abs/2307.03576",
    departs=(
        "the step size in closed form is derived here; the paper leaves it as a ratio of expectations",
        "the paper's value matrix and linear head enter only as their product, one vector, which is the parameter",
    ),
    equation=(
        r"\hat y(x)=\eta\sum_{i=1}^n y_i\,x_i^\top\Sigma^{-1}x,\qquad "
        r"\eta=\frac1{n+d+1+\sigma^2},\qquad x_i\in\mathbb R^d,\quad\sigma^2:\ \text{noise variance}"
    ),
)


class LinearSelfAttention(nn.Module):
    """One layer of self-attention without softmax, from a prompt to predictions at query points.

    With tokens v_i = [x_i, y_i] and [query, 0] it predicts sum_i (value . v_i) (v_i' K' Q [query, 0]), the sum over
    the n pairs. Parameters: `query` Q and `key` K (d + 1, d + 1), and `value` (d + 1,).

    Args:
        dimensions: d of x, at least 1.
        scale: standard deviation of the initial entries, above 0.
        generator: of the initial entries; None is torch's global one.

    Raises:
        ValueError: a number out of range; in the call, shapes or dtypes that do not fit.

    >>> attention = LinearSelfAttention(3, generator=torch.Generator().manual_seed(0))
    >>> attention(torch.ones(8, 5, 3), torch.ones(8, 5), torch.ones(8, 2, 3)).shape  # 8 prompts, 2 queries each
    torch.Size([8, 2])
    """

    def __init__(self, dimensions: int, *, scale: float = 0.1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        require.whole("dimensions", dimensions, at_least=1)
        require.number("scale", scale, above=0.0)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        width = dimensions + 1
        self.query, self.key, self.value = drawn(width, width), drawn(width, width), drawn(width)

    def forward(
        self,
        x: Float[Tensor, "*prompts length d"],
        y: Float[Tensor, "*prompts length"],
        query: Float[Tensor, "*prompts queries d"],
    ) -> Float[Tensor, "*prompts queries"]:
        _prompts(x, y, query)
        if x.shape[-1] + 1 != len(self.value):
            raise ValueError(f"x: expected {len(self.value) - 1} features, got {x.shape[-1]}")
        v = torch.cat([x, y.unsqueeze(-1)], dim=-1)
        read = (v @ self.value).unsqueeze(-2) @ v  # without softmax the sum over pairs comes first
        return (read @ (self.key.mT @ self.query[:, :-1]) @ query.mT).squeeze(-2)  # a query's own y is 0

    def effective_matrix(self) -> Float[Tensor, "d d"]:
        """A with prediction = (A sum_i y_i x_i) . query + terms that no step of gradient descent has.

        At the optimum it is eta I, or eta Sigma^-1, and those other terms, in x_i x_i' and y_i^2, are 0.
        """
        m = self.key.mT @ self.query[:, :-1]
        return m[:-1].mT * self.value[-1] + torch.outer(m[-1], self.value[:-1])


def one_step_gd_predictor(
    x: Float[Tensor, "*prompts length d"],
    y: Float[Tensor, "*prompts length"],
    query: Float[Tensor, "*prompts queries d"],
    *,
    step_size: float | Tensor,
    preconditioner: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*prompts queries"]:
    """Prediction after one gradient step from 0 on sum_i (y_i - w . x_i)^2 / 2: eta (P sum_i y_i x_i) . query.

    Args:
        x, y: the pairs of each prompt.
        query: points to predict at.
        step_size: eta, such as `optimal_icl_step_size`.
        preconditioner: P, such as the inverse of the covariance of x; None is the identity.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, 1.0])
    >>> one_step_gd_predictor(x, y, torch.tensor([[1.0, 1.0]]), step_size=0.5)  # w = (1.5, 1)
    tensor([2.5000])
    """
    _prompts(x, y, query)
    require.number("step_size", step_size)
    weights = step_size * y.unsqueeze(-2) @ x
    if preconditioner is not None:
        require.same_shape("preconditioner", preconditioner, (x.shape[-1],) * 2)
        weights = weights @ preconditioner.mT
    return (weights @ query.mT).squeeze(-2)


def optimal_icl_step_size(length: int, dimensions: int, *, noise: float = 0.0) -> float:
    """The best eta for eta sum_i y_i x_i . x, which is 1 / (n + d + 1 + noise^2).

    For x and w standard normal in d dimensions and y = w . x + noise times standard normal. With S = sum_i x_i x_i',
    the error E |eta sum_i y_i x_i - w|^2 is eta^2 (E tr S^2 + noise^2 n d) - 2 eta n d + d, and E S^2 is
    n (n + d + 1) I. The smallest is d (1 - n eta), to which a noisy query adds noise^2. The same eta goes with the
    preconditioner Sigma^-1 where x has covariance Sigma and w has covariance Sigma^-1.

    Args:
        length: n, pairs in a prompt, at least 1.
        dimensions: d of x, at least 1.
        noise: standard deviation of the noise in y, at least 0.

    Raises:
        ValueError: a number outside these.

    >>> optimal_icl_step_size(20, 4, noise=0.0)
    0.04
    """
    require.whole("length", length, at_least=1)
    require.whole("dimensions", dimensions, at_least=1)
    require.number("noise", noise, at_least=0.0)
    return 1 / (length + dimensions + 1 + noise**2)


def _prompts(x: Tensor, y: Tensor, query: Tensor) -> None:
    require.floating("x", x, at_least_dims=2)
    require.same_shape("y", y, x.shape[:-1])
    queries = query.shape[-2] if query.ndim > 1 else 1
    require.same_shape("query", query, (*x.shape[:-2], queries, x.shape[-1]))
