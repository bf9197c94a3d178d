"""Strange inputs: a score for each, higher meaning more unusual.

Most detectors look at a trained network's features and need no outliers. The engine, `_gaussian`, reduces
features to class means and the covariance that all classes share, adds batches and classes exactly, and whitens
once, after which distances to all classes are one matrix product. Every detector has `fit(features, labels)`
and `anomaly_score(x)`, and answers arrays with arrays and tensors with tensors.

| Your trouble | Try first | Then |
|---|---|---|
| inputs from elsewhere, noise, a broken sensor | `MahalanobisDetector` on the last features | several layers |
| adversarial inputs | `MahalanobisDetector` on several layers, with `fit_weights` | `perturbed_features` |
| new classes keep arriving, training again is dear | `MahalanobisClassifier`, `partial_fit` | |
| which detector is better | `tnr_at_tpr` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
