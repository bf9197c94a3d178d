"""Adaptive guidance: leave out the unconditional evaluation once it says the same as the conditional one.

Classifier-free guidance costs two network evaluations at each step. Late in sampling both predictions point the same
way and the second is wasted: `AdaptiveGuidance` watches their cosine and, once it passes a threshold, goes on with the
conditional prediction alone. `LinearAG` also saves early ones, by estimating the unconditional prediction as a linear
combination of all predictions so far, fitted on a few recorded runs. No training; negative prompts keep working. For
whoever pays for guidance twice; gains grow with the number of steps after the condition has settled.
"""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lossary import require
from lossary.diffusion._guidance import classifier_free
from lossary.diffusion._process import over
from lossary.paper import Paper
from lossary.roles import guidance

PAPER = Paper(
    title="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
    year=2023,
    helps=("guidance", "slow-sampling"),
    departs=(
        "similarity and regression are of predictions of x_0, which is what guidances see here; predictions of noise,"
        " the paper's, serve by calling the guidance on them, but agree trivially at the highest noise levels",
        "the regression leaves out directions in which predictions hardly differ; rtol 0 is the paper's, a plain one",
        "no search for policies (the paper's neural architecture search); its outcome is what is built here",
    ),
    equation=(
        r"\hat x_t=\begin{cases}u_t+w\,(c_t-u_t)&\text{until }\cos(c_t,u_t)\ge\bar\gamma\\c_t&\text{ever after}"
        r"\end{cases}\qquad u_t\approx\sum_{s\le t}\beta^c_s c_s+\sum_{s<t}\beta^u_s u_s"
    ),
    url="https://arxiv.org/abs/2312.12487",
)


def guidance_similarity(
    cond: Float[Tensor, "*batch_and_data"], uncond: Float[Tensor, "*batch_and_data"], *, data_dims: int | None = None
) -> Float[Tensor, "*batch"]:
    """The cosine between two predictions of each sample, -1 to 1; 1 where both are zero, 0 where one is.

    Computed in double precision, returned in the dtype of `cond`.

    Args:
        cond, uncond: of one shape.
        data_dims: how many trailing dimensions make one sample; None is all but the first.

    Raises:
        ValueError: shapes that differ, or data_dims beyond them.

    >>> guidance_similarity(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[6.0, 8.0], [1.0, -1.0]]))
    tensor([1., 0.])
    """
    return _cosine(cond, uncond, data_dims).to(cond.dtype)


