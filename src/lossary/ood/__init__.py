"""Out of distribution: detectors of inputs that the training data were not like.

Features come from a network in one pass: `FeatureTap(model, layers)` collects chosen layers and the logits, and every
detector works on what it gives, arrays or tensors. The engines beneath: `_gaussian` (class means, the covariance that
classes share, whitening), `_subspace` (principal axes of the covariance between classes or of all), `_baselines`
(largest softmax and logit, energy, nearest neighbours, ViM). `moments` of features are taken once, batch by batch if
you like, for `merge` adds them up exactly, and `MahalanobisDetector`, `WDiscOOD` and `NECO` learn from the same ones by
`fit_moments`. Higher scores mean more unusual; a threshold is yours to set, on data of your own.

| Your trouble | Try first | Then |
|---|---|---|
| inputs of another kind, noise, corruption | `MahalanobisDetector` on several layers | `WDiscOOD` |
| new classes that resemble the old ones | nearest neighbours or `MahalanobisDetector` | `NECO`, after long training |
| nothing but features of one kind | `MahalanobisDetector` with one class | `MeanShiftOutlierScorer`, `HypOC` |
| you train the embedding yourself | cross-entropy, and a detector on it | `PALMLoss` where a class has several kinds |
| strange pixels, not images | `maxquery_score` on a mask transformer | `query_distribution_loss` |
| the world shifts while the detector runs | a few labelled samples of each domain | `MetaOODLearner` |
| what will the network answer far away? | `extrapolation_table`: drift to the best constant | `ocs_abstention_policy` |
| several labels a picture, and strange pictures | `FathomNetScore` | |

What we found, on small tasks: simple distances are hard to beat. Mahalanobis and nearest neighbours were as good as, or
better than, the later scores tried against them (NECO and ConjNorm by tenths of a point to points, WDiscOOD on a
language model's features); trained embeddings (PALM, Hyp-OC) did not pay on digits; an autoencoder's mean-shift score
fell behind the distance to neighbours. What held: detection grows as a network collapses, networks drift to the best
constant far away, and its drift makes choices by predicted reward cautious.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(
    __name__,
    {
        "FeatureTap": "lossary.ood._features",
        **dict.fromkeys(("Moments", "merge", "moments"), "lossary.ood._gaussian"),
    },
)
