"""Frame scores for video distillation: a video generator of four steps, taught frame by frame by an image model.

A video diffusion is slow, and its score knows less of pictures than an image diffusion does. So the few-step student
gets its lessons from two sides: the score of an image model at single frames, picked at random, for how they look,
and a discriminator on the frozen video teacher's features for how they hang together. Either alone fails: frame
scores know nothing of time, the discriminator little of detail. For sequences of any kind whose elements have a
better model than the whole; needs data for the discriminator.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Frozen, Levels, batch_of, conditions, falling, karras_levels, needed
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.diffusion.dmd import DistributionMatchingDistillation
from lossary.diffusion.dmd2 import backward_simulation, few_step_samples
from lossary.paper import Paper

PAPER = Paper(
    title="Accelerating Video Diffusion Models via Distribution Matching",
    year=2024,
    helps=("slow-sampling",),
    departs=(
        "built from a third party's notes with the equations, as neither the paper's text nor code could be read",
        "equal weights of both losses, DMD's weight of the score difference and the range of noise are stand-ins",
        "frames are picked for each video; features come by hooks, so the rest of the teacher is evaluated in vain",
        "steps are given as noise levels sigma / alpha",
    ),
    equation=(
        r"\nabla_\theta\mathcal L=\mathbb E\Bigl[w(t)\bigl(\epsilon_\phi^{\text{image}}(\tilde x_t^K)"
        r"-\epsilon_\psi(\tilde x_t^K)\bigr)\frac{dG_\theta^K}{d\theta}\Bigr]"
        r"-\nabla_\theta\,\mathbb E\bigl[\log D_\eta(\tilde x_t,t)\bigr],\qquad K\ \text{random frames}"
    ),
    url="https://arxiv.org/abs/2412.05899",
)


def random_frames(
    video: Float[Tensor, "..."], count: int, *, dims: int = 1, generator: Randomness = None
) -> Float[Tensor, "..."]:
    """Different frames of each video, in random order: (*batch, count, ...).

    Args:
        video: (*batch, frames, ...).
        count: how many, at most all.
        dims: number of leading dimensions that are batch.
        generator: of the choice; a sequence has one for each replica.

    Raises:
        ValueError: a count below 1 or above the number of frames.

    >>> clip = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> random_frames(clip, 3, generator=torch.Generator()).sort(1).values.flatten()
    tensor([1., 2., 3.])
    """
    require.floating("video", video, at_least_dims=dims + 1)
    require.whole("count", count, at_least=1, at_most=video.shape[dims])
    order = noise(video.flatten(dims + 1)[..., 0] if video.ndim > dims + 1 else video, generator, kind=torch.rand)
    chosen = order.argsort(-1)[..., :count]
    return video.gather(dims, over(chosen, video).expand(*chosen.shape, *video.shape[dims + 1 :]))


class TeacherEncoder(nn.Module):
    """Features of a frozen network: what some of its modules put out, while gradients pass to the input.

    Args:
        teacher: denoise(x, sigma (, condition)), frozen here.
        names: of modules within it, as in `nn.Module.get_submodule`, from fine to coarse.

    Raises:
        ValueError: a name that is not one of its modules.

    >>> teacher = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> [f.shape for f in TeacherEncoder(teacher, ["0", "1"])(torch.ones(5, 2))]
    [torch.Size([5, 3]), torch.Size([5, 2])]
    """

    def __init__(self, teacher: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        known = dict(teacher.named_modules())
        for name in names:
            if not name or name not in known:
                raise ValueError(f"names: expected modules within the teacher, got {name!r}")
        self.teacher, self.names = teacher.requires_grad_(False), tuple(names)

    def forward(self, *inputs: Any) -> list[Tensor]:
        seen: dict[str, Tensor] = {}
        handles = [
            self.teacher.get_submodule(name).register_forward_hook(
                lambda module, given, output, name=name: seen.update({name: output})
            )
            for name in self.names
        ]
        try:
            self.teacher(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [seen[name] for name in self.names]


class DenoisingGANHead(nn.Module):
    """Features of several scales to one logit a sample, high for data.

    Each scale is brought to `width` channels by a 1x1 convolution and averaged down to the smallest; all together are
    convolved twice, and the logits averaged over places.

    Args:
        channels: of each scale's features.
        width: of the scales behind their first convolution.
        axes: 1, 2 or 3, such as 3 for (B, C, frames, H, W).

    Raises:
        ValueError: no scale, or numbers out of range; features of another number.

    >>> head = DenoisingGANHead((8, 16, 32))
    >>> head([torch.zeros(5, 8, 16, 16), torch.zeros(5, 16, 8, 8), torch.zeros(5, 32, 4, 4)]).shape
    torch.Size([5])
    """

    def __init__(self, channels: Sequence[int], *, width: int = 64, axes: int = 2) -> None:
        super().__init__()
        require.whole("axes", axes, at_least=1, at_most=3)
        require.whole("width", width, at_least=1)
        if not channels:
            raise ValueError("channels: expected at least one scale, got none")
        for count in channels:
            require.whole("channels", count, at_least=1)
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.axes = axes
        self.scales = nn.ModuleList(conv(count, width, 1) for count in channels)
        self.joint = nn.Sequential(conv(width * len(channels), width, 3, padding=1), nn.SiLU(), conv(width, 1, 1))

    def forward(self, features: Sequence[Tensor]) -> Float[Tensor, " B"]:
        if len(features) != len(self.scales):
            raise ValueError(f"features: expected {len(self.scales)} scales, got {len(features)}")
        smallest = min((tuple(f.shape[2:]) for f in features), key=lambda s: torch.Size(s).numel())
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.axes - 1]
        size = smallest[0] if self.axes == 1 else smallest
        scales = [pool(layer(f), size) for layer, f in zip(self.scales, features)]
        return self.joint(torch.cat(scales, dim=1)).flatten(1).mean(1)  # type: ignore[no-any-return]


class VideoDistributionMatching(DistributionMatchingDistillation):
    """The procedure with players "fake", "discriminator" and "generator"; the first two have two turns a step.

    A batch is {"latent": standard normals (B, frames, ...), "real": data (, "condition", "real_condition")}, or with
    replicas in front where there is a generator of random numbers for each.

    Args:
        generator: denoise(x, sigma (, condition)) of videos, such as a copy of the video teacher.
        fake: denoise(x, sigma (, condition)) of frames, trained here; None copies the image teacher.
        teacher: denoise(x, sigma (, condition)) of frames, an image model, frozen.
        encoder: (x_t, sigma (, condition)) of videos -> features, such as `TeacherEncoder`; frozen.
        head: features -> a logit for each video, such as `DenoisingGANHead`.
        steps: noise levels of the generator's steps, falling.
        frames: K, picked from each video for the scores; None compares whole videos, with `teacher` and `fake` of
            videos.
        score_weight, gan_weight: of the generator's two losses, >= 0.
        levels, gan_levels: where scores are compared, and where data and samples are told apart; None is
            `karras_levels(first=0.02, last=0.98)`.
        other_steps: updates of the fake network and of the head before each of the generator.

    Raises:
        ValueError: weights below 0, steps that do not fall, or a batch that lacks data, or their condition where the
            samples have one.

    >>> plain = nn.Identity()
    >>> teacher = lambda x, sigma: x / 2
    >>> VideoDistributionMatching(plain, plain, teacher, plain, plain, steps=(9.0, 1.0), frames=1).turns(0)
    ('fake', 'discriminator', 'fake', 'discriminator', 'generator')
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        encoder: nn.Module,
        head: nn.Module,
        *,
        steps: Sequence[float],
        frames: int | None,
        score_weight: float = 1.0,
        gan_weight: float = 1.0,
        levels: Levels | None = None,
        gan_levels: Levels | None = None,
        other_steps: int = 2,
    ) -> None:
        require.whole("other_steps", other_steps, at_least=0)
        super().__init__(generator, fake, teacher, regression_weight=0.0, levels=levels, fake_steps=other_steps)
        require.number("score_weight", score_weight, at_least=0.0)
        require.number("gan_weight", gan_weight, at_least=0.0)
        if frames is not None:
            require.whole("frames", frames, at_least=1)
        self.encoder, self.head = Frozen(encoder), head
        self.steps, self.frames = falling("steps", steps), frames
        self.score_weight, self.gan_weight = score_weight, gan_weight
        self.gan_levels = gan_levels or karras_levels(first=0.02, last=0.98)

    def players(self) -> Mapping[str, nn.Module]:
        return {"fake": self.fake, "discriminator": self.head, "generator": self.generator}

    def turns(self, step: int) -> Sequence[str]:
        """Both others as often as `other_steps` says, but none whose loss has no weight; then the generator."""
        others = (("fake",) if self.score_weight else ()) + (("discriminator",) if self.gan_weight else ())
        return others * self.fake_steps + ("generator",)

    def forward(self, latent: Tensor, *condition: Tensor, generator: Randomness = None) -> Tensor:
        """Videos from standard normals, one evaluation a step."""
        return few_step_samples(self.generator, latent, self.steps, *condition, random=generator)

    def objective(self, player: str, batch: Any, *, step: int, generator: Randomness = None) -> Tensor:
        latent, condition = needed(batch, "latent"), conditions(batch)
        start, level = backward_simulation(self.generator, latent, self.steps, *condition, random=generator)
        with torch.set_grad_enabled(player == "generator"):
            x = self.generator(start, level, *condition)
        if player == "fake":
            return self._over_frames(self.fake_loss, x, batch, generator)
        if player == "discriminator":
            return self.head_loss(x, batch, generator)
        loss = x.new_zeros(batch_of(x, generator))
        if self.score_weight:
            loss = self.score_weight * self._over_frames(self.generator_loss, x, batch, generator)
        if not self.gan_weight:
            return loss
        sigma = self.gan_levels(batch_of(x, generator), generator).to(x)
        logits = self.logits(x + over(sigma, x) * noise(x, generator), sigma, *condition)
        return loss + self.gan_weight * F.softplus(-logits)

    def logits(self, x_t: Tensor, sigma: Tensor, *condition: Tensor) -> Float[Tensor, "*batch"]:
        """The discriminator's, at noised videos."""
        return self.head(self.encoder(x_t, sigma, *condition)).reshape(sigma.shape)  # type: ignore[no-any-return]

    def head_loss(self, x: Tensor, batch: Any, generator: Randomness) -> Float[Tensor, "*batch"]:
        """Binary cross-entropy of telling data from samples, both at the same noise levels."""
        real, given = needed(batch, "real"), conditions(batch, "real_condition")
        sigma = self.gan_levels(batch_of(x, generator), generator).to(x)
        width = over(sigma, x)
        found = self.logits(x + width * noise(x, generator), sigma, *conditions(batch))
        return F.softplus(found) + F.softplus(-self.logits(real + width * noise(x, generator), sigma, *given))

    def _over_frames(self, loss: Any, x: Tensor, batch: Any, generator: Randomness) -> Float[Tensor, "*batch"]:
        """The mean over K frames of each video of a loss on frames (*replicas, B K, ...)."""
        dims, condition = len(batch_of(x, generator)), conditions(batch)
        if self.frames is not None:
            x = random_frames(x, self.frames, dims=dims, generator=generator).flatten(dims - 1, dims)
            condition = [c.repeat_interleave(self.frames, dim=dims - 1) for c in condition]
        sigma = self.levels(batch_of(x, generator), generator).to(x)
        x_t = x + over(sigma, x) * noise(x, generator)
        values = loss(x, x_t, sigma, {"condition": condition[0]} if condition else {}, generator)
        return values if self.frames is None else values.unflatten(-1, (-1, self.frames)).mean(-1)
