"""Score Jacobian chaining: Gaussians in closed form, and the renderer against scipy, ray by ray."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from lossary.diffusion import (
    ScoreJacobianChaining,
    VoxelRadianceField,
    emptiness_loss,
    perturb_and_average_score,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import log_uniform
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import tabulated

GAUSS = Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_of_a_gaussian_it_is_the_score_at_the_render():
    """D is linear, so the noise averages out: (mean - x) / (0.25 + sigma^2), at once with -n beside n."""
    x = torch.randn(4, 2, generator=rng(), dtype=torch.float64)
    sigma = torch.tensor([0.2, 1.0, 3.0, 8.0], dtype=torch.float64)
    expected = (GAUSS.means - x) / (0.25 + sigma**2)[:, None]
    found = perturb_and_average_score(GAUSS.denoise, x, sigma, antithetic=True, generator=rng(1))
    torch.testing.assert_close(found, expected)
    found = perturb_and_average_score(GAUSS.denoise, x.repeat(50_000, 1), 1.0, generator=rng(2)).view(-1, 4, 2)
    torch.testing.assert_close(found.mean(0), (GAUSS.means - x) / 1.25, atol=5e-3, rtol=0)
    # D's noise is g sigma n, g = 0.25 / 1.25; that of the score of the noised point would be 1 - g = 0.8
    assert found.std(0).mean().item() == pytest.approx(0.2, rel=0.02)
    few = perturb_and_average_score(GAUSS.denoise, x.repeat(5000, 1), 1.0, samples=16, generator=rng(2)).view(-1, 4, 2)
    assert few.std(0).mean().item() == pytest.approx(0.2 / 4, rel=0.02)


def test_it_is_the_slope_of_the_averaged_log_density():
    """d/dx E log p_sigma(x + sigma n), by automatic differentiation with the same n, below log p at sqrt(2) sigma."""
    truth, sigma = ring(5), 1.5
    x = torch.randn(3, 2, generator=rng(), dtype=torch.float64).requires_grad_()
    g = rng(1)
    n = torch.stack([torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(400)])
    bound = truth.log_density(x + sigma * n, sigma).mean(0)
    (slope,) = torch.autograd.grad(bound.sum(), x)
    found = perturb_and_average_score(truth.denoise, x.detach(), sigma, samples=400, generator=rng(1))
    torch.testing.assert_close(found - n.mean(0) / sigma, slope)
    assert (bound < truth.log_density(x, 2**0.5 * sigma)).all()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_chain_rule_through_a_renderer(power):
    """Pictures A theta and B theta of one scene: the gradient is -sum J' sigma^power PAAS."""
    cameras = torch.randn(2, 2, 3, generator=rng(), dtype=torch.float64)
    theta = torch.randn(3, generator=rng(1), dtype=torch.float64, requires_grad=True)
    levels = log_uniform(0.5, 4.0)
    chain = ScoreJacobianChaining(GAUSS.denoise, levels=levels, power=power, samples=2)
    values = chain(cameras @ theta, generator=rng(2))
    assert values.shape == (2,)
    values.sum().backward()
    g = rng(2)
    sigma = levels((2,), g).double()
    score = perturb_and_average_score(GAUSS.denoise, (cameras @ theta).detach(), sigma, samples=2, generator=g)
    push = sigma[:, None] ** power * score
    torch.testing.assert_close(theta.grad, -(cameras.mT @ push[..., None]).sum(0).squeeze(1))
    torch.testing.assert_close(values, 0.5 * push.square().sum(1))


def test_descent_ends_at_the_mode():
    scene = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    chain = ScoreJacobianChaining(GAUSS.denoise, levels=log_uniform(0.1, 3.0), samples=4, antithetic=True)
    optimizer, g = torch.optim.Adam([scene], lr=0.1), rng()
    for _ in range(150):
        optimizer.zero_grad()
        chain(scene, generator=g).sum().backward()
        optimizer.step()
    torch.testing.assert_close(scene.detach(), GAUSS.means, atol=0.02, rtol=0)


def test_replicas_have_noise_of_their_own():
    chain = ScoreJacobianChaining(GAUSS.denoise, levels=log_uniform(0.5, 4.0))
    x = torch.randn(3, 5, 2, generator=rng())
    stacked = chain(x, batch=2, generator=[rng(k) for k in range(3)])
    torch.testing.assert_close(stacked[1], chain(x[1], generator=rng(1)))


