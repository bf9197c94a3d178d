"""ACR loss: regress landmarks with a loss that turns from squared to absolute where a shape model errs most.

A shape model (PCA of the training landmarks) redraws each annotated face with its main modes only. How far a landmark
is from its place in that smooth face says how unusual, hence how hard, it is; the hardest coordinate of a face gets
difficulty 1. The pull of a small error grows with the difficulty: where it is 0 the loss is quadratic near zero, where
it is 1 it has the kink of the absolute error. Use it to regress coordinates directly (faces, hands, contours with
fixed points) where squared error leaves the moving parts blurred. It needs corresponding points on every object and
enough of them for a PCA. Where no landmark is harder than the others it is one robust loss among many.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="ACR Loss: Adaptive Coordinate-based Regression Loss for Face Alignment",
    year=2022,
    helps=("odd-shapes", "heavy-tails"),
    departs=(
        "the constant beyond an error of 1 makes the loss continuous, as the official code's does not; same gradients",
        "the official code leaves the weight Lambda to its caller: the default here is a stand-in",
    ),
    equation=r"\mathcal L = \begin{cases} \Lambda \ln\!\left(1 + |\Delta|^{2 - \Phi}\right) & |\Delta| \le 1 \\"
    r" \Delta^2 + \Lambda \ln 2 - 1 & |\Delta| > 1 \end{cases}, \qquad \Phi = \frac{|G - S|}{\max |G - S|}",
    url="https://arxiv.org/abs/2203.15835",
)


class SmoothFace(nn.Module):
    """Redraws shapes with the main modes of a PCA: S = mean + V b, where b = V^T (G - mean) within 3 deviations.

    The modes kept are the fewest that hold more than a share of the training shapes' variance. The paper raises the
    share in the course of training: 0.8 for 16 epochs, then 0.85 to epoch 30, 0.9 to epoch 70, 0.95 afterwards.

    Args:
        landmarks: the training shapes, each a row of coordinates in any fixed order, at least two rows. Without
            variance every mode is kept, and a shape is redrawn as their mean.

    Raises:
        ValueError: landmarks of another shape or dtype, or fewer than two of them.

    >>> line = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    >>> SmoothFace(line)(torch.tensor([[0.5, 0.2], [9.0, 0.0]]), share=0.9)  # three deviations are 3
    tensor([[0.5000, 0.0000],
            [3.0000, 0.0000]])
    """

    mean: Tensor
    variances: Tensor
    modes: Tensor

    def __init__(self, landmarks: Float[Tensor, "faces coordinates"]) -> None:
        super().__init__()
        require.floating("landmarks", landmarks, dims=2)
        if len(landmarks) < 2 or not landmarks.shape[1]:
            raise ValueError(f"landmarks: expected at least two rows of coordinates, got {tuple(landmarks.shape)}")
        shapes = landmarks.detach().double()
        variances, modes = torch.linalg.eigh(torch.cov(shapes.T).reshape(2 * shapes.shape[1:]))
        self.register_buffer("mean", shapes.mean(0).to(landmarks))
        self.register_buffer("variances", variances.flip(0).clamp_min(0).to(landmarks))
        self.register_buffer("modes", modes.flip(1).to(landmarks))

    def forward(
        self, landmarks: Float[Tensor, "*batch coordinates"], *, share: float = 0.9
    ) -> Float[Tensor, "*batch coordinates"]:
        """The shapes `landmarks` as the modes that hold more than `share` of the variance, 0 to 1, redraw them."""
        _coordinates("landmarks", landmarks, len(self.mean))
        require.number("share", share, above=0.0, at_most=1.0)
        held = self.variances.cumsum(0)
        kept = int((held <= share * held[-1]).sum()) + 1
        modes, reach = self.modes[:, :kept], 3 * self.variances[:kept].sqrt()
        b = (landmarks.detach() - self.mean) @ modes
        return self.mean + b.clamp(-reach, reach) @ modes.T


def landmark_difficulty(
    landmarks: Float[Tensor, "*batch coordinates"], smooth: Float[Tensor, "*batch coordinates"]
) -> Float[Tensor, "*batch coordinates"]:
    """Phi = |G - S| / max |G - S|, the maximum over the coordinates of a shape: 0 to 1, without gradient.

    Where a shape equals its smooth one no landmark is hard, and Phi is 0.

    Args:
        landmarks: the true shapes G.
        smooth: S, see `SmoothFace`.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> landmark_difficulty(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 2.0, 0.0]))
    tensor([0.0000, 0.2500, 1.0000])
    """
    require.floating("landmarks", landmarks, at_least_dims=1)
    require.same_shape("smooth", smooth, landmarks.shape)
    distance = (landmarks - smooth).detach().abs()
    return distance / distance.amax(-1, keepdim=True).clamp_min(torch.finfo(distance.dtype).tiny)


def acr_loss(
    input: Float[Tensor, "*batch coordinates"],
    target: Float[Tensor, "*batch coordinates"],
    *,
    difficulty: Float[Tensor, "*batch coordinates"],
    weight: float = 10.0,
) -> Float[Tensor, "*batch"]:
    """A hundred times the mean over coordinates of Lambda ln(1 + d^(2 - Phi)), d = |input - target|; one per shape.

    Beyond d = 1 it goes on as d^2 + Lambda ln 2 - 1. The paper divides coordinates by the image's size, so that d
    stays below 1 and Lambda only scales the loss.

    Args:
        input: predicted coordinates.
        target: true ones, in units of the image's size.
        difficulty: Phi, 0 to 1, see `landmark_difficulty`.
        weight: Lambda, > 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a weight out of range.

    >>> ones, phi = torch.ones(1, 2), torch.tensor([[0.0, 1.0]])
    >>> acr_loss(0.5 * ones, 0 * ones, difficulty=phi, weight=1.0)  # 50 (log 1.25 + log 1.5)
    tensor([31.4304])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, input.shape)
    require.same_shape("difficulty", difficulty, input.shape)
    require.number("weight", weight, above=0.0)
    error = (input - target).abs()
    near = weight * error.clamp_max(1).pow(2 - difficulty).log1p()
    return 100 * (near + (error * error - 1).relu()).mean(-1)


def _coordinates(name: str, landmarks: Tensor, width: int) -> None:
    require.floating(name, landmarks, at_least_dims=1)
    if landmarks.shape[-1] != width:
        raise ValueError(f"{name}: expected {width} coordinates in the last dimension, got {tuple(landmarks.shape)}")