@guidance(examples=({"scale": 3.0}, {"scale": 3.0, "threshold": 0.5}))
@dataclass(frozen=True)
class AdaptiveGuidance:
    """g(cond, uncond, state): classifier-free, and conditional only after predictions have become similar.

    Similarities are computed and compared in double precision, whatever the network's. The step at which they pass is
    still guided; its evaluation is paid for. Each sample switches by itself, for good; the network is spared once the
    last of the batch has. The state is which have, (*batch) bool.

    Args:
        scale: w of classifier-free guidance.
        threshold: of the similarity, -1 to 1; the paper's is for predictions of noise by Stable Diffusion.
        data_dims: how many trailing dimensions make one sample; None is all but the first.

    Raises:
        ValueError: a threshold out of range, or no unconditional prediction where it is still needed.

    >>> guidance, cond = AdaptiveGuidance(3.0), torch.tensor([[1.0, 0.0]])
    >>> guided, state = guidance(cond, torch.tensor([[1.0, 0.01]]), None)
    >>> guided, state, guidance.needs(state)
    (tensor([[ 1.0000, -0.0200]]), tensor([True]), False)
    >>> guidance(cond, None, state)[0]
    tensor([[1., 0.]])
    """

    scale: float
    _: KW_ONLY
    threshold: float = 0.991
    data_dims: int | None = None

    def __post_init__(self) -> None:
        require.number("scale", self.scale)
        if isinstance(self.threshold, Tensor):
            raise ValueError("threshold: expected a number, got a tensor, which would get no gradient")
        require.number("threshold", self.threshold, at_least=-1.0, at_most=1.0)

    def needs(self, state: Bool[Tensor, "*batch"] | None) -> bool:
        """Whether the unconditional prediction is needed."""
        return state is None or not bool(state.all())

    def __call__(self, cond: Tensor, uncond: Tensor | None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is not None and not self.needs(state):
            return cond, state
        guided, _ = classifier_free(self.scale)(cond, uncond, None)
        similar = _cosine(cond, uncond, self.data_dims) >= self.threshold
        if state is None:
            return guided, similar
        return torch.where(over(state, cond), cond, guided), state | similar


@guidance(examples=({"scale": 3.0, "weights": {}}, {"scale": 3.0, "weights": {}, "until": 2}))
@dataclass(frozen=True)
class LinearAG:
    """g(cond, uncond, state): classifier-free, with the unconditional prediction of some steps estimated.

    Steps are calls, counted from 0; the state is the conditional and unconditional predictions so far. From
    `until` on it is conditional only.

    Args:
        scale: w of classifier-free guidance.
        weights: step -> (2 step + 1,), factors of the conditional predictions of steps 0 to this one, then of the
            unconditional ones before it, estimates among them; see `fitted`.
        until: number of guided steps, None for all.

    Raises:
        ValueError: weights of another length, or no unconditional prediction where it is needed.

    >>> guidance = LinearAG(3.0, {1: torch.tensor([0.0, 0.5, 0.5])})
    >>> _, state = guidance(torch.tensor([[1.0]]), torch.tensor([[0.0]]), None)
    >>> guidance.needs(state), guidance(torch.tensor([[2.0]]), None, state)[0]  # u = 2 / 2, 1 + 3 (2 - 1)
    (False, tensor([[4.]]))
    """

    scale: float
    weights: Mapping[int, Float[Tensor, " predictions"]]
    _: KW_ONLY
    until: int | None = None

    def __post_init__(self) -> None:
        require.number("scale", self.scale)
        if self.until is not None:
            require.whole("until", self.until, at_least=1)
        for step, weight in self.weights.items():
            require.floating(f"weights[{step}]", weight, dims=1)
            if step < 1 or len(weight) != 2 * step + 1:
                raise ValueError(f"weights: expected 2 step + 1 for each step from 1 on, got {len(weight)} for {step}")

    @classmethod
    def fitted(
        cls,
        cond: Float[Tensor, "steps samples *data"],
        uncond: Float[Tensor, "steps samples *data"],
        *,
        scale: float,
        replaced: Collection[int],
        until: int | None = None,
        rtol: float = 1e-3,
    ) -> "LinearAG":
        """Least squares over all entries of recorded runs under full classifier-free guidance of that scale.

        Predictions of neighbouring steps are nearly the same, and where estimates are combined again, large weights
        of opposite sign multiply their errors: plain least squares, the paper's, then diverges. Directions whose
        singular value is below `rtol` of the largest are left out.

        Args:
            cond, uncond: predictions at each step.
            scale: w.
            replaced: steps whose unconditional prediction will be estimated, from 1 on.
            until: number of guided steps, None for all.
            rtol: where singular values are cut, relative to the largest, 0 to 1; 0 is plain least squares.

        Raises:
            ValueError: shapes that differ, a step that was not recorded, or numbers out of range.
        """
        require.floating("cond", cond, at_least_dims=3)
        require.same_shape("uncond", uncond, tuple(cond.shape))
        require.number("rtol", rtol, at_least=0.0, below=1.0)
        c, u = (p.double().flatten(1) for p in (cond, uncond))
        weights: dict[int, Float64[Tensor, " predictions"]] = {}
        for step in replaced:
            require.whole("replaced", step, at_least=1, at_most=len(c) - 1)
            past = torch.cat([c[: step + 1], u[:step]]).T
            weights[step] = torch.linalg.pinv(past, rtol=rtol) @ u[step]
        return cls(scale, weights, until=until)

    def needs(self, state: Any) -> bool:
        """Whether the unconditional prediction is needed."""
        step = 0 if state is None else len(state[0])
        return step not in self.weights and (self.until is None or step < self.until)

    def __call__(self, cond: Tensor, uncond: Tensor | None, state: Any = None) -> tuple[Tensor, Any]:
        require.floating("cond", cond)
        earlier_cond, earlier_uncond = ((), ()) if state is None else state
        step = len(earlier_cond)
        if self.until is not None and step >= self.until:
            return cond, state
        if step in self.weights:
            past = (*earlier_cond, cond, *earlier_uncond)
            uncond = sum(w * p for w, p in zip(self.weights[step].tolist(), past))  # type: ignore[assignment]
        guided, _ = classifier_free(self.scale)(cond, uncond, None)
        return guided, ((*earlier_cond, cond), (*earlier_uncond, uncond))


def _cosine(cond: Tensor, uncond: Tensor, data_dims: int | None) -> Float64[Tensor, "*batch"]:
    require.floating("cond", cond, at_least_dims=1)
    require.same_shape("uncond", uncond, tuple(cond.shape))
    dims = cond.ndim - 1 if data_dims is None else data_dims
    require.whole("data_dims", dims, at_least=1, at_most=cond.ndim)
    a, b = (p.double().flatten(cond.ndim - dims) for p in (cond, uncond))
    units = []
    for p in (a, b):
        length = p.norm(dim=-1, keepdim=True)
        units.append(p / torch.where(length > 0, length, 1.0))
    found = (units[0] * units[1]).sum(-1).clamp(-1, 1)
    return torch.where((a == b).all(-1), 1.0, found)
