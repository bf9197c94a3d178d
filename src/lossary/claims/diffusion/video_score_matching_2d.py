"""Frame scores for video distillation: what do they add to a discriminator, and what does it add to them?

Videos are eight points in the plane: one of four places, turned by 12 degrees from frame to frame, one way or the
other, each frame with noise of its own. So single frames, and whole videos, are Gaussian mixtures. The image teacher
is exact; the video teacher, from which generator and discriminator start, was trained for too short a time.

A step with both losses takes more evaluations than one with a single loss. The claims were registered anew, after
results had been seen: their baselines now have as many more steps as make up for it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import TeacherEncoder, VideoDistributionMatching
from lossary.diffusion._distil import log_uniform, noise
from lossary.diffusion._mixture import Mixture
from lossary.tasks import (
    Tally,
    distil,
    drawn_from,
    fit_denoiser,
    sliced_wasserstein,
    stacked_denoiser,
    stacked_mlp,
)

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
    fit_denoiser(video, drawn_from(VIDEOS), seeds=seeds, steps=seeds.few(300, smoke=2), batch=64)
    fit_denoiser(picture, drawn_from(PICTURES), seeds=seeds, steps=seeds.few(300, smoke=2), batch=64)
    return _Video(video), picture


def _distilled(seeds: Seeds, *, lr: float, kind: str, length: int = 100) -> tuple[VideoDistributionMatching, Tally]:
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
    tally = Tally(procedure)

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        latent = noise((len(seeds), 64, FRAMES, 2), generators)
        return {"latent": latent, "real": drawn_from(VIDEOS)(64, generators)[0].view_as(latent)}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(length, smoke=2), lr=lr)
    return procedure, tally


def _samples(seeds: Seeds, **setting: object) -> tuple[Tensor, float, int]:
    """(S, n, 8, 2), the evaluations that each takes, and those of training."""
    procedure, tally = _distilled(seeds, **setting)
    training, n = tally.taken(), seeds.few(1000, smoke=16)
    found = procedure(noise((len(seeds), n, FRAMES, 2), seeds.torch("latent")), generator=seeds.torch("renoise"))
    return found, tally.taken() / n, training


def _frame_distance(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
    found, *costs = _samples(seeds, **setting)
    found = found[:, :, ::3].flatten(1, 2)  # three frames of each
    return sliced_wasserstein(found, *drawn_from(PICTURES)(found.shape[1], seeds.torch("true"))).tolist(), *costs


def _motion_distance(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
    """Of the differences between neighbouring frames, all seven together."""
    found, *costs = _samples(seeds, **setting)
    true = drawn_from(VIDEOS)(found.shape[1], seeds.torch("true"))[0].view_as(found)
    return sliced_wasserstein(*(x.diff(dim=2).flatten(2) for x in (found, true))).tolist(), *costs


def _compare(measure: Callable[..., tuple[list[float], float, int]], *arms: dict, seeds: Seeds) -> Arms:
    """measure(seeds, **setting) -> distances, the evaluations for a sample, and those of training."""

    def score(seeds: Seeds, **setting: object) -> list[float]:
        return measure(seeds, **setting)[0]

    grids = [[{**arm, "lr": lr} for lr in (0.001, 0.003)] for arm in arms]
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in grids)
    values, evaluations, training = zip(*(measure(seeds, **setting) for setting in (ours, theirs)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": ours, "baseline": theirs})


@claim(
    says="With as many evaluations, frame scores beside the discriminator give frames nearer the truth than the"
    " discriminator alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frames; videos of 8 points, exact image teacher, 4 evaluations, MLP of 64, 100 steps of 64"
    " against 194; 2 rates each",
)
def frame_scores_help_frames(seeds: Seeds) -> Arms:
    return _compare(_frame_distance, {"kind": "frames"}, {"kind": "gan", "length": 194}, seeds=seeds)


@claim(
    says="With as many evaluations, scores of an image model at frames give better frames than scores of the video"
    " teacher at videos",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frames, both with a discriminator; teachers fitted in 300 steps; videos of 8 points, 4"
    " evaluations, MLP of 64, 100 steps of 64 against 114; 2 rates each",
)
def frame_scores_beat_video_scores(seeds: Seeds) -> Arms:
    return _compare(_frame_distance, {"kind": "learned frames"}, {"kind": "videos", "length": 114}, seeds=seeds)


@claim(
    says="The discriminator keeps the motion: nearer the truth than frame scores alone, with as many evaluations",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 of frame differences; videos of 8 points, 4 evaluations, MLP of 64, 100 steps of 64 against 165;"
    " 2 rates each",
)
def the_discriminator_keeps_motion(seeds: Seeds) -> Arms:
    return _compare(_motion_distance, {"kind": "frames"}, {"kind": "scores", "length": 165}, seeds=seeds)


def draw(seeds: Seeds) -> list[Panel]:
    """Thirty videos each, a line from first to last frame."""
    one = seeds.one(0)
    made = {"data": drawn_from(VIDEOS)(30, one.torch("true"))[0].view(1, 30, FRAMES, 2)}
    for name, kind in (("discriminator alone", "gan"), ("frame scores alone", "scores"), ("both", "frames")):
        made[name], *_ = _samples(one, lr=0.001, kind=kind)
    return [
        Panel(name, polygons=[torch.cat([v, v.flip(0)]).numpy() for v in x[0, :30]], points=x[0, :30, 0].numpy())
        for name, x in made.items()
    ]
