"""f-distill: distribution matching under any f-divergence, by one more factor on the difference of scores.

The gradient of every f-divergence of a generator from its teacher is the difference of their scores, weighted by a
function of their density ratio. Reverse KL, which DMD descends, weights evenly and likes to settle on a few modes;
forward KL weights by the ratio itself, covers, and is noisy; Jensen-Shannon stands between, with bounded weights. The
ratio is read off the discriminator that DMD2 trains anyway. Try Jensen-Shannon where DMD2 drops modes.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels
from lossary.diffusion._process import over
from lossary.diffusion.dmd2 import DMD2
from lossary.paper import Paper

PAPER = Paper(
    title="One-step Diffusion Models with f-Divergence Distribution Matching",
    year=2025,
    helps=("slow-sampling", "rare-modes"),
    departs=(
        "the density ratio is clipped, and the weights are divided by their mean over the batch; the paper also"
        " normalises the ratio within bins of time",
        "built on our DMD2, with what that departs in",
    ),
    equation=(
        r"\nabla_\theta D_f(p\Vert q_\theta)=\mathbb E\Bigl[h(r)\bigl(s_q(x_t)-s_p(x_t)\bigr)"
        r"\frac{\partial x_t}{\partial\theta}\Bigr],\qquad h(r)=f''(r)\,r^2,\qquad r=\frac{p(x_t)}{q(x_t)}"
    ),
    url="https://arxiv.org/abs/2502.15681",
)

Divergence = Literal[
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"
]


def f_divergence(
    log_ratio: Float[Tensor, "*batch"], divergence: Divergence = "jensen_shannon"
) -> Float[Tensor, "*batch"]:
    """f(r), whose mean over samples of q is the divergence of q from p; r = p / q.

    "reverse_kl" -log r; "softened_reverse_kl" (r + 1) log((r + 1) / (2 r)); "jensen_shannon" r log r - (r + 1)
    log((r + 1) / 2); "squared_hellinger" 1 - sqrt(r); "forward_kl" r log r; "jeffreys" (r - 1) log r.

    Args:
        log_ratio: log r at samples of q.
        divergence: see above.

    Raises:
        ValueError: another divergence.

    >>> f_divergence(torch.tensor([0.0, 1.0]), "reverse_kl")
    tensor([-0., -1.])
    """
    require.floating("log_ratio", log_ratio)
    require.one_of("divergence", divergence, get_args(Divergence))
    r = log_ratio.exp()
    middle = F.softplus(log_ratio) - torch.log(torch.full_like(log_ratio, 2.0))  # log((r + 1) / 2)
    return {
        "reverse_kl": lambda: -log_ratio,
        "softened_reverse_kl": lambda: (r + 1) * (middle - log_ratio),
        "jensen_shannon": lambda: r * log_ratio - (r + 1) * middle,
        "squared_hellinger": lambda: 1 - (log_ratio / 2).exp(),
        "forward_kl": lambda: r * log_ratio,
        "jeffreys": lambda: (r - 1) * log_ratio,
    }[divergence]()


def f_divergence_weight(
    log_ratio: Float[Tensor, "*batch"], divergence: Divergence = "jensen_shannon"
) -> Float[Tensor, "*batch"]:
    """h(r) = f''(r) r^2, the factor of the difference of scores.

    | divergence            | h           | seeks modes | varies |
    |-----------------------|-------------|-------------|--------|
    | "reverse_kl"          | 1           | yes         | not    |
    | "softened_reverse_kl" | 1 / (r + 1) | yes         | little |
    | "jensen_shannon"      | r / (r + 1) | somewhat    | little |
    | "squared_hellinger"   | sqrt(r) / 4 | somewhat    | little |
    | "forward_kl"          | r           | no          | much   |
    | "jeffreys"            | r + 1       | no          | much   |

    Args:
        log_ratio: log of teacher's over generator's density: the logit of a discriminator that takes data for 1.
        divergence: see above.

    Raises:
        ValueError: another divergence.

    >>> f_divergence_weight(torch.tensor([0.0, 100.0]))
    tensor([0.5000, 1.0000])
    """
    require.floating("log_ratio", log_ratio)
    require.one_of("divergence", divergence, get_args(Divergence))
    return {
        "reverse_kl": lambda: torch.ones_like(log_ratio),
        "softened_reverse_kl": lambda: (-log_ratio).sigmoid(),
        "jensen_shannon": lambda: log_ratio.sigmoid(),
        "squared_hellinger": lambda: (log_ratio / 2).exp() / 4,
        "forward_kl": lambda: log_ratio.exp(),
        "jeffreys": lambda: log_ratio.exp() + 1,
    }[divergence]()


class FDistillation(DMD2):
    """The procedure with players "fake", with the head, and "generator"; batches as those of DMD2.

    Args:
        generator, fake, teacher: see `DMD2`.
        head, features: the discriminator, which is asked for the density ratio as well.
        divergence: see `f_divergence_weight`.
        clip: the logarithm of the ratio is kept within -clip to clip, > 0 and at most 50, which float32 still holds.
        gan_weight, head_weight, gan_levels, levels, fake_steps: see `DMD2`.

    Raises:
        ValueError: another divergence, a clip out of range, or what `DMD2` raises.

    >>> fake = nn.Sequential(nn.Identity(), nn.Identity())
    >>> f_distill = FDistillation(nn.Identity(), fake, lambda x, sigma: x / 2, nn.Linear(2, 1), "0")
    >>> f_distill.divergence
    'jensen_shannon'
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        head: nn.Module,
        features: str,
        *,
        divergence: Divergence = "jensen_shannon",
        clip: float = 5.0,
        gan_weight: float = 3e-3,
        head_weight: float = 1e-2,
        gan_levels: Levels | None = None,
        levels: Levels | None = None,
        fake_steps: int = 5,
    ) -> None:
        super().__init__(
            generator,
            fake,
            teacher,
            head=head,
            features=features,
            gan_weight=gan_weight,
            head_weight=head_weight,
            gan_levels=gan_levels,
            levels=levels,
            fake_steps=fake_steps,
        )
        require.one_of("divergence", divergence, get_args(Divergence))
        require.number("clip", clip, above=0.0, at_most=50.0)
        self.divergence, self.clip = divergence, clip

    def weights(self, log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """h of the clipped ratios over its mean within the batch, that of a replica."""
        h = f_divergence_weight(log_ratio.clamp(-self.clip, self.clip), self.divergence)
        return h / h.mean(-1, keepdim=True)

    def log_ratio(self, x_t: Tensor, sigma: Tensor, *condition: Tensor) -> Float[Tensor, "*batch"]:
        """log of the teacher's over the generator's density at x_t, by the discriminator."""
        return self.logits_at(x_t, sigma, *condition)

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        """DMD's, weighted for each sample."""
        push = super().push(x, x_t, sigma, real, fake, *condition)
        return over(self.weights(self.log_ratio(x_t, sigma, *condition)), push) * push
