"""Frame scores: exact Gaussians and formulas by hand; frames that are not picked feel nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.diffusion import (
    DenoisingGANHead,
    TeacherEncoder,
    VideoDistributionMatching,
    distribution_matching_gradient,
    random_frames,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import log_uniform
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._process import tabulated
from lossary.roles.procedure import advance

PICTURES = Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def at(value):
    """Levels that are all the same."""
    return lambda shape, generator: torch.full(shape, value, dtype=torch.float64)


class Affine(nn.Module):
    """mean + scale x, whatever the level; a condition is added to every frame."""

    def __init__(self, mean=0.0, scale=1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x, sigma, *condition):
        shift = sum(c.view(*c.shape, *[1] * (x.ndim - c.ndim)) for c in condition)
        return self.mean + self.scale * x + shift


class Encoder(nn.Module):
    """Sums over frames, where a condition is added, and over differences of frames."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x, sigma, *condition):
        x = x + sum(c[..., None, None] for c in condition)
        return self.weight * torch.stack([x.sum((-2, -1)), x.diff(dim=-2).square().sum((-2, -1)) * sigma], dim=-1)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, features):
        return features @ self.weight


def matching(**named) -> VideoDistributionMatching:
    settings = {"steps": (2.0,), "frames": 2, "levels": at(0.7), "gan_levels": at(1.5), **named}
    fake = settings.pop("fake", Affine(0.3, 0.6))
    return VideoDistributionMatching(Affine(0.2, 0.4), fake, PICTURES.denoise, Encoder(), Head(), **settings)


def test_random_frames_are_different_ones_of_the_same_video():
    video = torch.arange(24.0).view(4, 6, 1).expand(-1, -1, 3)
    found = random_frames(video, 4, generator=rng())
    assert found.shape == (4, 4, 3)
    assert (found[..., 0] == found[..., 2]).all()
    assert all(len(set(row)) == 4 for row in found[..., 0].tolist())
    assert (found // 6 == torch.arange(4.0).view(4, 1, 1)).all()
    counts = torch.bincount(random_frames(torch.arange(5.0).expand(4000, -1), 2, generator=rng(1)).long().flatten())
    assert counts.tolist() == pytest.approx([1600] * 5, abs=130)
    stacked = random_frames(video.unflatten(0, (2, 2)), 4, dims=2, generator=[rng(3), rng(4)])
    torch.testing.assert_close(stacked[1], random_frames(video[2:], 4, generator=rng(4)))


def start(latent, condition, g):
    """What one step at level 2 is fed: the draw of which step takes a number for each video."""
    torch.rand(latent.shape[0], generator=g)
    return 0.2 + 0.4 * (2 * latent) + condition[:, None, None]


@pytest.mark.parametrize("frames", [2, None])
def test_the_generators_objective_by_hand(frames):
    latent, condition = normals(3, 5, 2), normals(3, seed=1)
    pictures = PICTURES if frames else Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64).repeat(1, 5), 0.5)
    denoise = pictures.denoise if frames else lambda x, s: pictures.denoise(x.flatten(1), s).view_as(x)
    made = VideoDistributionMatching(
        Affine(0.2, 0.4),
        Affine(0.3, 0.6),
        lambda x, s, c: denoise(x, s),
        Encoder(),
        Head(),
        steps=(2.0,),
        frames=frames,
        score_weight=0.7,
        gan_weight=0.4,
        levels=at(0.7),
        gan_levels=at(1.5),
    )
    found = made.objective("generator", {"latent": latent, "condition": condition}, step=0, generator=rng(2))
    g = rng(2)
    x = start(latent, condition, g)
    if frames:
        order = torch.rand(3, 5, generator=g, dtype=torch.float64).argsort(-1)[:, :2]
        one = torch.stack([x[b, order[b]] for b in range(3)]).view(6, 2)
        given = condition.repeat_interleave(2)
    else:
        one, given = x, condition
    x_t = one + 0.7 * torch.randn(one.shape, generator=g, dtype=torch.float64)
    fake = 0.3 + 0.6 * x_t + given.view(-1, *[1] * (one.ndim - 1))
    push = distribution_matching_gradient(one, denoise(x_t, 0.7), fake)
    scores = 0.5 * push.square().flatten(1).mean(1).view(3, -1).mean(1)
    noised = x + 1.5 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    logit = 0.5 * (0.3 * (noised.sum((1, 2)) + 10 * condition) - 0.2 * 1.5 * noised.diff(dim=1).square().sum((1, 2)))
    torch.testing.assert_close(found, 0.7 * scores - 0.4 * logit.sigmoid().log())
    found.sum().backward()
    assert made.generator.mean.grad.abs().min() > 0
    assert made.encoder.network.weight.grad is None
    assert made.fake.mean.grad is None


