"""Correctness-aware calibration: teach a calibrator whether the prediction is right, not which class is true.

Cross-entropy raises the probability of the true class even where another class is predicted, and so may raise the
confidence in a wrong prediction. Here confidence itself is held against 1 where the prediction is right and 0 where
it is wrong, and since logits alone hardly tell which it is, the calibrator also sees what the classifier makes of a
few transformed copies of the input: it turns their probabilities for the predicted class and its rivals into a
temperature for each sample. Predictions stay as they are. Try it where the inputs to come are harder than those of
training, so that one temperature cannot fit both; it needs a forward pass for each copy. On inputs like those of
training one temperature is hard to beat.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator, loss
from lossary.uncertainty._calibration import as_labels, as_logits, calibrated, rows_of, temperature
from lossary.uncertainty._network import generator, perceptron, train

PAPER = Paper(
    title="Optimizing Calibration by Gaining Aware of Prediction Correctness",
    year=2024,
    helps=("overconfidence", "train-test-shift"),
    url="https://arxiv.org/abs/2404.13016",
    departs=(
        "training begins at the best single temperature; the official code begins at random, where the clamp may"
        " leave no gradient",
        "Adam's learning rate falls from 0.01 along a cosine; the official 0.0001 hardly leaves the start in as many"
        " steps",
        "samples count alike unless balanced=True; the official code balances right and wrong ones in each batch,"
        " which aims at the confidence that would be true if half of the predictions were right",
        "without transformed copies the original takes their place",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\bigl(p_{\hat y}-[\hat y=y]\bigr)^2,\qquad "
        r"p=\operatorname{softmax}\bigl(z/T(v)\bigr),\qquad\hat y=\argmax_k z_k\\ "
        r"&v:\ \text{what transformed copies of the input give to its likeliest classes} "
        r"\end{aligned}"
    ),
)

_LOWEST, _HIGHEST = 0.1, 10.0  # temperatures, of the official code


@loss(on="classes")
def correctness_aware_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """(c_hat - c)^2, with c_hat the largest probability and c = 1 if its class is the target, else 0. Per sample.

    It trains calibrators, which move confidence and leave the order of the classes alone; to train a classifier it
    is of no use, as it never says which class would have been right.

    Args:
        input: logits, calibrated ones: z / T.
        target: class numbers.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> correctness_aware_loss(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([0]))  # wrong, at e^2 / (e^2 + 2)
    tensor([0.6193])
    """
    require.classes(input, target)
    confidence, predicted = input.softmax(-1).max(-1)
    return (confidence - (predicted == target).to(confidence.dtype)).square()


@estimator(on="logits", examples=({"steps": 50}, {"steps": 50, "top": 2, "balanced": True}))
class TransformAwareTemperature(BaseEstimator):
    """A temperature for each sample from the probabilities that its transformed copies give to its likeliest classes.

    The features v are the probabilities that each copy gives to the `top` classes of the original prediction; a
    network of one hidden layer makes them T = clamp(w . relu(A v + a) + b, 0.1, 10), and probabilities are
    softmax(z / T). Copies are what the classifier says of the input rotated, in grey, blurred, or the like, the same
    transformations in the same order in `fit` and afterwards:

        views = [model(rotate(x)), model(grey(x)), model(jitter(x))]
        TransformAwareTemperature().fit(model(x), y, views).predict_proba(model(new), new_views)

    Args:
        top: how many classes of the original prediction are looked up, at least 1; all, if there are fewer.
        hidden: width of the hidden layer.
        loss: per-sample loss on logits and class numbers, `correctness_aware_loss` or the like.
        balanced: whether right and wrong predictions get the same total weight, as in the official code.
        steps: of Adam.
        learning_rate: of Adam at first.
        batch: samples in a step; all, if there are fewer.
        random_state: of the initial weights and the order of the samples; a whole number or a RandomState.

    Attributes:
        classes_: the class numbers.
        n_views_: how many views there are.
        temperature_: the best single temperature, where training began.
        network_: from features to T, before the clamp.

    Raises:
        ValueError: wrong shapes, NaN, another number of views than in `fit`, a hyper-parameter out of range; asked
            before `fit` (scikit-learn's NotFittedError).

    >>> logits, labels = np.array([[4.0, 0.0, 0.0], [4.0, 3.0, 0.0]] * 20), np.array([0, 0, 0, 1] * 10)
    >>> calibrator = TransformAwareTemperature().fit(logits, labels)
    >>> calibrator.predict_proba([[4.0, 0.0, 0.0], [4.0, 3.0, 0.0]]).max(axis=1).round(1)  # right always, half the time
    array([1. , 0.5])
    """

    def __init__(
        self,
        *,
        top: int = 4,
        hidden: int = 5,
        loss: Callable[[Tensor, Tensor], Tensor] = correctness_aware_loss,
        balanced: bool = False,
        steps: int = 500,
        learning_rate: float = 0.01,
        batch: int = 1000,
        random_state: int = 0,
    ) -> None:
        self.top, self.hidden, self.loss, self.balanced = top, hidden, loss, balanced
        self.steps, self.learning_rate, self.batch, self.random_state = steps, learning_rate, batch, random_state

    def fit(self, logits: Any, labels: Any, views: Any = None) -> Self:
        """Learn from logits (N, C), labels (N,) and the copies' logits (V, N, C), of held-out samples."""
        for name in ("top", "hidden", "steps", "batch"):
            require.whole(name, getattr(self, name), at_least=1)
        require.number("learning_rate", self.learning_rate, above=0.0)
        z = rows_of(self, "logits", logits, reset=True)
        y = as_labels("labels", labels, *z.shape)
        self.classes_, self.n_views_ = np.arange(z.shape[1]), 1 if views is None else len(views)
        features = torch.from_numpy(self._features(z, views))
        self.temperature_ = temperature(z, y)
        g = generator(self.random_state)
        self.network_ = perceptron((features.shape[1], self.hidden, 1), g)
        with torch.no_grad():
            self.network_[-1].weight.zero_()
            self.network_[-1].bias.fill_(min(max(self.temperature_, _LOWEST), _HIGHEST))
        right = (z.argmax(axis=1) == y).astype(np.float64)
        share = np.where(right, right.mean(), 1 - right.mean())
        weights = torch.from_numpy(1 / (2 * share) if self.balanced else np.ones(len(y)))
        inputs, targets = torch.tensor(z), torch.from_numpy(y)  # z may be read-only

        def objective(rows: Tensor) -> Tensor:
            values = self.loss(inputs[rows] / self._clamped(features[rows]).unsqueeze(1), targets[rows])
            return (weights[rows] * values).mean()

        train(
            self.network_.parameters(),
            objective,
            len(y),
            steps=self.steps,
            batch=self.batch,
            lr=self.learning_rate,
            g=g,
        )
        return self

    def temperatures(self, logits: Any, views: Any = None) -> NDArray[np.float64]:
        """T of each sample, (N,), from 0.1 to 10."""
        check_is_fitted(self)
        return self._temperatures(rows_of(self, "logits", logits), views)

    def predict_proba(self, logits: Any, views: Any = None) -> NDArray[np.float64]:
        """Calibrated probabilities (N, C); the order of the classes is that of the logits."""
        check_is_fitted(self)
        z = rows_of(self, "logits", logits)
        return calibrated(z, self._temperatures(z, views))

    def predict(self, logits: Any) -> NDArray[np.intp]:
        """The likeliest class (N,), which is that of the logits."""
        check_is_fitted(self)
        return rows_of(self, "logits", logits).argmax(axis=1)

    def _temperatures(self, z: NDArray[np.float64], views: Any) -> NDArray[np.float64]:
        with torch.no_grad():
            return self._clamped(torch.from_numpy(self._features(z, views))).numpy()

    def _features(self, z: NDArray[np.float64], views: Any) -> NDArray[np.float64]:
        """(N, V top): the probabilities that each view gives to the likeliest classes of the original."""
        copies = [z] if views is None else [as_logits("views", view, z.shape[1]) for view in views]
        if len(copies) != self.n_views_ or any(len(copy) != len(z) for copy in copies):
            raise ValueError(
                f"views: expected {self.n_views_} of {len(z)} rows each, got {[len(copy) for copy in copies]}"
            )
        likeliest = np.argsort(-z, axis=1, kind="stable")[:, : self.top]
        return np.hstack([np.take_along_axis(softmax(copy, axis=1), likeliest, axis=1) for copy in copies])

    def _clamped(self, features: Tensor) -> Tensor:
        return self.network_(features).squeeze(1).clamp(_LOWEST, _HIGHEST)
