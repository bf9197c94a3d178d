"""Meta OOD learning: train a classifier so that a few steps on a few new samples keep it, and its doubt, in order.

Once deployed, both what is known and what is strange keep shifting, and of each new state of affairs only a handful of
labelled samples of known classes arrive. In every training episode a copy of the network takes the few steps that it
will take then, on samples under a random shift, and what is minimised is its error afterwards, on further samples and
on auxiliary outliers under the same shift. Use it where shifts in training (rotation, noise, season) resemble those to
come. Without such shifts at hand, or with plenty of labels after each, fine-tuning is simpler. An episode costs a
backward pass through its inner steps.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.func import functional_call

from lossary import require
from lossary.paper import Paper
from lossary.roles import Procedure

PAPER = Paper(
    title="Meta OOD Learning for Continuously Adaptive OOD Detection",
    year=2023,
    helps=("strange-inputs", "train-test-shift", "few-labels"),
    url="https://arxiv.org/abs/2309.11705",
    departs=(
        "only the abstract could be read and no code was found: the setting is the paper's, the algorithm is the"
        " plainest that fits it, model-agnostic meta-learning with outlier exposure in the outer loss",
        "the protocol takes any domains; the paper's benchmarks are not rebuilt",
    ),
    equation=(
        r"\begin{aligned} "
        r"\min_\theta\ &\operatorname{CE}(\text{query};\theta') "
        r"+\lambda\operatorname*{mean}_{\text{outliers}}\Bigl(\log\sum_k e^{z_k}-\frac1K\sum_k z_k\Bigr)(\theta')\\ "
        r"\theta'&=\theta-\alpha\,\nabla_\theta\operatorname{CE}(\text{support};\theta)\quad "
        r"\text{(one step or a few), all under the same shift} "
        r"\end{aligned}"
    ),
)

# Support inputs and labels, query inputs and labels, outliers: all under one shift, for each replica its own.
_Episode = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class MetaOODLearner(Procedure):
    """Trains `model` to classify, and to be unsure of outliers, after a few gradient steps on a few samples.

    Objective of query sample i in an episode: with theta' = theta after `inner_steps` times
    theta <- theta - inner_lr grad mean CE(support),

        CE(query_i; theta') + outlier_weight * mean over outliers of (log sum_k exp z_k - mean_k z_k)(theta'),

    the second term being cross-entropy from the uniform distribution. The gradient goes through the inner steps, or
    with `first_order` only to where they end. Score new inputs by the energy, -logsumexp of the logits, after
    `adapt_to_domain` with the same rate and steps. Drive it with `lossary.roles.advance`.

    Keep batch normalisation in evaluation mode: its running statistics would not follow the inner steps.

    Args:
        model: inputs (*replicas, batch, ...) to logits (*replicas, batch, classes).
        inner_lr: alpha, > 0.
        inner_steps: at least 1.
        outlier_weight: at least 0.
        first_order: ignore how the inner gradient depends on theta, cheaper.

    Raises:
        ValueError: a number out of range, a batch that is no episode.

    >>> from lossary.roles import advance
    >>> learner = MetaOODLearner(nn.Linear(4, 3), inner_lr=0.1)
    >>> optimizers = {"model": torch.optim.SGD(learner.parameters(), lr=0.1)}
    >>> x, y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)
    >>> means = advance(learner, (x, y, x, y, x), optimizers, step=0)
    >>> adapted = adapt_to_domain(learner.model, x, y, lr=0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        outlier_weight: float = 0.5,
        first_order: bool = False,
    ) -> None:
        super().__init__()
        require.number("inner_lr", inner_lr, above=0.0)
        require.whole("inner_steps", inner_steps, at_least=1)
        require.number("outlier_weight", outlier_weight, at_least=0.0)
        self.model, self.inner_lr, self.inner_steps = model, inner_lr, inner_steps
        self.outlier_weight, self.first_order = outlier_weight, first_order

    def players(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    def objective(
        self,
        player: str,
        batch: _Episode,
        *,
        step: int,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Float[Tensor, "*replicas query"]:
        if not isinstance(batch, tuple | list) or len(batch) != 5:
            raise ValueError("batch: expected support inputs and labels, query inputs and labels, and outliers")
        support_x, support_y, query_x, query_y, outliers = batch
        weights: dict[str, Tensor] = {name: w for name, w in self.model.named_parameters() if w.requires_grad}
        for _ in range(self.inner_steps):
            loss = _cross_entropy(functional_call(self.model, weights, support_x), support_y)
            slopes = torch.autograd.grad(
                loss.mean(-1).sum(), list(weights.values()), create_graph=not self.first_order, materialize_grads=True
            )
            weights = {name: w - self.inner_lr * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        strange: Tensor = functional_call(self.model, weights, outliers)
        doubt = (strange.logsumexp(-1) - strange.mean(-1)).mean(-1, keepdim=True)
        return _cross_entropy(functional_call(self.model, weights, query_x), query_y) + self.outlier_weight * doubt

    def forward(self, x: Tensor) -> Tensor:
        """Logits before any adaptation."""
        logits: Tensor = self.model(x)
        return logits


@torch.enable_grad()
def adapt_to_domain(
    model: nn.Module,
    x: Float[Tensor, "..."],
    y: Int[Tensor, "*replicas batch"],
    *,
    lr: float = 0.01,
    steps: int = 1,
) -> nn.Module:
    """A copy of the model after a few full-batch gradient steps on the cross-entropy of a few labelled samples.

    Args:
        model: inputs to logits (*replicas, batch, classes); left as it is.
        x: inputs (*replicas, batch, ...) of the new domain.
        y: their classes.
        lr: rate, > 0.
        steps: at least 1.

    Raises:
        ValueError: a shape, dtype or number that does not fit.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> nn.init.zeros_(model.weight).shape
    torch.Size([2, 2])
    >>> adapt_to_domain(model, torch.tensor([[4.0, 0.0]]), torch.tensor([0]), lr=0.5).weight
    Parameter containing:
    tensor([[ 1.,  0.],
            [-1.,  0.]], requires_grad=True)
    """
    require.number("lr", lr, above=0.0)
    require.whole("steps", steps, at_least=1)
    adapted = copy.deepcopy(model)
    optimizer = torch.optim.SGD([w for w in adapted.parameters() if w.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(_cross_entropy(adapted(x), y).mean(-1).sum())
        optimizer.step()
    return adapted


def caood_benchmark(
    model: nn.Module,
    domains: Iterable[_Episode],
    *,
    adapt: Callable[[nn.Module, Tensor, Tensor], nn.Module] | None = None,
    carry: bool = True,
    score: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Float[Tensor, "domains *replicas"]]:
    """Accuracy and detection while domains arrive one after another, each with a few labelled samples.

    Args:
        model: inputs to logits (*replicas, batch, classes).
        domains: for each support inputs and labels, test inputs and labels, and test outliers.
        adapt: adapt(model, support inputs, labels) gives the model for this domain; None changes nothing.
        carry: adapt the last domain's model, not the first one, as the paper's setting has it.
        score: logits (*replicas, batch, classes) to scores (*replicas, batch), higher is more unusual; None is the
            energy, -logsumexp.

    Returns:
        By domain: "accuracy" of test inputs, "auroc" of outliers against them, and "fpr95", the share of outliers
        that pass where 95% of test inputs do; all 0 to 1.

    Raises:
        ValueError: no domains, or shapes that do not fit.

    >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> found = caood_benchmark(nn.Identity(), [(x, y, x, y, torch.zeros(4, 2))])
    >>> {name: values.item() for name, values in found.items()}
    {'accuracy': 1.0, 'auroc': 1.0, 'fpr95': 0.0}
    """
    rows: dict[str, list[Tensor]] = {"accuracy": [], "auroc": [], "fpr95": []}
    current = model
    for support_x, support_y, x, y, outliers in domains:
        if adapt is not None:
            current = adapt(current if carry else model, support_x, support_y)
        with torch.no_grad():
            logits, strange = current(x), current(outliers)
            require.classes(logits, y)
            usual, odd = (-z.logsumexp(-1) if score is None else score(z) for z in (logits, strange))
        rows["accuracy"].append((logits.argmax(-1) == y).double().mean(-1))
        rows["auroc"].append(_auroc(usual, odd))
        rows["fpr95"].append((odd <= _threshold(usual)).double().mean(-1))
    if not rows["auroc"]:
        raise ValueError("domains: expected at least one, got none")
    return {name: torch.stack(values) for name, values in rows.items()}


def _threshold(usual: Float[Tensor, "*replicas inside"]) -> Float[Tensor, "*replicas 1"]:
    """The smallest score that at least 95% do not exceed."""
    return usual.kthvalue(-(-95 * usual.shape[-1] // 100), dim=-1, keepdim=True).values


def _auroc(usual: Float[Tensor, "*replicas inside"], odd: Float[Tensor, "*replicas outside"]) -> Tensor:
    """How often an outlier scores above an ordinary input, ties counting half."""
    ordered, odd = usual.sort(-1).values, odd.contiguous()
    below, not_above = (torch.searchsorted(ordered, odd, right=right) for right in (False, True))
    return (below + not_above).double().mean(-1) / (2 * usual.shape[-1])


def _cross_entropy(logits: Tensor, y: Tensor) -> Float[Tensor, "*replicas batch"]:
    require.classes(logits, y)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
