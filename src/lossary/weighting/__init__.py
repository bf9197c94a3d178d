"""Weightings and selectors: how much each sample counts, and whether it is seen at all.

A weighting is `w(losses, *, target, group, index)`: it asks by keyword for what it needs and returns one
weight per sample, without gradient, to be multiplied with the losses before their mean is taken. What it
remembers lives in buffers, by group or by the sample's index (`_memory`, alike in all processes of a distributed run).
A selector is a `torch.utils.data.Sampler`; one object may be both. Where networks pick samples for one another, it is
a procedure, driven by `lossary.roles.advance`. Worst-case weights over divergence balls and spectra come from one exact
solver, `_worst_case`; two heaps of losses are told apart by `_two_gaussians`.

| Your trouble | Try first | Then |
|---|---|---|
| wrong labels, nothing known about them | `DynamicLossGate` | `loss_gate_label_correction` |
| wrong labels in text, token by token | `ErrorNormTruncationLoss` | |
| wrong labels, two networks affordable | `CompressedCoTeaching` | |
| wrong labels, one network | `NestedDropout` before the last layer | a robust loss from `lossary.losses` |
| which labels are wrong? | `el2n_score` | `privacy_training_score` with `model_confidence_score` |
| a long tail of classes | `class_balanced_weights` | `DeferredReweighting`, with SAM of `lossary.optim` |
| a long tail, features that do not separate | `NC1Loss` with `nc2_loss` | `classwise_hessian_spectrum` to see why |
| a long tail, several heads affordable | `ride_loss` with `MultiExpertHead` | `ExpertRouter` |
| a long tail, few labels, many inputs | `DASO` | |
| a long tail of labels, many at once | `distribution_balanced_loss` | `AdaptiveLogitAdjustedLoss` |
| a long tail and missing positives | `multi_focal_modifier_loss` | `ReflectiveLabelCorrectorLoss` |
| rare values of a real target | `DistLoss` | |
| an ordered target whose last step is rare | `PrestoOrdinalClassifier` | |
| a known group fares worst | `GroupDRO` with strong weight decay | its `adjustment`, where groups are small |
| the worst group, a fitted last layer, heavy tails | `BalancedSubsample` | `tail_asymmetry_experiment` |
| the worst share of samples counts | `Prospect` with `spectral_risk_weights` | |
| predictions tell the group, in places unknown | `BROADClassifier` | `ROADClassifier` |
| few labels, unlabelled rows from elsewhere | `RobustSelfTrainingLoss` | |
| a real target is distributed differently now | `ReTaSAWeights` | |
| training takes too long | `InfoBatch` | `prune_by_score` of `el2n_score` |
| labels or losses are dear | `ClusterSensitivitySampler` | |
| a network solves an equation with a sharp feature somewhere | `AdversarialAdaptiveSampler` | |
| scores must not hang on group through its proxies | `AntidotePreprocessor` | `AntidoteInprocessor` |
| bounds on a sum or an effect when only marginals are known | `wasserstein_makarov_bounds` | `marginal_model_risk` |
| several tasks share a network | `ImprovableGapBalancing` | |

What we found, on small tasks: `InfoBatch` leaves out a third of the samples, and half of the data by `el2n_score`
serves as well as all of it. Group DRO serves the worst group 10 points better than plain training, 25 where both have
strong weight decay; balanced batches with that decay serve it as well. Wrong labels: the dynamic gate with label
correction gains 2 points; nested dropout cost 11. Long tails: `NC1Loss` with `nc2_loss` gains 3 to 5 points, `DASO` 4
where unlabelled data have the reverse tail; SAM, RIDE's experts and COMIC's heads brought nothing beyond their simpler
parts. Presto and ReTaSA do what they promise. Where rows are unlabelled and shifted, learning from one's own labels is
worth 15 points, robust or not.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
