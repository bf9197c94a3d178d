"""LegendreTron: learn, beside the classifier, the link that turns its scores into probabilities.

Multinomial logistic regression fixes that link to a softmax. Here the scores first pass through a learned monotone
map, the gradient of a convex network, and then through a softmax with one class as reference; everything is trained
on log-loss. Each link of this kind makes log-loss another proper loss of the scores: its minimum still is at the true
probabilities. A linear model so gains some curvature of its decision boundaries, and a link that flattens out can
absorb label noise. Try it on linear or frozen-feature heads with ten classes or more. Behind a deep network, which
bends its scores itself, there is less to gain; and with few rows the extra weights overfit.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="LegendreTron: Uprising Proper Multiclass Loss Learning",
    year=2023,
    helps=("label-noise",),
    departs=(
        "starts near multinomial logistic regression; the official code starts from random weights",
        "the gradient of the convex network is written out, not left to autograd inside the forward pass",
        "no activation normalisation and no units fed by the scores alone in the hidden layers",
        "one gradient map, where the official code composes two on its smaller data sets: `blocks` sets how many",
        "called proper, not canonical: softmax and learned map are gradients of convex functions, but their composition"
        " need not be one",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\log\operatorname{softmax}\bigl([\nabla g(s),\,0]\bigr)_y,\qquad s=s(x)\in\mathbb R^{C-1}\\ "
        r"g(s)&=\tfrac a2\lVert s\rVert^2+w^\top z_L,\quad "
        r"z_l=\operatorname{softplus}(W_l z_{l-1}+A_l s+b_l),\quad a,w,W_l>0 "
        r"\end{aligned}"
    ),
    url="https://github.com/khflam/legendretron",
)


@layer(shape=(4, 6))
def softmax_plus(input: Float[Tensor, "*batch scores"]) -> Float[Tensor, "*batch classes"]:
    """Probabilities of C classes from C - 1 scores: exp(t_i) / (1 + sum_j exp(t_j)), and 1 / (1 + ...) of the last.

    Without its last entry it is the gradient of the convex function log(1 + sum_j exp(t_j)).

    Args:
        input: scores t against the last class.

    Raises:
        ValueError: not a floating-point tensor with a last dimension of at least 1.

    >>> import torch
    >>> softmax_plus(torch.tensor([0.0, math.log(2)]))
    tensor([0.2500, 0.5000, 0.2500])
    """
    return _log_softmax_plus(input).exp()


@layer(shape=(4, 6), examples=({}, {"hidden": 3, "layers": 3}))
class ICNNGradientLink(nn.Module):
    """A learned monotone map of scores, the gradient of a convex function: (*batch, num_features) to the same shape.

    The function is a / 2 |s|^2 + w . z_L with z_1 = softplus(A_1 s + b_1), z_l = softplus(W_l z_{l-1} + A_l s + b_l),
    and a, w and all W_l kept positive by a softplus. a > 0 makes the map invertible, and its Jacobian symmetric and
    positive definite everywhere. At the start a is 1 and w small: nearly the identity.

    Args:
        num_features: of the scores.
        hidden: width of each layer.
        layers: L of the convex function.

    Raises:
        ValueError: a hyper-parameter below 1, scores of another width.

    >>> import torch
    >>> link = ICNNGradientLink(3)
    >>> link(torch.zeros(5, 3)).shape
    torch.Size([5, 3])
    """

    def __init__(self, num_features: int, *, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        for name, value in {"num_features": num_features, "hidden": hidden, "layers": layers}.items():
            require.whole(name, value, at_least=1)
        self.scores = nn.ModuleList(nn.Linear(num_features, hidden) for _ in range(layers))
        self.hidden = nn.ParameterList(torch.empty(hidden, hidden) for _ in range(layers - 1))
        for weight in self.hidden:
            nn.init.normal_(weight, mean=_inverse_softplus(1 / hidden), std=0.1)
        self.weight = nn.Parameter(torch.full((hidden,), _inverse_softplus(0.1 / hidden)))
        self.quadratic = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))

    def forward(self, scores: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """The gradient at `scores`."""
        require.floating("scores", scores, at_least_dims=1)
        if scores.shape[-1] != self.scores[0].in_features:
            wanted = self.scores[0].in_features
            raise ValueError(f"scores: expected {wanted} in the last dimension, got shape {tuple(scores.shape)}")
        positive = [F.softplus(weight) for weight in self.hidden]
        before = [self.scores[0](scores)]
        for linear, weight in zip(self.scores[1:], positive):
            before.append(F.linear(F.softplus(before[-1]), weight) + linear(scores))
        slope = F.softplus(self.weight) * before[-1].sigmoid()
        gradient: Tensor = F.softplus(self.quadratic) * scores + slope @ self.scores[-1].weight
        for linear, weight, x in zip(self.scores[-2::-1], reversed(positive), before[-2::-1]):
            slope = slope @ weight * x.sigmoid()
            gradient = gradient + slope @ linear.weight
        return gradient


@layer(shape=(4, 6), examples=({}, {"blocks": 2, "hidden": 3, "layers": 1}))
class LegendreTron(nn.Module):
    """Log-probabilities of C classes from C - 1 scores, by a learned link: softmax_plus of one gradient map or several.

        head = LegendreTron(num_classes=C)
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()])
        head.loss(model(x), y).mean().backward()      # model gives C - 1 scores
        prediction = head(model(x)).argmax(-1)

    For a model of C logits pass logits[..., :-1] - logits[..., -1:]. Predict with the head's output: the largest score
    need not be the likeliest class.

    Args:
        num_classes: C, at least 2.
        hidden, layers: of each gradient map, see `ICNNGradientLink`.
        blocks: how many of them, one after another.

    Raises:
        ValueError: a hyper-parameter out of range, scores or labels that do not fit.

    >>> import torch
    >>> head = LegendreTron(4)
    >>> head(torch.randn(5, 3)).exp().sum(-1)
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], grad_fn=<SumBackward1>)
    """

    def __init__(self, num_classes: int, *, hidden: int = 16, layers: int = 2, blocks: int = 1) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("blocks", blocks, at_least=1)
        self.links = nn.Sequential(
            *(ICNNGradientLink(num_classes - 1, hidden=hidden, layers=layers) for _ in range(blocks))
        )

    def forward(self, scores: Float[Tensor, "*batch scores"]) -> Float[Tensor, "*batch classes"]:
        """Log-probabilities of all classes, the reference last."""
        return _log_softmax_plus(self.links(scores))

    def loss(self, scores: Float[Tensor, "*batch scores"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """-log p of the class numbers `target`, in nats per sample."""
        log_p = self(scores)
        require.classes(log_p, target)
        values: Tensor = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return values


def _log_softmax_plus(input: Tensor) -> Tensor:
    require.floating("input", input, at_least_dims=1)
    if input.shape[-1] < 1:
        raise ValueError(f"input: expected at least one score in the last dimension, got shape {tuple(input.shape)}")
    return torch.log_softmax(F.pad(input, (0, 1)), -1)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
