"""Z-loss: ask for a high z-score of the true class among all logits, at a price per step that ignores their number.

The logits are standardised, and a softplus asks the true one to lie b standard deviations above the mean. Shifting or
scaling the logits changes nothing, as with top-k errors, and b chooses the k: large b stresses the first place, small
b a place among the first many. It depends on the logits only through the true one, their sum and their sum of
squares. Losses of this spherical family allow exact gradient steps on an output layer of D classes in O(d^2) instead
of O(D d) per sample, d being the width below: that is `FactoredOutput`. Try it for ten thousand classes or more,
where top-k counts. It gives no probabilities, and it is not the z-loss on log-partitions of large language models.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    year=2016,
    helps=("training-cost",),
    departs=(
        "eps is added to the variance; the official code adds 1e-12 to the standard deviation, whose slope at equal"
        " logits is infinite",
        "the factored output layer comes without the official code's periodic repair of singular values; `refresh`"
        " multiplies the factors out instead",
    ),
    equation=(
        r"\ell=\frac1a\log\bigl(1+e^{a(b-z)}\bigr),\qquad "
        r"z=\frac{o_y-\bar o}{\sqrt{\operatorname{var}(o)+\epsilon}},\qquad o:\ \text{all logits}"
    ),
    url="https://arxiv.org/abs/1604.08859",
)


@loss(
    on="classes",
    examples=({}, {"a": 0.1, "b": 10.0}, {"a": 3.0, "b": 1.0}),
    tune={"a": (0.1, 1.0), "b": (3.0, 10.0)},
)
def z_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    a: float | Tensor = 1.0,
    b: float | Tensor = 0.0,
    eps: float = 1e-6,
) -> Float[Tensor, "*batch"]:
    """log(1 + exp(a (b - z))) / a with z = (o_y - mean o) / std o, over all D logits o. Per sample.

    The largest z that any logits reach is sqrt(D - 1); with a b beyond it the loss never comes to rest.

    Args:
        input: logits o.
        target: class numbers y, 0 to D - 1.
        a: steepness, above 0; towards infinity it is max(b - z, 0).
        b: the z-score asked for.
        eps: added to the variance, at least 0, in squared units of the logits. It matters only where they are nearly
            equal; at 0 such samples have no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, a not above 0, eps below 0.

    >>> import torch
    >>> z_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), b=1.0)  # z = 1
    tensor([0.6931])
    """
    require.classes(input, target)
    require.number("eps", eps, at_least=0.0)
    centred = input - input.mean(-1, keepdim=True)
    variance = torch.linalg.vecdot(centred, centred) / input.shape[-1]
    return _below(centred.gather(-1, target.unsqueeze(-1)).squeeze(-1) / (variance + eps).sqrt(), a, b)


def z_loss_from_sums(
    true: Float[Tensor, "*batch"],
    squares: Float[Tensor, "*batch"],
    total: Float[Tensor, "*batch"],
    *,
    num_classes: int,
    a: float | Tensor = 1.0,
    b: float | Tensor = 0.0,
    eps: float = 1e-6,
) -> Float[Tensor, "*batch"]:
    """`z_loss` of logits of which only three numbers are known, as `FactoredOutput` gives them. Per sample.

    The variance is a difference, squares / D - (total / D)^2: where the mean exceeds the standard deviation a
    thousandfold, single precision loses it.

    Args:
        true: logit of the true class.
        squares: sum of the squares of all D logits.
        total: their sum.
        num_classes: D, at least 2.
        a, b, eps: as in `z_loss`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> z_loss_from_sums(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(2.0), num_classes=2, b=1.0)
    tensor(0.6931)
    """
    require.floating("true", true)
    require.same_shape("squares", squares, tuple(true.shape))
    require.same_shape("total", total, tuple(true.shape))
    require.whole("num_classes", num_classes, at_least=2)
    require.number("eps", eps, at_least=0.0)
    mean = total / num_classes
    variance = (squares / num_classes - mean**2).clamp_min(0)
    return _below((true - mean) / (variance + eps).sqrt(), a, b)


class FactoredOutput(nn.Module):
    """A linear output layer o = W h over D classes that learns from spherical losses without ever computing o.

    W (D, d) is held as V U + 1 omega^T with U (d, d), next to U^-1, Q = W^T W and the sum of W's rows (Vincent, de
    Brebisson and Bouthillier, 2015). A gradient step multiplies W by a d x d matrix, adds a multiple of 1 h^T, and
    changes the rows of the true classes: U and omega take up the first two, V the third. For m samples forward and
    update cost O(m d^2 + m^3), whatever D, and are exact up to rounding:

        true, squares, total = output(h, target)
        for sum in (true, squares, total):
            sum.retain_grad()
        z_loss_from_sums(true, squares, total, num_classes=D, b=5.0).mean().backward()  # h.grad as of the dense layer
        output.update(h, target, (true.grad, squares.grad, total.grad), lr=0.1)

    Any function of the three sums will do in place of the Z-loss. Rounding errors add up over the updates, fastest
    where lr times the slope by `squares` times |h|^2 is not small; call `refresh` now and then.

    Args:
        weight: the initial W (D, d), float32 or float64, copied. At 0 all logits are equal, where the Z-loss has no
            useful slope.

    Attributes:
        V, U, U_inverse, omega, Q, row_sum: the buffers; a state_dict holds them all.

    Raises:
        ValueError: a weight that is not a floating-point matrix.

    >>> output = FactoredOutput(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    >>> output(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))  # of the logits 1, 4, 3
    (tensor([4.]), tensor([26.]), tensor([8.]))
    """

    def __init__(self, weight: Float[Tensor, "classes width"]) -> None:
        super().__init__()
        require.floating("weight", weight, dims=2)
        width = weight.shape[1]
        self.register_buffer("V", weight.detach().clone())
        for name in ("U", "U_inverse", "Q"):
            self.register_buffer(name, weight.new_empty(width, width))
        for name in ("omega", "row_sum"):
            self.register_buffer(name, weight.new_zeros(width))
        self._restart()

    def forward(
        self, hidden: Float[Tensor, "batch width"], target: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """The true logit, the sum of squares and the sum of all logits, with gradients to `hidden`."""
        self._check(hidden, target)
        true = torch.linalg.vecdot(self._rows(target), hidden)
        return true, torch.linalg.vecdot(hidden @ self.Q, hidden), hidden @ self.row_sum

    def logits(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        """All D logits, for prediction: O(D d) per sample."""
        return hidden @ self.U.T @ self.V.T + (hidden @ self.omega).unsqueeze(-1)

    def weight(self) -> Float[Tensor, "classes width"]:
        """W multiplied out: O(D d^2)."""
        return self.V @ self.U + self.omega

    @torch.no_grad()
    def update(
        self,
        hidden: Float[Tensor, "batch width"],
        target: Int[Tensor, " batch"],
        slopes: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]],
        *,
        lr: float,
    ) -> None:
        """W <- W - lr dL/dW, where L is whatever `slopes` are the derivatives of.

        Args:
            hidden, target: what `forward` was called with.
            slopes: dL by the three numbers that `forward` gave.
            lr: learning rate, at least 0.

        Raises:
            ValueError: shapes or dtypes that do not fit, lr below 0.
        """
        self._check(hidden, target)
        require.number("lr", lr, at_least=0.0)
        for slope in slopes:
            require.same_shape("slopes", slope, tuple(target.shape))
        by_true, by_squares, by_total = slopes
        # W becomes W B + 1 shift^T + Y: with B = I - H^T S H, and Y zero but for `added` at the rows `target`.
        shrink = (2 * lr * by_squares).unsqueeze(1) * hidden  # S H
        shift = -lr * (by_total @ hidden)
        added = (-lr * by_true).unsqueeze(1) * hidden

        def times_b(x: Tensor) -> Tensor:
            return x - (x @ hidden.T) @ shrink

        moved_rows, moved_sum = times_b(self._rows(target)), times_b(self.row_sum)
        self.U.copy_(times_b(self.U))
        unit = torch.eye(len(hidden), dtype=hidden.dtype, device=hidden.device)
        self.U_inverse += hidden.T @ torch.linalg.solve(unit - shrink @ hidden.T, shrink @ self.U_inverse)  # Woodbury
        self.omega.copy_(times_b(self.omega) + shift)
        self.V.index_add_(0, target, added @ self.U_inverse)

        rest = moved_sum + added.sum(0)
        repeats = (target.unsqueeze(1) == target).to(added)
        half = moved_rows.T @ added + torch.outer(shift, rest)
        squares = added.T @ repeats @ added + len(self.V) * torch.outer(shift, shift)
        self.Q.copy_(times_b(times_b(self.Q).T) + half + half.T + squares)
        self.row_sum.copy_(rest + len(self.V) * shift)

    @torch.no_grad()
    def refresh(self) -> None:
        """Multiply the factors out and start anew from W, which sheds accumulated rounding: O(D d^2)."""
        self.V.copy_(self.weight())
        self._restart()

    def _restart(self) -> None:
        self.U.copy_(torch.eye(len(self.U)))
        self.U_inverse.copy_(self.U)
        self.omega.zero_()
        self.Q.copy_(self.V.T @ self.V)
        self.row_sum.copy_(self.V.sum(0))

    def _rows(self, target: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        return self.V[target] @ self.U + self.omega

    def _check(self, hidden: Tensor, target: Tensor) -> None:
        require.floating("hidden", hidden, dims=2)
        if hidden.shape[1] != len(self.U):
            raise ValueError(f"hidden: expected (batch, {len(self.U)}), got shape {tuple(hidden.shape)}")
        require.integers("target", target, shape=hidden.shape[:1])


def _below(z: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """softplus of how far z stays below b, with steepness a."""
    require.number("a", a, above=0.0)
    require.number("b", b)
    return torch.logaddexp(torch.zeros_like(z), a * (b - z)) / a
