"""Uncertainty: predictions that say how far they can be trusted, and keep their word.

The engine of the conformal parts is `_conformal`: count the unseen sample at its worst among the calibration
samples, then take the first setting whose mean loss meets the level. The promise holds for any model and any
distribution, given calibration samples that are like those to come.

| Your trouble | Try first | Then |
|---|---|---|
| which labels, pixels or answers to return | `ConformalRiskControl` on the model's scores | a loss of your own |
| losses at many thresholds are at hand | `conformal_risk_control` | |
| a bound that holds for most samples, not on average | `quantile_risk_control` | |
| calibration inputs differ from those to come | `weighted_conformal_risk_control` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
