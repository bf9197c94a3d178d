"""Uncertainty: predictions that say how far they can be trusted, and keep their word.

The engines: `_conformal` counts the unseen sample at its worst among the calibration samples (risks, intervals, sets;
exact whatever the model and the distribution, given calibration samples that are like those to come); `_quantile` has
pinball and interval scores and mends quantiles that cross; `_calibration` finds one temperature exactly and measures
calibration; `_dirichlet` and `_normal_wishart` hold what evidential networks share, `_scoring` the scoring rules;
`_survival` fits times of which some are only known to be later. A calibrator takes logits: `fit(logits, labels)`,
`predict_proba(logits)`.

| Your trouble | Try first | Then |
|---|---|---|
| is this probability true? | one temperature, as `lossary compare` saves | `TransformAwareTemperature` |
| a person decides with the model's help | `alignment_error` to look | `HumanAlignedCalibrator` |
| when to defer | the largest probability, after a temperature | `CentroidDeferral` |
| which labels, pixels or answers to return | `ConformalRiskControl` on the model's scores | a loss of your own |
| losses at many thresholds are at hand | `conformal_risk_control` | |
| losses of pairs: rankings, distances, differences | `u_statistic_risk_control` | |
| a bound that holds for most samples, not on average | `quantile_risk_control` | |
| calibration inputs differ from those to come | `weighted_conformal_risk_control` | |
| how wide is the interval? | quantile models with `conformalize_quantiles` | `DeepQuantileAggregator` over several |
| a target with several modes | `R2CCPRegressor`, whose sets may have gaps | |
| several targets at once | `SpaceTransformedDQR` | |
| does the network know that it does not know? | an ensemble | `evidential_mse_loss` and its kin, with care |
| noise in the input | `propagate_distribution` through the network | `GaussianSDP` |
| noise that differs from place to place | `beta_nll_loss` | `snr_weighted_mse_loss` |
| times until an event, some censored | `APGWRegressor` | |
| a survival curve of private records | `DPKaplanMeierFitter`, noise on counts | |
| a new prior for every question | `DistributionTransformer` | |
| a model that can only be drawn from | `sequential_cross_entropy_loss` | `black_box_squared_loss` |

What we found, on small tasks: what conformal methods promise holds, at every level tried. One temperature is hard to
beat: correctness-aware calibrators did not beat it under noise, and masks made it worse. Centroid deferral fell behind
the largest probability. Mixing quantiles by input and level paid, as did regression by classification on real data.
Losses that see one outcome cannot make a network tell its ignorance, as the theory says. The private survival curve as
published loses more than ten times the privacy that its epsilon names; noisy counts at the same total are as accurate.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