def test_only_picked_frames_are_pushed_and_the_push_is_that_of_frames():
    """The gradient in the video, through a generator that is one free video."""

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.video = nn.Parameter(normals(1, 5, 2))

        def forward(self, x, sigma):
            return self.video + 0 * x

    made = matching(gan_weight=0.0)
    made.generator = Free()
    made.objective("generator", {"latent": normals(1, 5, 2)}, step=0, generator=rng(2)).sum().backward()
    g = rng(2)
    torch.rand(1, generator=g)
    order = torch.rand(1, 5, generator=g, dtype=torch.float64).argsort(-1)[0, :2]
    one = made.generator.video.detach()[0, order]
    x_t = one + 0.7 * torch.randn(2, 2, generator=g, dtype=torch.float64)
    push = (0.3 + 0.6 * x_t) - PICTURES.denoise(x_t, 0.7)
    push = push / (one - PICTURES.denoise(x_t, 0.7)).abs().mean(1, keepdim=True)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[order] = push / 4  # means over two numbers and two frames
    torch.testing.assert_close(made.generator.video.grad[0], expected)


def test_the_fakes_and_the_heads_objectives_by_hand():
    latent, condition, real = normals(3, 5, 2), normals(3, seed=1), normals(3, 5, 2, seed=4)
    batch, made = {"latent": latent, "condition": condition, "real": real}, matching()
    with pytest.raises(ValueError, match="batch: expected 'real_condition' beside 'condition'"):
        made.objective("discriminator", batch, step=0, generator=rng(2))
    batch["real_condition"] = own = normals(3, seed=5)
    found = made.objective("fake", batch, step=0, generator=rng(2))
    g = rng(2)
    x = start(latent, condition, g)
    order = torch.rand(3, 5, generator=g, dtype=torch.float64).argsort(-1)[:, :2]
    one = torch.stack([x[b, order[b]] for b in range(3)])
    x_t = one + 0.7 * torch.randn(6, 2, generator=g, dtype=torch.float64).view(3, 2, 2)
    error = (0.3 + 0.6 * x_t + condition[:, None, None] - one).square().mean((1, 2))
    torch.testing.assert_close(found, (1 + 0.7**-2) * error)
    found.sum().backward()
    assert made.generator.mean.grad is None

    found = made.objective("discriminator", batch, step=0, generator=rng(2))
    g = rng(2)
    x = start(latent, condition, g)
    logits = []
    for video, given in ((x, condition), (real, own)):
        noised = video + 1.5 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        logits.append(
            0.5 * (0.3 * (noised.sum((1, 2)) + 10 * given) - 0.2 * 1.5 * noised.diff(dim=1).square().sum((1, 2)))
        )
    expected = F.binary_cross_entropy_with_logits(logits[0], torch.zeros_like(logits[0]), reduction="none")
    expected = expected + F.binary_cross_entropy_with_logits(logits[1], torch.ones_like(logits[1]), reduction="none")
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert made.head.weight.grad is not None
    assert made.encoder.network.weight.grad is None
    made.train()
    assert {made.head.training, made.fake.training, made.generator.training} == {True}
    assert not made.encoder.training


def test_frame_scores_teach_a_gaussian():
    """Generator and fake know the form of the data; frames end at the teacher's mean and width."""

    class Exact(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = (of,)
            self.idle = nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma):
            made = self.of[0]
            return Mixture(made.mean.detach()[None], 2 * made.scale.detach().abs()).denoise(x, sigma)

    made = matching(gan_weight=0.0, other_steps=0, levels=log_uniform(0.1, 4.0), frames=3)
    made.fake = Exact(made.generator)
    optimizer = {"generator": torch.optim.Adam(made.generator.parameters(), lr=0.02)}
    g = rng(7)
    for step in range(250):
        latent = torch.randn(64, 5, 2, generator=g, dtype=torch.float64)
        advance(made, {"latent": latent}, optimizer, step=step, generator=g)
    torch.testing.assert_close(made.generator.mean.detach(), PICTURES.means[0], atol=0.06, rtol=0)
    assert 2 * made.generator.scale.item() == pytest.approx(0.5, abs=0.06)


