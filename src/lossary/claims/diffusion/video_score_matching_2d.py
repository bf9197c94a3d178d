"""Frame scores for video distillation: what do they add to a discriminator, and what does it add to them?

Videos are eight points in the plane: one of four places, turned by 12 degrees from frame to frame, one way or the
other, each frame with noise of its own. So single frames, and whole videos, are Gaussian mixtures. The image teacher
is exact; the video teacher, from which generator and discriminator start, was trained for too short a time.
"""

import copy
import math
from functools import cache

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import TeacherEncoder, VideoDistributionMatching
from lossary.diffusion._distil import log_uniform
from lossary.diffusion._mixture import Mixture
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser, stacked_mlp

FRAMES = 8
STEPS = (10.0, 3.0, 1.0, 0.3)
LEVELS = log_uniform(0.05, 8.0)


def _videos() -> Mixture:
    """In 16 dimensions: four places, two ways round."""
    place = math.pi / 2 * torch.arange(4.0).view(4, 1, 1)
    turn = torch.deg2rad(torch.tensor([12.0, -12.0])).view(1, 2, 1) * torch.arange(FRAMES)
    angle = (place + turn).flatten(0, 1)
    return Mixture(1.4 * torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1), 0.12)


VIDEOS = _videos()
PICTURES = Mixture(VIDEOS.means.view(-1, 2), 0.12)


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    """(S, n, 16)."""
    return (torch.stack([VIDEOS.sample(n, generator=g)[0] for g in generators]),)


def _draw_pictures(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    return (torch.stack([PICTURES.sample(n, generator=g)[0] for g in generators]),)


class _Video(nn.Module):
    """denoise of videos (S, B, 8, 2) by a perceptron on 16 numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        return self.inner(x.flatten(-2), sigma).view_as(x)


class _Head(nn.Module):
    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.mlp = stacked_mlp((128, 32, 1), seeds, activation="silu")

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.mlp(torch.cat(features, dim=-1))


@cache
def _fitted(seeds: Seeds) -> tuple[_Video, nn.Module]:
    """The video teacher, and a denoiser of frames for the fake network to start from; take copies."""
    video, picture = stacked_denoiser(2 * FRAMES, seeds), stacked_denoiser(2, seeds)
    fit_denoiser(video, _draw, seeds=seeds, steps=seeds.few(300, smoke=2), batch=64)
    fit_denoiser(picture, _draw_pictures, seeds=seeds, steps=seeds.few(300, smoke=2), batch=64)
    return _Video(video), picture


def _distilled(seeds: Seeds, *, lr: float, kind: str) -> VideoDistributionMatching:
    """kind: "frames", "learned frames" (from a fitted image teacher) and "videos" have both losses, "gan" and "scores"
    (of frames) only one."""
    video, picture = _fitted(seeds)
    whole = kind == "videos"
    teacher = {"videos": video, "learned frames": picture}.get(kind, PICTURES.denoise)
    procedure = VideoDistributionMatching(
        copy.deepcopy(video),
        copy.deepcopy(video if whole else picture),
        teacher,
        TeacherEncoder(copy.deepcopy(video), ("inner.network.mlp.1", "inner.network.mlp.3")),
        _Head(seeds),
        steps=STEPS,
        frames=None if whole else 2,
        score_weight=0.0 if kind == "gan" else 1.0,
        gan_weight=0.0 if kind == "scores" else 0.1,
        levels=LEVELS,
        gan_levels=LEVELS,
    )
    number, generators = seeds.few(100, smoke=2), seeds.torch("distil")
    players = {name: procedure.players()[name] for name in dict.fromkeys(procedure.turns(0))}
    optimizers = {name: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for name, p in players.items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, number) for o in optimizers.values()]
    for step in range(number):
        latent = torch.stack([torch.randn(64, FRAMES, 2, generator=g) for g in generators])
        batch = {"latent": latent, "real": _draw(64, generators)[0].view_as(latent)}
        advance(procedure, batch, optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()
    return procedure


def _samples(seeds: Seeds, **setting: object) -> Tensor:
    """(S, n, 8, 2) in four evaluations."""
    n = seeds.few(1000, smoke=16)
    latent = torch.stack([torch.randn(n, FRAMES, 2, generator=g) for g in seeds.torch("latent")])
    return _distilled(seeds, **setting)(latent, generator=seeds.torch("renoise"))


def _frame_distance(seeds: Seeds, **setting: object) -> list[float]:
    found = _samples(seeds, **setting)[:, :, ::3].flatten(1, 2)  # three frames of each
    return sliced_wasserstein(found, *_draw_pictures(found.shape[1], seeds.torch("true"))).tolist()


def _motion_distance(seeds: Seeds, **setting: object) -> list[float]:
    """Of the differences between neighbouring frames, all seven together."""
    found = _samples(seeds, **setting)
    true = _draw(found.shape[1], seeds.torch("true"))[0].view_as(found)
    return sliced_wasserstein(*(x.diff(dim=2).flatten(2) for x in (found, true))).tolist()


def _compare(score, method: str, baseline: str, seeds: Seeds) -> Arms:
    grids = [[{"kind": kind, "lr": lr} for lr in (0.001, 0.003)] for kind in (method, baseline)]
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in grids)
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Frame scores beside the discriminator give frames nearer the truth than the discriminator alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frames; videos of 8 points, exact image teacher, 4 evaluations, MLP of 64, 100 steps; 2 rates",
)
def frame_scores_help_frames(seeds: Seeds) -> Arms:
    return _compare(_frame_distance, "frames", "gan", seeds)


@claim(
    says="Scores of an image model at frames give better frames than scores of the video teacher at videos",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frames, both with a discriminator; teachers fitted in 300 steps; videos of 8 points, 4 steps,"
    " MLP of 64, 100 steps; 2 rates",
)
def frame_scores_beat_video_scores(seeds: Seeds) -> Arms:
    return _compare(_frame_distance, "learned frames", "videos", seeds)


@claim(
    says="The discriminator keeps the motion: nearer the truth than frame scores alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frame differences; videos of 8 points, 4 evaluations, MLP of 64, 100 steps of 64; 2 rates each",
)
def the_discriminator_keeps_motion(seeds: Seeds) -> Arms:
    return _compare(_motion_distance, "frames", "scores", seeds)


def draw(seeds: Seeds) -> list[Panel]:
    """Thirty videos each, a line from first to last frame."""
    one = seeds.one(0)
    made = {"data": _draw(30, one.torch("true"))[0].view(1, 30, FRAMES, 2)}
    for name, kind in (("discriminator alone", "gan"), ("frame scores alone", "scores"), ("both", "frames")):
        made[name] = _samples(one, lr=0.001, kind=kind)
    return [
        Panel(name, polygons=[torch.cat([v, v.flip(0)]).numpy() for v in x[0, :30]], points=x[0, :30, 0].numpy())
        for name, x in made.items()
    ]
