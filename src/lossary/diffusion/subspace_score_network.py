"""Subspace score network: for data near an unknown low-dimensional plane, learn the plane and a score in it.

Of data that lie on a plane, the score at noise sigma is the plane's own score plus a pull straight back to it, which
is known and grows without bound as the noise vanishes. This network has the pull built in and a small network that
sees only the plane's few coordinates, so what it must learn, and the number of samples for it, depend on the plane's
dimension and not on that of the space. For data whose linear structure dominates (latents, spectra, embeddings);
where data fill the space or bend, an ordinary network is the better choice.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._process import Process, over
from lossary.paper import Paper

PAPER = Paper(
    title="Score Approximation, Estimation and Distribution Recovery of Diffusion Models on Low-Dimensional Data",
    year=2023,
    helps=("density-estimation", "few-labels"),
    departs=(
        "any process with alpha and sigma; the paper has the Ornstein-Uhlenbeck one, sigma^2 = h(t) = 1 - exp(-t)",
        "the network in the plane is the caller's, without the paper's bounds on its weights",
        "the basis is the Q of a free matrix rather than optimised over orthonormal matrices",
    ),
    equation=(r"s_{V,\theta}(x,t)=\frac1{h(t)}\,V f_\theta(V^\top x,t)-\frac1{h(t)}\,x,\qquad V^\top V=I_d"),
    url="https://arxiv.org/abs/2302.07194",
)


class SubspaceScoreNet(nn.Module):
    """network(x_t, t) -> score, (V f(V'x_t, t) - x_t) / sigma(t)^2, eq. 7: exact across the plane, learned in it.

    Train it as `Denoiser(net, process, "score")`, which then predicts x_0 = V f / alpha, always in the plane.

    Args:
        inner: f, called with coordinates (*replicas, B, d) and t, to the same shape; it learns alpha times the
            expected coordinates of the clean data.
        basis: (*replicas, D, d) of full rank, where V starts, such as random numbers or principal axes.
        process: of the noise.

    Attributes:
        free: the matrix whose Q is V; a parameter of the shape of `basis`.

    Raises:
        ValueError: a basis that has not more rows than columns.

    >>> from lossary.diffusion._process import plain
    >>> net = SubspaceScoreNet(lambda z, t: 0 * z, torch.eye(3)[:, :1], plain())  # a plane of nothing but the origin
    >>> net(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2.0]))
    tensor([[-0.2500, -0.5000, -1.0000]], grad_fn=<DivBackward0>)
    """

    def __init__(self, inner: Callable[..., Tensor], basis: Float[Tensor, "*replicas D d"], process: Process) -> None:
        super().__init__()
        require.floating("basis", basis, at_least_dims=2)
        if basis.shape[-1] > basis.shape[-2]:
            raise ValueError(f"basis: expected (*replicas, D, d) with d <= D, got {tuple(basis.shape)}")
        self.inner, self.process = inner, process
        self.free = nn.Parameter(basis.detach().clone())

    @property
    def basis(self) -> Float[Tensor, "*replicas D d"]:
        """V, with orthonormal columns."""
        free = self.free if self.free.dtype is torch.float64 else self.free.float()  # no QR in half precision
        return torch.linalg.qr(free).Q.to(self.free.dtype)

    def forward(
        self, x: Float[Tensor, "*replicas batch D"], t: Float[Tensor, "*replicas batch"]
    ) -> Float[Tensor, "*replicas batch D"]:
        """The score at x_t, x, and the time t of each."""
        v = self.basis
        return (self.inner(x @ v, t) @ v.mT - x) / over(self.process.sigma(t), x).square()


def subspace_distance(found: Float[Tensor, "*batch D d"], true: Float[Tensor, "*batch D d"]) -> Float[Tensor, "*batch"]:
    """|V V' - A A'|_F^2 of the planes that two bases span, theorem 3: 0 for one plane, 2 d for perpendicular ones.

    Args:
        found, true: of full rank; columns need not be orthonormal.

    Raises:
        ValueError: shapes or dtypes that differ.

    >>> subspace_distance(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [3.0]]))  # 2 sin^2 of 45 degrees
    tensor(1.)
    """
    require.floating("found", found, at_least_dims=2)
    require.same_shape("true", true, tuple(found.shape))
    first, second = torch.linalg.qr(found).Q, torch.linalg.qr(true).Q
    across = first - second @ (second.mT @ first)  # keeps the digits of a small distance
    return 2 * across.square().sum((-2, -1))
