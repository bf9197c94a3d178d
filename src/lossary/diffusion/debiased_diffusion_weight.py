"""Debiased weight: noise predictions count for more where noise is strong, by 1 / sqrt(SNR).

The clean image is read off a noise prediction as (x_t - sigma eps) / alpha, so an error of the noise returns in it
divided by sqrt(SNR). Training that weighs all noise errors alike therefore leaves the estimates of the noisiest steps,
which decide colours and layout, far off. Weighting by 1 / SNR would be training on the clean image itself and starve
the fine detail; 1 / sqrt(SNR) stands half-way. One factor in the loss of any noise predictor, no cost; try it where
samples have wrong overall colour or few steps are taken. Networks that predict x_0 or v are much less affected.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Debias the Training of Diffusion Models",
    year=2023,
    helps=("slow-sampling", "training-cost"),
    departs=(
        "clamping the SNR, which trainers do to spare the last clean steps or a schedule that ends in pure noise, is"
        " the argument `bounds`; paper and official code do not clamp",
        "for v the weight is the one that leaves the objective unchanged, sqrt(SNR) / (1 + SNR); trainers have"
        " 1 / (1 + SNR), which is kind 'clean'",
    ),
    equation=(
        r"\mathcal L=\mathbb E\Bigl[\tfrac1{\sqrt{\mathrm{SNR}(t)}}\,\lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2"
        r"\Bigr],\qquad \mathrm{SNR}(t)=\frac{\bar\alpha_t}{1-\bar\alpha_t}"
    ),
    url="https://arxiv.org/abs/2310.08442",
)

Kind = Literal["constant", "clean", "debiased", "min_snr", "soft_min_snr", "p2"]
Prediction = Literal["noise", "clean", "v"]


def snr_weight(
    snr: Float[Tensor, "*batch"],
    *,
    kind: Kind = "debiased",
    prediction: Prediction = "noise",
    gamma: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "*batch"]:
    """Factor of the squared error at a signal-to-noise ratio, for the common weightings by one interface.

    Each is one objective whatever the network predicts; as a factor of the noise error it is
    "constant" 1; "clean" 1 / SNR, the plain error of x_0; "debiased" 1 / sqrt(SNR), this paper's;
    "min_snr" min(SNR, gamma) / SNR (Hang et al. 2023); "soft_min_snr" gamma / (SNR + gamma) (Crowson et al. 2024);
    "p2" (1 + SNR)^-gamma (Choi et al. 2022). The error of x_0 is 1 / SNR, that of v 1 + 1 / SNR times that of noise.

    Args:
        snr: alpha^2 / sigma^2, above 0; `diffusers.training_utils.compute_snr(scheduler, t)` gives it.
        kind: see above.
        prediction: what the error is of: "noise", "clean" (x_0) or "v".
        gamma: of "min_snr" (5 if None), "soft_min_snr" (1) and "p2" (1), > 0; the others take none.
        bounds: clamp the SNR to these first, lowest and highest; trainers have (0, 1000).

    Raises:
        ValueError: an unknown kind or prediction, or an argument out of range.

    >>> import torch
    >>> snr_weight(torch.tensor([100.0, 1.0, 0.01]))
    tensor([ 0.1000,  1.0000, 10.0000])
    """
    require.floating("snr", snr)
    require.one_of("kind", kind, get_args(Kind))
    require.one_of("prediction", prediction, get_args(Prediction))
    defaults = {"min_snr": 5.0, "soft_min_snr": 1.0, "p2": 1.0}
    if gamma is not None and kind not in defaults:
        raise ValueError(f"gamma: kind {kind!r} takes none, got {gamma!r}")
    gamma = defaults.get(kind, 1.0) if gamma is None else gamma
    require.number("gamma", gamma, above=0.0)
    if bounds is not None:
        low, high = bounds
        if not 0 <= low < high:
            raise ValueError(f"bounds: expected 0 <= lowest < highest, got {bounds}")
        snr = snr.clamp(low, high)
    of_clean = {  # finite where there is no signal left
        "constant": lambda: snr,
        "clean": lambda: snr * 0 + 1,
        "debiased": lambda: snr.sqrt(),
        "min_snr": lambda: snr.clamp(max=gamma),
        "soft_min_snr": lambda: snr * gamma / (snr + gamma),
        "p2": lambda: snr * (1 + snr) ** -gamma,
    }[kind]()
    return of_clean / {"noise": snr, "clean": 1.0, "v": 1 + snr}[prediction]


def debiased_estimation_loss(
    input: Float[Tensor, "*batch_and_data"],
    target: Float[Tensor, "*batch_and_data"],
    *,
    snr: Float[Tensor, "*batch"],
    prediction: Prediction = "noise",
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "*batch"]:
    """1 / sqrt(SNR) times the mean squared error of each sample's noise, or its like for x_0 and v: shaped as `snr`.

    Args:
        input: what the network predicted.
        target: the noise, x_0 or v, of the same shape.
        snr: of the leading dimensions of `input`; see `snr_weight`.
        prediction: "noise", "clean" or "v".
        bounds: see `snr_weight`.

    Raises:
        ValueError: shapes that do not fit, or what `snr_weight` raises.

    >>> import torch
    >>> debiased_estimation_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), snr=torch.tensor([4.0]))  # 5 / 2
    tensor([2.5000])
    """
    require.floating("input", input)
    require.same_shape("target", target, tuple(input.shape))
    require.same_shape("snr", snr, tuple(input.shape[: snr.ndim]))
    error = (input - target).square()
    weighted = over(snr_weight(snr, prediction=prediction, bounds=bounds), error) * error
    return weighted.flatten(snr.ndim).mean(-1) if weighted.ndim > snr.ndim else weighted