def test_replicas_players_and_state():
    made = matching(steps=(2.0, 0.5))
    assert tuple(made.players()) == ("fake", "discriminator", "generator")
    assert made.turns(3) == ("fake", "discriminator", "fake", "discriminator", "generator")
    assert matching(gan_weight=0.0).turns(0) == ("fake", "fake", "generator")
    assert matching(score_weight=0.0, other_steps=1).turns(0) == ("discriminator", "generator")
    latent, real = normals(2, 4, 5, 2), normals(2, 4, 5, 2, seed=1)
    for player in made.players():
        stacked = made.objective(player, {"latent": latent, "real": real}, step=0, generator=[rng(1), rng(2)])
        alone = made.objective(player, {"latent": latent[1], "real": real[1]}, step=0, generator=rng(2))
        assert stacked.shape == (2, 4)
        torch.testing.assert_close(stacked[1], alone)
    other = matching(steps=(2.0, 0.5), fake=Affine(9.0, 9.0))
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(
        other.objective("fake", {"latent": latent[0]}, step=0, generator=rng()),
        made.objective("fake", {"latent": latent[0]}, step=0, generator=rng()),
    )
    video = made(latent[0], generator=rng(5))
    by_hand = 0.2 + 0.4 * (2 * latent[0])
    by_hand = 0.2 + 0.4 * (by_hand + 0.5 * torch.randn(4, 5, 2, generator=rng(5), dtype=torch.float64))
    torch.testing.assert_close(video, by_hand)


def test_the_encoder_shows_features_and_passes_gradients():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    encoder = TeacherEncoder(teacher, ("1", "0"))
    x = torch.randn(4, 2, requires_grad=True)
    late, early = encoder(x)
    torch.testing.assert_close(early, teacher[0](x))
    torch.testing.assert_close(late, teacher[0](x).tanh())
    late.sum().backward()
    assert x.grad.abs().min() > 0
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m._forward_hooks for m in teacher.modules())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_head_by_hand(axes):
    """1x1 convolutions are matrix products, pooling to the smaller scale a mean over blocks."""
    torch.manual_seed(0)
    head = DenoisingGANHead((3, 2), width=4, axes=axes).double()
    fine, coarse = normals(2, 3, *[4] * axes), normals(2, 2, *[2] * axes, seed=1)
    parts = []
    for layer, f in zip(head.scales, (fine, coarse)):
        y = torch.einsum("oc,bc...->bo...", layer.weight.flatten(1), f) + layer.bias.view(-1, *[1] * axes)
        for axis in range(2, 2 + axes):
            y = y.unflatten(axis, (2, -1)).mean(axis + 1)
        parts.append(y)
    expected = head.joint(torch.cat(parts, dim=1)).mean(tuple(range(1, 2 + axes)))
    torch.testing.assert_close(head([fine, coarse]), expected)
    swapped = DenoisingGANHead((2, 3), width=4, axes=axes).double()
    assert swapped([coarse, fine]).shape == (2,)


def test_diffusers_networks_distil():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)

    def unet(channels):
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet(1)

        def forward(self, x, t):
            return self.unet(x, t).sample

    class Video(nn.Module):
        """Frames as channels."""

        def __init__(self):
            super().__init__()
            self.unet = unet(4)

        def forward(self, x, t):
            return self.unet(x.squeeze(2), t).sample.unsqueeze(2)

    process = tabulated(diffusers.DDPMScheduler().alphas_cumprod)
    video, image = Denoiser(Video(), process), Denoiser(Image(), process)
    made = VideoDistributionMatching(
        Denoiser(Video(), process),
        None,
        image,
        TeacherEncoder(video, ("network.unet.conv_in", "network.unet.mid_block")),
        DenoisingGANHead((8, 8), width=4),
        steps=(20.0, 1.0),
        frames=2,
        levels=log_uniform(0.1, 10.0),
        gan_levels=log_uniform(0.1, 10.0),
    )
    optimizers = {name: torch.optim.Adam(p.parameters()) for name, p in made.players().items()}
    batch = {"latent": torch.randn(2, 4, 1, 8, 8, generator=rng()), "real": torch.randn(2, 4, 1, 8, 8)}
    values = advance(made, batch, optimizers, step=0, generator=rng())
    assert all(torch.isfinite(v) for v in values.values())
    assert made(batch["latent"], generator=rng()).shape == (2, 4, 1, 8, 8)


def test_refusals():
    x = torch.zeros(2, 3, 2)
    for call, message in (
        (lambda: random_frames(x, 4), "count: expected a whole number"),
        (lambda: TeacherEncoder(nn.Linear(2, 2), ("up",)), "names: expected modules"),
        (lambda: DenoisingGANHead(()), "channels: expected at least one scale"),
        (lambda: DenoisingGANHead((2,), axes=4), "axes: expected a whole number"),
        (lambda: DenoisingGANHead((2,))([x, x]), "features: expected 1 scales"),
        (lambda: matching(steps=(1.0, 2.0)), "steps: expected falling levels"),
        (lambda: matching(gan_weight=-1.0), "gan_weight: expected a number >= 0"),
        (lambda: matching(frames=0), "frames: expected a whole number"),
        (lambda: matching().objective("discriminator", {"latent": x.double()}, step=0), "batch: expected 'real'"),
        (lambda: matching().objective("fake", {"real": x.double()}, step=0), "batch: expected 'latent'"),
        (lambda: matching(other_steps=-1), "other_steps: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
