"""Class-balanced weights by effective numbers, and characters embedded by their looks.

A class with n rows is weighed by the inverse of its effective number (1 - beta^n) / (1 - beta), the expected number
of distinct ones among n draws from 1 / (1 - beta) prototypes: further rows of a frequent class count less and less.
beta 0 weighs all classes alike, beta 1 by inverse frequency, and 0.9 to 0.9999 in between. Use it on long tails where
the rare classes matter as much as the frequent ones (macro F1); it trades away accuracy on the frequent ones. Where
all classes have more than about 3 / (1 - beta) rows the weights are equal and nothing changes.

AraDIC trains with it a classifier of Arabic text that reads characters from their pictures through a small
convolutional network, so that letters which share strokes, and forms of a letter never met in training, get similar
embeddings. Use that for scripts with many or contextual characters and little text; with plenty of text for every
character an ordinary embedding does as well.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer, loss, weighting

PAPER = Paper(
    title="AraDIC: Arabic Document Classification using Image-Based Character Embeddings and Class-Balanced Loss",
    year=2020,
    helps=("class-imbalance",),
    departs=(
        "the loss is per sample; the official code's 'sigmoid' form, which fails on a misspelt argument, is the mean"
        " over classes that it must have meant",
        "official code clamps logarithms at -100 in the form softmax_bce; here they are exact",
        "a class without rows weighs 0 instead of infinity",
        "the document classifiers over the embeddings (GRU, CLCNN) are not included; transpose them properly, as the"
        " official code confuses characters with features by a view",
    ),
    equation=(
        r"\ell=-w_y\log p_y,\qquad "
        r"w_c=C\,\frac{1-\beta}{1-\beta^{n_c}}\Big/\sum_{j=1}^{C}\frac{1-\beta}{1-\beta^{n_j}}"
    ),
    url="http://arxiv.org/abs/2006.11586",
)


@weighting(
    examples=({"beta": 0.99}, {"beta": 0.0}, {"beta": 1.0}),
    tune={"beta": (0.9, 0.99, 0.999, 0.9999)},
)
def class_balanced_weights(
    losses: Float[Tensor, "*batch"],
    *,
    target: Int[Tensor, "*batch"],
    class_counts: Sequence[int] | Tensor,
    beta: float = 0.99,
) -> Float[Tensor, "*batch"]:
    """Weights w_y with w_c proportional to (1 - beta) / (1 - beta^n_c), averaging 1 over the classes with rows.

    A sample's weight depends on its label alone and not on its batch: the mean of weighted losses over the batches
    of several processes is what one process computes with all their samples. (`torch.nn.functional.cross_entropy`
    with `weight=` divides by the weights in the batch instead, so there it is not.)

    Args:
        losses: only their shape, dtype and device are looked at.
        target: class numbers, 0 to classes - 1.
        class_counts: n_c >= 0, training rows of each class, (classes,). A class without rows weighs 0. A tensor on
            the losses' device saves a copy at each call.
        beta: 0 to 1; 0 weighs all classes alike, 1 is the limit of weights 1 / n_c. 0.99 in AraDIC.

    Raises:
        ValueError: shapes or dtypes that do not fit, numbers in class_counts below 0 or all 0 (a
            tensor is not looked at), beta out of range or a tensor.

    >>> class_balanced_weights(torch.ones(3), target=torch.tensor([0, 1, 1]), class_counts=(30, 10), beta=1.0)
    tensor([0.5000, 1.5000, 1.5000])
    """
    require.floating("losses", losses, at_least_dims=1)
    require.integers("target", target, shape=losses.shape)
    return _by_class(class_counts, beta, losses)[target]


@loss(
    on="classes",
    examples=(
        {"beta": 0.99},
        {"form": "softmax_bce", "beta": 0.9},
        {"form": "sigmoid"},
        {"form": "focal", "gamma": 1.5},
    ),
    tune={"form": ("softmax", "softmax_bce", "focal"), "beta": (0.99, 0.999)},
    limits={"cross_entropy": {"beta": 0.0, "form": "softmax"}},
)
def class_balanced_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    class_counts: Sequence[int] | Tensor,
    beta: float = 0.99,
    form: str = "softmax",
    gamma: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """A loss times the class-balanced weight of the sample's class, as in `class_balanced_weights`. In nats.

    With p = softmax(input), q = sigmoid(input) and sums over classes c, the forms are

    - "softmax": -log p_y, the formula of the papers
    - "softmax_bce": -(log p_y + sum_{c != y} log(1 - p_c)) / classes, what the code of AraDIC trains with
    - "sigmoid": -(log q_y + sum_{c != y} log(1 - q_c)) / classes
    - "focal": -(1 - q_y)^gamma log q_y - sum_{c != y} q_c^gamma log(1 - q_c)

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        class_counts: training rows of each class, (classes,); samples of a class without rows count nothing.
        beta: 0 to 1, as in `class_balanced_weights`.
        form: one of these four.
        gamma: focusing exponent of "focal", >= 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range or a tensor.

    >>> class_balanced_loss(torch.zeros(2, 2), torch.tensor([0, 1]), class_counts=(30, 10), beta=1.0)  # log 2 / 2 ...
    tensor([0.3466, 1.0397])
    """
    require.classes(input, target)
    require.one_of("form", form, _FORMS)
    _require_number("gamma", gamma, at_least=0.0)
    weights = _by_class(class_counts, beta, input)
    if weights.shape != input.shape[-1:]:
        raise ValueError(f"class_counts: expected {input.shape[-1]} counts, one for each class, got {len(weights)}")
    return weights[target] * _FORMS[form](input, target, gamma)


@layer(shape=(5, 20, 20), examples=({"size": 20, "features": 12, "channels": 4},))
class GlyphCharacterEncoder(nn.Module):
    """Embed characters by their pictures: three 3x3 convolutions, two max-poolings, two dense layers, all with ReLU.

    Characters are drawn white on black, values 0 to 1. Where the alphabet is small next to the text, encode each
    character once and look it up; `encoder(alphabet)[text]` is the same as `encoder(alphabet[text])`, only cheaper,
    and takes the place of `torch.nn.Embedding`.

    Args:
        size: height and width of a picture in pixels, at least 18.
        features: width of the embedding.
        channels: of the convolutions.

    Raises:
        ValueError: a size below 18; pictures of another size or dtype.

    >>> encoder = GlyphCharacterEncoder(size=20, features=16)
    >>> alphabet, text = torch.rand(40, 20, 20), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    >>> encoder(alphabet)[text].shape
    torch.Size([2, 4, 16])
    """

    def __init__(self, *, size: int = 36, features: int = 128, channels: int = 8) -> None:
        super().__init__()
        require.whole("size", size, at_least=18)
        require.whole("features", features, at_least=1)
        require.whole("channels", channels, at_least=1)
        self.size = size
        side = ((size - 2) // 2 - 2) // 2 - 2
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(channels, channels, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(channels, channels, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(channels * side**2, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU()),
        )

    def forward(self, images: Float[Tensor, "*text size size"]) -> Float[Tensor, "*text features"]:
        """Embed every picture."""
        require.floating("images", images, at_least_dims=2)
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(f"images: expected pictures of {self.size} x {self.size}, got shape {tuple(images.shape)}")
        lead = images.shape[:-2]
        features: Tensor = self.layers(images.reshape(-1, 1, self.size, self.size))
        return features.view(*lead, -1)


def _by_class(class_counts: Sequence[int] | Tensor, beta: float, like: Tensor) -> Float[Tensor, " classes"]:
    """The weight of every class, in the dtype and on the device of `like`."""
    _require_number("beta", beta, at_least=0.0, at_most=1.0)
    if not isinstance(class_counts, Tensor):
        for count in class_counts:
            require.number("class_counts", count, at_least=0)
        if not any(class_counts):
            raise ValueError(f"class_counts: expected a class with rows, got {tuple(class_counts)}")
    n = torch.as_tensor(class_counts, dtype=torch.float64)
    effective = n**beta if beta in (0, 1) else torch.expm1(n * math.log(beta)) / (beta - 1)
    weights = torch.where(n > 0, 1 / effective, 0)
    return (weights * ((n > 0).sum() / weights.sum())).to(like)


def _softmax(input: Tensor, target: Tensor, gamma: float) -> Tensor:
    return F.cross_entropy(input.reshape(-1, input.shape[-1]), target.reshape(-1), reduction="none").view(target.shape)


def _softmax_bce(input: Tensor, target: Tensor, gamma: float) -> Tensor:
    log_p = input.log_softmax(-1)
    at_target, at_top = target.unsqueeze(-1), log_p.argmax(-1, keepdim=True)
    # log(1 - p) is safe where p <= 1/2; for the most likely class it is the others' joint log-probability.
    others = log_p.scatter(-1, at_top, -torch.inf)
    top_miss = others.logsumexp(-1, keepdim=True)
    misses = torch.log1p(-others.exp())
    target_miss = torch.where(at_target == at_top, top_miss, misses.gather(-1, at_target))
    total = (target_miss - log_p.gather(-1, at_target) - top_miss).squeeze(-1) - misses.sum(-1)
    return total / input.shape[-1]


def _sigmoid(input: Tensor, target: Tensor, gamma: float) -> Tensor:
    return F.softplus(_wrong_side_up(input, target)).mean(-1)


def _focal(input: Tensor, target: Tensor, gamma: float) -> Tensor:
    wrong = _wrong_side_up(input, target)
    bce = F.softplus(wrong)
    return ((gamma * (wrong - bce)).exp() * bce).sum(-1)  # wrong - bce = log sigmoid(wrong)


_FORMS = {"softmax": _softmax, "softmax_bce": _softmax_bce, "sigmoid": _sigmoid, "focal": _focal}


def _wrong_side_up(input: Tensor, target: Tensor) -> Tensor:
    """The logits, that of the true class negated, so that each is the log-odds of a mistake."""
    at = target.unsqueeze(-1)
    return input.scatter(-1, at, -input.gather(-1, at))


def _require_number(name: str, value: float, **bounds: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor; no gradient flows to it")
    require.number(name, value, **bounds)
