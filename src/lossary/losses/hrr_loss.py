"""HRR loss: a class is a random key bound to a random value, and the network learns to say the bound pair.

There is no class layer: the network ends in d outputs (through tanh, in the paper), which are drawn towards the code
of the true class, the circular convolution of its key with its value. To predict, every class unbinds the outputs
with its key and asks how much of its value comes out. Try it where a softmax head generalises poorly to changed
inputs, as when counting a few objects of another size or shape; it gives no probabilities. With keys of unit spectrum
the unbinding changes nothing: it is nearest neighbour by cosine among fixed random unit codes, so plain regression to
such codes is the control to compare it with.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Towards Generalization in Subitizing with Neuro-Symbolic Loss using Holographic Reduced Representations",
    year=2023,
    helps=("train-test-shift",),
    departs=(
        "keys and values are drawn from a generator that is passed in; the official code sets a seed for each",
        "the network's last tanh is the model's business",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\lVert s(x)-k_y\circledast v_y\rVert_2,\qquad "
        r"\hat y=\argmax_c\,\cos\bigl(k_c\star s(x),\,v_c\bigr)\\ "
        r"&\text{keys }k_c\text{ and values }v_c\text{ random; }\circledast,\star: "
        r"\text{ circular convolution, correlation} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2312.15310",
)


def hrr_bind(x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Circular convolution along the last dimension: (x * y)_k = sum_j x_j y_(k - j mod d). Leading ones broadcast.

    Args:
        x: float32 or float64.
        y: of the same last dimension.

    Raises:
        ValueError: dtypes or last dimensions that do not fit.

    >>> import torch
    >>> hrr_bind(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]))  # one step to the right
    tensor([3., 1., 2.])
    """
    _check_pair("x", x, "y", y)
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(y), n=x.shape[-1])


def hrr_unbind(bound: Float[Tensor, "*batch dim"], key: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Circular correlation with the key: exactly undoes `hrr_bind` for keys from `hrr_project`, else roughly.

    Args:
        bound: float32 or float64.
        key: of the same last dimension; leading ones broadcast.

    Raises:
        ValueError: dtypes or last dimensions that do not fit.

    >>> import torch
    >>> hrr_unbind(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.0]))
    tensor([1., 2., 3.])
    """
    _check_pair("bound", bound, "key", key)
    return torch.fft.irfft(torch.fft.rfft(bound) * torch.fft.rfft(key).conj(), n=bound.shape[-1])


def hrr_project(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """The vector with all Fourier coefficients scaled to modulus 1; its length is then 1. Zero ones stay zero.

    Args:
        x: float32 or float64.

    Raises:
        ValueError: `x` not floating-point.

    >>> import torch
    >>> hrr_project(torch.tensor([3.0, 1.0]))  # sum 4 and difference 2 become 1 and 1
    tensor([1., 0.])
    """
    require.floating("x", x, at_least_dims=1)
    return torch.fft.irfft(torch.fft.rfft(x).sgn(), n=x.shape[-1])


class HRRClassificationLoss(nn.Module):
    """Distance ||s - bind(k_y, v_y)||_2 of the outputs s from the true class's code, per sample.

        criterion = HRRClassificationLoss(10, generator=torch.Generator().manual_seed(0))
        criterion(model(x).tanh(), y).mean().backward()
        labels = criterion.predict(model(x).tanh())

    Args:
        num_classes: C.
        dim: d, the number of the network's outputs; 64 in the paper.
        generator: of keys and values, drawn N(0, 1/d) and projected.

    Attributes:
        key, value, code: (num_classes, dim) buffers; code is the bound pair, of length 1.

    Raises:
        ValueError: a number out of range; outputs that are not (*batch, dim), labels that do not fit them.

    >>> criterion = HRRClassificationLoss(3, dim=8, generator=torch.Generator().manual_seed(0))
    >>> criterion(torch.zeros(2, 8), torch.tensor([0, 2])).round(decimals=5)  # codes have length 1
    tensor([1., 1.])
    >>> criterion.predict(0.1 * criterion.code)
    tensor([0, 1, 2])
    """

    def __init__(self, num_classes: int, *, dim: int = 64, generator: Generator) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("dim", dim, at_least=2)
        drawn = torch.randn(2, num_classes, dim, generator=generator, device=generator.device) / dim**0.5
        key, value = hrr_project(drawn)
        self.register_buffer("key", key)
        self.register_buffer("value", value)
        self.register_buffer("code", hrr_bind(key, value))

    def forward(self, input: Float[Tensor, "*batch dim"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Distances to the codes of the classes `target`."""
        self._check(input)
        require.integers("target", target, shape=tuple(input.shape[:-1]))
        return torch.linalg.vector_norm(input - self.code.to(input.dtype)[target], dim=-1)

    def batch_norm(self, input: Float[Tensor, "*batch dim"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """What the official code minimises: one Frobenius norm over the whole batch, the root of summed squares.

        Its gradient has length 1 however small the errors or large the batch.
        """
        return torch.linalg.vector_norm(self(input, target))

    def scores(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch classes"]:
        """cos(unbind(s, k_c), v_c), -1 to 1, which is cos(s, code_c) up to rounding."""
        self._check(input)
        read = hrr_unbind(input.unsqueeze(-2), self.key.to(input.dtype))
        return F.cosine_similarity(read, self.value.to(input.dtype), dim=-1)

    def predict(self, input: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """The class of the largest score."""
        return self.scores(input).argmax(-1)

    def _check(self, input: Tensor) -> None:
        require.floating("input", input, at_least_dims=1)
        if input.shape[-1] != self.code.shape[1]:
            raise ValueError(f"input: expected {self.code.shape[1]} outputs last, got shape {tuple(input.shape)}")


def _check_pair(first: str, x: Tensor, second: str, y: Tensor) -> None:
    require.floating(first, x, at_least_dims=1)
    require.floating(second, y, at_least_dims=1)
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(f"{second}: expected last dimension {x.shape[-1]}, as {first} has, got {tuple(y.shape)}")
