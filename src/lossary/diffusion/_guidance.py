"""Guidance: g(cond, uncond, state) -> (guided, state), on predictions of x_0; a state of None starts anew.

What a guidance remembers from step to step is its state, so the guidance itself is a function and can serve many
runs. One that can do without the unconditional prediction in some state says so by `needs(state) -> bool`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise

Guidance = Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Any]]


def classifier_free(scale: float) -> Guidance:
    """uncond + scale (cond - uncond): 0 ignores the condition, 1 is plain conditional sampling."""

    def guide(cond: Tensor, uncond: Tensor | None, state: Any = None) -> tuple[Tensor, Any]:
        require.floating("cond", cond)
        require.same_shape("uncond", uncond, tuple(cond.shape))
        return uncond + scale * (cond - uncond), state

    return guide


class Guided:
    """denoise(x, sigma) under a guidance. The state starts anew with each sample.

    That is when the noise level rises, or is again the one at which the state last started. With samplers that raise
    the level on their way (churn, restarts, resampling) it therefore starts anew at each rise, too.

    Args:
        guidance: see above.
        conditional, unconditional: denoisers.
    """

    def __init__(self, guidance: Guidance, conditional: Denoise, unconditional: Denoise) -> None:
        self.guidance, self.conditional, self.unconditional = guidance, conditional, unconditional
        self.state: Any = None
        self.first = self.level = float("-inf")

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = float(sigma if isinstance(sigma, int | float) else sigma.max())
        if level > self.level or level == self.first:
            self.state = None
            self.first = level
        self.level = level
        needs = getattr(self.guidance, "needs", None)
        uncond = self.unconditional(x, sigma) if needs is None or needs(self.state) else None
        guided, self.state = self.guidance(self.conditional(x, sigma), uncond, self.state)
        return guided
