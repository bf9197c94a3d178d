"""APGW survival model: four parameters that cover the usual lifetimes, accelerated and proportional hazards and cure.

Instead of choosing between Weibull, log-logistic, Burr or Gompertz times, fit one family whose shape kappa moves
through them. Instead of choosing a model, let covariates act on one scale, phi (they stretch time: accelerated failure)
or lambda (they multiply the hazard: proportional hazards), and on the power gamma besides, so that hazards may cross or
an effect may fade. A negative kappa leaves a share of people who never have the event. Take it for times with right
censoring, a few hundred events and a moderate number of covariates, when the whole curve counts and not only the
ranking; where effects are far from linear a forest is stronger. One of the two scales is usually enough: near the
Weibull shape they cannot be told apart.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import softplus

from lossary import require
from lossary.paper import Paper
from lossary.uncertainty._survival import Lifetime, SurvivalRegressor

PAPER = Paper(
    title="A Flexible Parametric Modelling Framework for Survival Analysis",
    year=2019,
    helps=("uncertainty",),
    url="https://pure.ul.ie/en/publications/a-flexible-parametric-modelling-framework-for-survival-analysis",
    departs=(
        "kappa is a constant, as the paper recommends; the official code lets it depend on covariates too",
        "Newton steps in a trust region instead of the official code's; no standard errors",
    ),
    equation=(
        r"S(t)=e^{-H(t)},\qquad "
        r"H(t)=\lambda\,\frac{\kappa+1}{\kappa} "
        r"\biggl[\Bigl(1+\frac{(\phi t)^\gamma}{\kappa+1}\Bigr)^{\kappa}-1\biggr]"
    ),
)


class APGW(Lifetime):
    """Adapted power generalised Weibull times, H(t) = lam H0(phi t), a `torch.distributions.Distribution`.

    H0(u) = (kappa + 1) / kappa ((1 + u^gamma / (kappa + 1))^kappa - 1), with the hazard
    lam phi gamma u^(gamma - 1) (1 + u^gamma / (kappa + 1))^(kappa - 1), u = phi t. kappa = 0 is Burr XII, log-logistic
    at lam = 1, 1 Weibull, 2 with gamma = 1 a linear hazard, and with kappa growing H0 goes to exp(u^gamma) - 1,
    Gompertz at gamma = 1. Below 0 the event never comes for a share of `cure_fraction`: samples and quantiles are then
    infinite.

    Args:
        phi: rate at which time runs, above 0, per unit of time; broadcast with the others.
        lam: factor of the hazard, above 0.
        gamma: power, above 0; the hazard starts at infinity below 1, at 0 above.
        kappa: shape, above -1.
        validate_args: whether to check the values of parameters and times, as in torch.

    Raises:
        ValueError: a parameter or time out of range, if validated.

    >>> times = APGW(phi=0.5, lam=1.0, gamma=2.0, kappa=1.0)  # Weibull
    >>> times.survival(torch.tensor(2.0)), times.icdf(torch.tensor(0.5))
    (tensor(0.3679), tensor(1.6651))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "phi": constraints.positive,
        "lam": constraints.positive,
        "gamma": constraints.positive,
        "kappa": constraints.greater_than(-1.0),
    }

    def __init__(
        self,
        phi: float | Tensor = 1.0,
        lam: float | Tensor = 1.0,
        gamma: float | Tensor = 1.0,
        kappa: float | Tensor = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.phi, self.lam, self.gamma, self.kappa = broadcast_all(phi, lam, gamma, kappa)
        super().__init__(self.phi.shape, validate_args=validate_args)

    @property
    def cure_fraction(self) -> Tensor:
        """Share for whom the event never comes: exp(-lam (kappa + 1) / |kappa|) below kappa = 0, 0 from there on."""
        cured = self.kappa < 0
        ratio = (self.kappa + 1) / torch.where(cured, self.kappa, -1.0)
        return torch.where(cured, (self.lam * ratio).exp(), 0.0)

    def log_hazard(self, value: Tensor) -> Tensor:
        """log h(t)."""
        if self._validate_args:
            self._validate_sample(value)
        log_u = self.phi.log() + value.log()
        rest = (self.kappa - 1) * self._log_base(value) + (self.gamma - 1) * log_u
        return self.lam.log() + self.phi.log() + self.gamma.log() + rest

    def cumulative_hazard(self, value: Tensor) -> Tensor:
        """H(t), also at 0, where it is 0."""
        base = self._log_base(value)
        return self.lam * (self.kappa + 1) * base * _expm1_ratio(self.kappa * base)

    def inverse_cumulative_hazard(self, value: Tensor) -> Tensor:
        """The time at which H is `value`; infinity where it never is."""
        scaled = value / (self.lam * (self.kappa + 1))
        reached = self.kappa * scaled > -1
        base = scaled * _log1p_ratio(torch.where(reached, self.kappa * scaled, 0.0))
        log_power = base + torch.log(-torch.expm1(-base)) + (self.kappa + 1).log()  # log of u^gamma
        return torch.where(reached, (log_power / self.gamma).exp() / self.phi, torch.inf)

    def _log_base(self, value: Tensor) -> Tensor:
        """log(1 + u^gamma / (kappa + 1)), without overflow."""
        return softplus(self.gamma * (self.phi.log() + value.log()) - (self.kappa + 1).log(), threshold=40.0)


def apgw_nll(
    input: Float[Tensor, "*batch 4"], time: Float[Tensor, "*batch"], event: Bool[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of right-censored times under an APGW that a network predicts: H(t) - event log h(t).

    Per sample, in nats, never reduced.

    Args:
        input: what the network says, without constraints: log phi, log lam, log gamma, log(kappa + 1) in this order.
            Keep one of the first two at 0 unless there are very many events.
        time: of the event or of the end of observation, above 0.
        event: True where the event came, False where observation ended.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> apgw_nll(torch.zeros(2, 4), torch.tensor([1.0, 1.0]), torch.tensor([True, False]))  # log-logistic, S(1) = 1/2
    tensor([1.3863, 0.6931])
    """
    require.floating("input", input, at_least_dims=1)
    if input.shape[-1] != 4:
        raise ValueError(f"input: expected log phi, log lam, log gamma, log(kappa + 1) last, got {tuple(input.shape)}")
    require.same_shape("time", time, tuple(input.shape[:-1]))
    if not isinstance(event, Tensor) or event.dtype is not torch.bool or event.shape != time.shape:
        given = f"{event.dtype} of shape {tuple(event.shape)}" if isinstance(event, Tensor) else type(event).__name__
        raise ValueError(f"event: expected booleans of shape {tuple(time.shape)}, got {given}")
    return -_apgw(*input.unbind(-1)).log_likelihood(time, event)


class APGWRegressor(SurvivalRegressor):
    """APGW regression by maximum likelihood: log phi or log lam and log gamma linear in the covariates, kappa free.

    `fit(X, time, event)`; in a scikit-learn Pipeline `fit(X, time, <step>__event=event)`. Besides `predict_survival`,
    `predict_quantile` and `predict` (the median), `predict_distribution(X)` is a batch of `APGW`.

    Args:
        scale: which scale depends on covariates: "phi" (accelerated failure; the other is 1), "lam" (proportional
            hazards; phi is 1 per unit of time, so choose a unit near typical times) or "both", whose likelihood tends
            to have ridges and more than one maximum.
        power: whether log gamma depends on covariates too, or is a constant.
        kappa: fixed, above -1, for instance 0 (log-logistic) or 1 (Weibull); None estimates it.

    Attributes:
        intercept_, coef_: by parameter, "phi", "lam", "gamma" (logarithms) and "kappa" (log(kappa + 1)).
        kappa_: estimated or as given.
        log_likelihood_, n_parameters_, aic_: of the fit; AIC = 2 n_parameters_ - 2 log_likelihood_.

    Raises:
        ValueError: wrong shapes, NaN, times that are not above 0, no event at all; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> X, time, event = [[0.0], [0.0], [1.0], [1.0]], [1.0, 3.0, 2.0, 6.0], [1, 1, 1, 1]
    >>> model = APGWRegressor(power=False, kappa=1.0).fit(X, time, event)  # Weibull, times twice as long in group 1
    >>> model.coef_["phi"].round(3), (model.predict([[1.0]]) / model.predict([[0.0]])).round(3)
    (array([-0.693]), array([2.]))
    """

    def __init__(self, *, scale: str = "phi", power: bool = True, kappa: float | None = None) -> None:
        self.scale, self.power, self.kappa = scale, power, kappa

    def fit(self, X: object, time: object, event: object = None) -> "APGWRegressor":
        """Fit rows (N, d) with times (N,) above 0; `event` (N,) is 1 where it came, 0 where observation ended."""
        require.one_of("scale", self.scale, ("phi", "lam", "both"))
        require.one_of("power", self.power, (False, True))
        if self.kappa is not None:
            require.number("kappa", self.kappa, above=-1.0)
        super().fit(X, time, event)
        self.kappa_ = self.kappa if self.kappa is not None else math.expm1(self.intercept_["kappa"])
        self.aic_ = 2 * self.n_parameters_ - 2 * self.log_likelihood_
        return self

    def _start(self, time: NDArray, event: NDArray, features: int) -> dict[str, NDArray]:
        """About exponential times at the observed rate, without covariates."""
        rate, wide = math.log(event.sum() / time.sum()), np.zeros(1 + features)
        scales = ("phi", "lam") if self.scale == "both" else (self.scale,)
        start = {name: np.r_[rate / len(scales), wide[1:]] for name in scales}
        start["gamma"] = wide if self.power else wide[:1]
        return start if self.kappa is not None else {**start, "kappa": np.array([0.4])}  # as the official code

    def _lifetime(self, eta: dict[str, Tensor]) -> APGW:
        zero = torch.zeros((), dtype=torch.float64)
        fixed = {"phi": zero, "lam": zero}
        if self.kappa is not None:
            fixed["kappa"] = zero + math.log1p(self.kappa)
        every = {**fixed, **eta}
        return _apgw(every["phi"], every["lam"], every["gamma"], every["kappa"])


def _apgw(log_phi: Tensor, log_lam: Tensor, log_gamma: Tensor, log_kappa1: Tensor) -> APGW:
    return APGW(log_phi.exp(), log_lam.exp(), log_gamma.exp(), log_kappa1.expm1(), validate_args=False)


def _expm1_ratio(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, 1 at 0, with derivatives."""
    near = x.abs() < 1e-2
    far = torch.where(near, 1.0, x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    return torch.where(near, torch.where(near, series, 0.0), torch.expm1(far) / far)


def _log1p_ratio(x: Tensor) -> Tensor:
    """log(1 + x) / x, 1 at 0."""
    return torch.where(x == 0, 1.0, torch.log1p(x) / torch.where(x == 0, 1.0, x))
