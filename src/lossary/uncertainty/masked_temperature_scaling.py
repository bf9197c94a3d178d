"""Masked temperature scaling: fit the temperature of a network trained on distilled data on logits with holes.

A network trained on a small synthetic set that stands for a large one is overconfident, its largest logits lie close
together, and the paper finds that one temperature then does not calibrate it. Its two answers are masks: of logits
while the temperature is fitted (MTS), and of the images while they are distilled (MDT). Only the abstract could be
read and no code is public, so both are stand-ins: the masks are where the paper puts them, the rest is ours. Masks may
move the temperature either way, and on samples like those held out no temperature has a lower log-loss than the plain
one: try that first, and these where it leaves overconfidence.
"""

from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator
from lossary.uncertainty._calibration import as_labels, calibrated, rows_of, temperature
from lossary.uncertainty._network import generator as seeded

PAPER = Paper(
    title="Rethinking Data Distillation: Do Not Overlook Calibration",
    year=2023,
    helps=("overconfidence",),
    url="https://arxiv.org/abs/2307.12463",
    departs=(
        "a stand-in made from the abstract: what is masked, and when, is the paper's; the kind of mask, its rate and"
        " how it enters are ours",
        "the temperature is the exact minimum over a fixed number of masks, not one reached step by step",
        "MDT is shown on gradient matching alone",
    ),
    equation=(
        r"\hat T=\argmin_T\ \operatorname*{mean}_{i,M}\, "
        r"-\log\operatorname{softmax}\bigl(M\odot(z_i-\bar z_i)/T\bigr)_{y_i},\qquad "
        r"P(M_k=0)=r,\qquad p=\operatorname{softmax}(z/\hat T)"
    ),
)


@estimator(on="logits", examples=({}, {"mask_rate": 0.3, "masks": 4}))
class MaskedTemperatureScaling(BaseEstimator):
    """softmax(z / T) with the T that minimises mean -log softmax(M z / T)_y over random masks M of the logits.

    M has independent zeros with probability `mask_rate`; rows of z have their mean taken off first, so that what is
    masked counts as neither likely nor unlikely. At `mask_rate` 0 it is temperature scaling. Predictions stay as they
    are, and nothing is masked once T is known.

    Args:
        mask_rate: share of the logits that are masked, 0 to below 1.
        masks: how many masks of the whole table.
        random_state: of the masks; a whole number or a RandomState.

    Attributes:
        classes_: the class numbers.
        temperature_: T, from e^-10 to e^10.

    Raises:
        ValueError: wrong shapes, NaN, a hyper-parameter out of range; asked before `fit` (scikit-learn's
            NotFittedError).

    >>> logits, labels = np.array([[4.0, 0.0, 0.0]] * 10), np.array([0] * 8 + [1, 2])
    >>> [round(MaskedTemperatureScaling(mask_rate=r).fit(logits, labels).temperature_, 1) for r in (0.0, 0.1, 0.3)]
    [1.9, 1.7, 1.6]
    """

    def __init__(self, *, mask_rate: float = 0.1, masks: int = 10, random_state: int = 0) -> None:
        self.mask_rate, self.masks, self.random_state = mask_rate, masks, random_state

    def fit(self, logits: Any, labels: Any) -> Self:
        """Find T on logits (N, C) and class numbers (N,) of held-out samples."""
        require.number("mask_rate", self.mask_rate, at_least=0.0, below=1.0)
        require.whole("masks", self.masks, at_least=1)
        z = rows_of(self, "logits", logits, reset=True)
        y = as_labels("labels", labels, *z.shape)
        drawn = torch.rand(self.masks, *z.shape, generator=seeded(self.random_state), dtype=torch.float64).numpy()
        masked = (drawn >= self.mask_rate) * (z - z.mean(axis=1, keepdims=True))
        self.classes_ = np.arange(z.shape[1])
        self.temperature_ = temperature(masked.reshape(-1, z.shape[1]), np.tile(y, self.masks))
        return self

    def predict_proba(self, logits: Any) -> NDArray[np.float64]:
        """Calibrated probabilities (N, C)."""
        check_is_fitted(self)
        return calibrated(rows_of(self, "logits", logits), self.temperature_)

    def predict(self, logits: Any) -> NDArray[np.intp]:
        """The likeliest class (N,), which is that of the logits."""
        check_is_fitted(self)
        return rows_of(self, "logits", logits).argmax(axis=1)


def masked_distillation_step(
    model: nn.Module,
    x: Float[Tensor, "rows *shape"],
    y: Int[Tensor, " rows"],
    real_x: Float[Tensor, "batch *shape"],
    real_y: Int[Tensor, " batch"],
    *,
    mask_rate: float = 0.1,
    generator: Generator,
) -> Float[Tensor, ""]:
    """How far the gradient on synthetic samples, some of their pixels masked, is from that on real ones.

    sum over layers and their outputs of 1 - cos(grad on M x, grad on the real batch), with gradients of the mean
    cross-entropy by the weights into that output; biases are left out. That is the distance of dataset condensation
    by gradient matching (Zhao et al. 2021), at `mask_rate` 0 as it stands there. Its gradient by x is what a step on
    the synthetic samples follows:

        masked_distillation_step(model, x, y, real_x, real_y, generator=generator).backward()
        optimizer_of_x.step()

    Args:
        model: a classifier, such as one that is being trained on the synthetic samples; unchanged.
        x: synthetic samples, requiring grad: (N, d), or (N, channels, ...), whose channels share a mask.
        y: their class numbers.
        real_x, real_y: a batch of real samples and their class numbers, best of the same classes.
        mask_rate: share of the pixels that are set to 0, 0 to below 1.
        generator: draws the mask.

    Raises:
        ValueError: shapes or dtypes that do not fit, `mask_rate` out of range.

    >>> model = nn.Linear(4, 2)
    >>> x, y, g = torch.randn(6, 4), torch.tensor([0, 1] * 3), torch.Generator().manual_seed(0)
    >>> round(abs(masked_distillation_step(model, x, y, x, y, mask_rate=0.0, generator=g).item()), 5)
    0.0
    """
    require.floating("x", x, at_least_dims=2)
    require.floating("real_x", real_x, dims=x.ndim)
    require.integers("y", y, shape=x.shape[:1])
    require.integers("real_y", real_y, shape=real_x.shape[:1])
    require.number("mask_rate", mask_rate, at_least=0.0, below=1.0)
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    pixels = x.shape if x.ndim == 2 else (len(x), 1, *x.shape[2:])
    kept = torch.rand(pixels, generator=generator, device=generator.device) >= mask_rate
    wanted = torch.autograd.grad(F.cross_entropy(model(real_x), real_y), weights)
    given = torch.autograd.grad(F.cross_entropy(model(kept.to(x.device) * x), y), weights, create_graph=True)
    pairs = ((g.flatten(1), w.flatten(1)) for g, w in zip(given, wanted))
    return torch.stack([(1 - F.cosine_similarity(g, w, dim=1)).sum() for g, w in pairs]).sum()