@pytest.mark.parametrize("size", [(5, 7), (4, 5, 6)])
@pytest.mark.parametrize("colours", ["signed", "plain"])
def test_rendering_ray_by_ray(size, colours):
    axes, g = len(size), rng(3)
    field = VoxelRadianceField(size, channels=2, shift=-0.5, colours=colours, generator=g).double()
    with torch.no_grad():
        field.density.copy_(2 * torch.randn(field.density.shape, generator=g, dtype=torch.float64))
        field.background.copy_(torch.tensor([[0.3, -0.7]]))
        field.scale.fill_(0.4)
    origins = 2.5 * torch.nn.functional.normalize(torch.randn(20, axes, generator=g, dtype=torch.float64), dim=1)
    origins[-1] *= 0.1  # within the box
    aims = 0.6 * torch.randn(20, axes, generator=g, dtype=torch.float64)
    directions = aims - origins
    directions[0] = torch.eye(axes, dtype=torch.float64)[0] * 3  # along an axis
    seen = field(origins, directions)

    step = 0.5 * np.mean([2 / n for n in size])
    squash = (lambda v: 2 / (1 + np.exp(-v)) - 1) if colours == "signed" else (lambda v: v)
    hits, times = 0, np.arange(0, 5, 1e-4)
    for i in range(20):
        start, way = origins[i].numpy(), directions[i].numpy() / directions[i].norm().item()
        inside = times[(np.abs(start + times[:, None] * way) <= 1).all(1)]
        light, colour, depth = 1.0, np.zeros(2), 0.0
        count = math.ceil((inside[-1] - inside[0]) / step - 1e-3) if len(inside) else 0
        hits += len(inside) > 0
        for k in range(count):
            distance = inside[0] + k * step
            at = start + distance * way
            index = [[(at[axes - 1 - a] + 1) * size[a] / 2 - 0.5] for a in range(axes)]

            def value(grid, index=index):
                return map_coordinates(grid.detach().numpy(), index, order=1, mode="grid-constant")[0]

            density = np.logaddexp(0, math.exp(0.4) * value(field.density[0, 0]) - 0.5)
            share = light * (1 - math.exp(-density * step))
            colour += share * np.array([squash(value(c)) for c in field.colour[0]])
            depth, light = depth + share * distance, light - share
        colour += light * squash(np.array([0.3, -0.7]))
        np.testing.assert_allclose(seen.colour[i].detach().numpy(), colour, atol=2e-3)
        assert seen.depth[i].item() == pytest.approx(depth + 10 * light, abs=2e-2)
        assert seen.weights[i].sum().item() == pytest.approx(1 - light, abs=2e-3)
    assert hits > 10


def test_scenes_side_by_side():
    field = VoxelRadianceField((4, 4), channels=1, replicas=3, generator=rng())
    torch.nn.init.normal_(field.density, generator=rng(1))
    origins = torch.tensor([[-2.0, 0.1], [0.2, 2.0]]).expand(3, -1, -1)
    directions = torch.tensor([[1.0, 0.0], [-0.1, -1.0]]).expand(3, -1, -1)
    seen = field(origins, directions)
    one = VoxelRadianceField((4, 4), channels=1)
    one.load_state_dict({name: value[2:] for name, value in field.state_dict().items()})
    torch.testing.assert_close(one(origins[2], directions[2]).colour, seen.colour[2])
    seen.colour.sum().backward()
    assert all(p.grad is not None for p in field.parameters())


def test_a_ray_that_misses_sees_the_background():
    field = VoxelRadianceField((4, 4, 4), channels=2, colours="plain")
    torch.nn.init.constant_(field.background, 0.25)
    seen = field(torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(seen.colour, torch.full((1, 2), 0.25))
    assert seen.depth.item() == 10.0
    assert seen.weights.sum() == 0


def test_emptiness_is_dearest_where_it_matters():
    w = torch.tensor([[0.0, 0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    emptiness_loss(w, scale=5.0).sum().backward()
    assert w.grad[0].tolist() == pytest.approx([5 / 3, 5 / 2 / 3, 5 / 3.5 / 3])
    assert emptiness_loss(w).item() == pytest.approx((math.log(3) + math.log(6)) / 3)


def test_a_diffusers_network_scores_renders():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t):
            return self.unet(x, t).sample

    denoise = Denoiser(Net(), tabulated(diffusers.DDPMScheduler().alphas_cumprod))
    field = VoxelRadianceField((6, 6, 6), channels=1)
    grid = torch.cartesian_prod(torch.linspace(-0.9, 0.9, 8), torch.linspace(-0.9, 0.9, 8))
    origins = torch.cat([grid, torch.full((64, 1), -3.0)], dim=1)
    render = field(origins, torch.tensor([[0.0, 0.0, 1.0]]).expand(64, -1)).colour.view(1, 1, 8, 8)
    ScoreJacobianChaining(denoise, levels=log_uniform(0.1, 10.0))(render, generator=rng()).sum().backward()
    assert field.density.grad.abs().max() > 0
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())


def test_refusals():
    x = torch.zeros(2, 3)
    field = VoxelRadianceField((4, 4))
    for call, message in (
        (lambda: perturb_and_average_score(GAUSS.denoise, x, torch.ones(3)), "sigma: expected shape"),
        (lambda: perturb_and_average_score(GAUSS.denoise, x, 1.0, samples=0), "samples: expected a whole number"),
        (lambda: ScoreJacobianChaining(GAUSS.denoise, power=math.inf), "power: expected a finite number"),
        (lambda: VoxelRadianceField((4,)), "size: expected two or three"),
        (lambda: VoxelRadianceField((4, 4), step=0.0), "step: expected a number > 0"),
        (lambda: VoxelRadianceField((4, 4), colours="rgb"), "colours: expected one of"),
        (lambda: field(x, x), r"origins: expected \(N, 2\)"),
        (lambda: field(x[:, :2], x[:1, :2]), "directions: expected shape"),
        (lambda: field(x[:, :2].double(), x[:, :2]), "origins: expected torch.float32 as the field has it"),
        (lambda: field(x[:, :2], x[:, :2].bfloat16()), "directions: expected torch.float32 as the field has it"),
        (lambda: VoxelRadianceField((4, 4), replicas=2)(x[:, :2], x[:, :2]), "origins: expected 3 dimensions"),
        (lambda: emptiness_loss(x, scale=0.0), "scale: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
