"""Distributional alignment against brute force over label sets and orders, the official weights, and diffusers."""

import itertools

import pytest
import torch

from lossary.diffusion import (
    adjusted_direct_finetune,
    distributional_alignment_loss,
    joint_target_assignment,
    optimal_target_assignment,
    step_weights,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._process import tabulated
from lossary.diffusion._samplers import dpm_solver_pp, euler, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(costs, share):
    """(N, K): the mean over all label sets of the cheapest of all orders. costs[i][k], share[k]."""
    n, plan = len(costs), [[0.0] * len(share) for _ in costs]
    for labels in itertools.product(range(len(share)), repeat=n):
        chance = 1.0
        for k in labels:
            chance *= share[k]
        best = min(set(itertools.permutations(labels)), key=lambda order: sum(costs[i][k] for i, k in enumerate(order)))
        for i, k in enumerate(best):
            plan[i][k] += chance
    return torch.tensor(plan, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.75])
def test_two_classes_are_transport_over_all_label_sets(share):
    p = torch.rand(5, generator=rng(3), dtype=torch.float64)
    p = torch.stack([1 - p, p], dim=1)
    costs = (p[:, None] - torch.eye(2)).norm(dim=-1).tolist()
    plan = brute_force(costs, [share, 1 - share])
    target, uncertainty = optimal_target_assignment(p, torch.tensor([share, 1 - share]))
    assert target.tolist() == (p[:, 1].argsort().argsort() >= 5 * share).long().tolist()
    torch.testing.assert_close(uncertainty, 1 - plan.gather(1, target[:, None])[:, 0])


def test_replicas_are_apart_and_ties_are_broken():
    p = torch.rand(3, 6, 2, generator=rng())
    together = optimal_target_assignment(p, torch.tensor([0.25, 0.75]))
    for s in range(3):
        alone = optimal_target_assignment(p[s], torch.tensor([0.25, 0.75]))
        assert all(torch.equal(a[s], b) for a, b in zip(together, alone))
    assert optimal_target_assignment(torch.full((4, 2), 0.5), torch.tensor([0.5, 0.5]))[0].tolist() == [0, 0, 1, 1]
    never = optimal_target_assignment(p[0], torch.tensor([0.0, 1.0]))
    assert never[0].tolist() == [1] * 6
    assert never[1].tolist() == [0] * 6
    assert optimal_target_assignment(p[0, :0], torch.tensor([0.5, 0.5]))[0].shape == (0,)
    assert optimal_target_assignment(torch.ones(2, 0, 3), torch.ones(3) / 3)[1].shape == (2, 0)


@pytest.mark.parametrize(("share", "zeros"), [(0.1, 1), (0.3, 3), (0.7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_that_are_whole_numbers_of_samples(share, zeros, dtype):
    """0.3 in float32 is above 0.3: three of ten, not four."""
    p = torch.rand(10, generator=rng(4))
    p = torch.stack([1 - p, p], dim=1)
    target, _ = optimal_target_assignment(p, torch.tensor([share, 1 - share], dtype=dtype))
    assert (target == 0).sum().item() == zeros
    assert target.tolist() == (p[:, 1].argsort().argsort() >= zeros).long().tolist()


def test_shares_are_divided_by_their_sum():
    for p, shares in (
        (torch.rand(6, 2, generator=rng()), [1.0, 1.0]),
        (torch.rand(6, 3, generator=rng()), [2.0, 2, 1]),
    ):
        shares = torch.tensor(shares)
        plain, scaled = (optimal_target_assignment(p, s, generator=rng()) for s in (shares / shares.sum(), 3 * shares))
        assert torch.equal(plain[0], scaled[0])
        torch.testing.assert_close(plain[1], scaled[1])
    p = [torch.eye(2), torch.eye(2)]
    plain, scaled = (joint_target_assignment(p, s * torch.eye(2), generator=rng())[0] for s in (0.5, 4.0))
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(plain[1], scaled[1])


def test_more_classes_by_brute_force():
    p = torch.randn(2, 4, 3, generator=rng(1)).mul(2).softmax(-1)
    share = torch.tensor([0.5, 0.2, 0.3])
    target, uncertainty = optimal_target_assignment(p, share, draws=2000, generator=rng())
    for s in range(2):
        plan = brute_force((p[s][:, None] - torch.eye(3)).norm(dim=-1).tolist(), share.tolist())
        torch.testing.assert_close(uncertainty[s].double(), 1 - plan.max(-1).values, atol=0.04, rtol=0)
        assert target[s].tolist() == plan.argmax(-1).tolist()


def test_not_the_squared_distance():
    """With a label of each of two classes, 0.495 + 1.102 < 0.919 + 0.718; squared, the other order is cheaper."""
    p, share = torch.tensor([[0.65, 0.35, 0.0], [0.45, 0.1, 0.45]]), torch.tensor([0.5, 0.5, 0.0])
    target, uncertainty = optimal_target_assignment(p, share, draws=2000, generator=rng())
    assert target.tolist() == [0, 1]
    assert uncertainty.tolist() == pytest.approx([0.25, 0.25], abs=0.04)


def test_joint_attributes_by_brute_force():
    first, second = (torch.randn(3, k, generator=rng(k)).softmax(-1) for k in (2, 3))
    share = torch.rand(2, 3, generator=rng(9))
    share /= share.sum()
    costs = [
        [
            ((first[i] - torch.eye(2)[a]).square().sum() + (second[i] - torch.eye(3)[b]).square().sum()).sqrt().item()
            for a in range(2)
            for b in range(3)
        ]
        for i in range(3)
    ]
    plan = brute_force(costs, share.flatten().tolist()).view(3, 2, 3)
    found = joint_target_assignment([first, second], share, draws=2000, generator=rng())
    for (target, uncertainty), margin in zip(found, (plan.sum(2), plan.sum(1))):
        assert target.tolist() == margin.argmax(-1).tolist()
        torch.testing.assert_close(uncertainty.double(), 1 - margin.max(-1).values, atol=0.04, rtol=0)


def test_the_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 3.0]], requires_grad=True)
    target, original = torch.tensor([0, 1, 1, -1, 1]), torch.tensor([0, 0, 1, -1, -1])
    uncertainty, drift = torch.tensor([0.2, 0.1, 0.3, 0.0, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    found = distributional_alignment_loss(
        logits, target, uncertainty=uncertainty, drift=drift, original=original, weight=10.0, eased=0.5
    )
    small, large = 0.126928, 2.126928  # log(1 + e^-2), log(1 + e^2)
    expected = [small + 1.0, large + 1.0, 1.5, 4.0, 0.048587 + 5.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    found.sum().backward()
    assert (logits.grad[2:4] == 0).all()
    assert (logits.grad[[0, 1, 4]] != 0).all()


class Network(torch.nn.Module):
    """eps(x, sigma) = tanh(a x + b) + b sigma / (1 + sigma)."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor([0.2, 0.5], dtype=torch.float64))

    def noise(self, x, sigma):
        return torch.tanh(self.a * x + self.b) + self.b * sigma / (1 + sigma)

    def forward(self, x, sigma):
        level = torch.as_tensor(sigma, dtype=x.dtype)
        level = level[..., None] if level.ndim else level
        return x - level * self.noise(x, level)


def test_the_gradient_is_an_even_sum_over_steps():
    network, sigmas = Network(), karras_sigmas(5, low=0.1, high=8.0)
    start = 8 * torch.randn(3, 2, generator=rng(), dtype=torch.float64)
    x = euler(adjusted_direct_finetune(network, sigmas), start, sigmas)
    torch.testing.assert_close(x, euler(network, start, sigmas))
    pull = torch.randn(3, 2, generator=rng(1), dtype=torch.float64)
    found = torch.autograd.grad((pull * x).sum(), network.parameters())

    widths = (sigmas[:-1] - sigmas[1:]).tolist()
    mean = torch.tensor(widths, dtype=torch.float64).prod() ** (1 / 5)
    total, y = 0.0, start
    for sigma, width in zip(sigmas.tolist(), widths):
        noise = network.noise(y, sigma)
        total = total - mean * (pull * noise).sum()
        y = (y - width * noise).detach()
    expected = torch.autograd.grad(total, network.parameters())
    torch.testing.assert_close(found, expected)


def test_levels_in_a_tensor_and_other_samplers():
    network, sigmas = Network(), torch.tensor([9.0, 4.0, 3.0, 0.0], dtype=torch.float64)
    tuned = adjusted_direct_finetune(network, sigmas)
    x, pull = torch.randn(2, 3, 2, generator=rng(), dtype=torch.float64), torch.tensor([1.0, -2.0]).double()
    weights = [15 ** (1 / 3) / width for width in (5, 1, 3)]
    torch.testing.assert_close(step_weights(sigmas), torch.tensor(weights, dtype=torch.float64))
    each = tuned(x[0], sigmas[:3])
    for k, sigma in enumerate((9.0, 4.0, 3.0)):
        (found,) = torch.autograd.grad((pull * each[k]).sum(), network.a, retain_graph=True)
        (plain,) = torch.autograd.grad((pull * network(x[0, k], sigma)).sum(), network.a)
        torch.testing.assert_close(found, weights[k] * plain)
    outer = x[1].requires_grad_()
    (slope,) = torch.autograd.grad((pull * tuned(outer, 4.0)).sum(), outer)
    torch.testing.assert_close(slope, pull.expand(3, 2))  # the linear path, nothing through the network
    ended = dpm_solver_pp(tuned, 9 * x[0], sigmas)
    torch.testing.assert_close(ended, dpm_solver_pp(network, 9 * x[0], sigmas))
    assert torch.autograd.grad(ended.sum(), network.b)[0].isfinite().all()


def test_weights_are_the_official_ones_where_steps_are_fine():
    """sqrt(abar (1 - abar)) / (1 - alpha) of Stable Diffusion's schedule, up to a factor."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - beta).cumprod(0)
    official = ((abar * (1 - abar)).sqrt() / beta).flip(0)
    ours = step_weights(((1 - abar) / abar).sqrt().flip(0))  # steps from t to t - 1
    ratio = official[:-1] / ours
    torch.testing.assert_close(ratio[:900] / ratio[0], torch.ones(900, dtype=torch.float64), atol=0.02, rtol=0)


def test_a_diffusers_network_and_scheduler():
    """The official loop: input detached, hooks on the noise, the scheduler's own step."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).double()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=40, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(4)
    alphas = scheduler.alphas_cumprod.double()
    steps = scheduler.timesteps
    sigmas = torch.cat([((1 - alphas[steps]) / alphas[steps]).sqrt(), torch.zeros(1, dtype=torch.float64)])
    start = torch.randn(2, 1, 4, 4, generator=rng(), dtype=torch.float64)

    x = start
    for t, weight in zip(steps, step_weights(sigmas).tolist()):
        noise = unet(x.detach(), t).sample
        noise.register_hook(lambda slope, weight=weight: weight * slope)
        x = scheduler.step(noise, t, x).prev_sample
    x.square().sum().backward()
    expected = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()

    class Wrapped(torch.nn.Module):
        def forward(self, x, t):
            return unet(x, t).sample

    wrapped = Wrapped()
    wrapped.unet = unet
    tuned = adjusted_direct_finetune(Denoiser(wrapped, tabulated(alphas)), sigmas)
    ours = euler(tuned, start / alphas[steps[0]].sqrt(), sigmas)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    for p, slope in zip(unet.parameters(), expected):
        torch.testing.assert_close(p.grad, slope, rtol=1e-3, atol=1e-5)


def test_other_precisions():
    p = torch.rand(6, 3, generator=rng()).bfloat16().softmax(-1)
    target, uncertainty = optimal_target_assignment(p, torch.ones(3).bfloat16() / 3, generator=rng())
    assert uncertainty.dtype is torch.bfloat16
    loss = distributional_alignment_loss(
        p, target, uncertainty=uncertainty, drift=p[:, 0], original=target, threshold=1.0
    )
    assert loss.dtype is torch.bfloat16
    assert loss.isfinite().all()


def test_refusals():
    p, half = torch.full((4, 2), 0.5), torch.tensor([0.5, 0.5])
    none, four = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    for call, message in (
        (lambda: optimal_target_assignment(p[0], half), "probabilities: expected at least 2 dimensions"),
        (lambda: optimal_target_assignment(p, half[:1]), "distribution: expected shape"),
        (lambda: optimal_target_assignment(torch.ones(4, 3), torch.ones(3), draws=0), "draws: expected a whole number"),
        (lambda: optimal_target_assignment(p, torch.tensor([-0.5, 1.5])), "distribution: expected finite shares >= 0"),
        (lambda: optimal_target_assignment(p, none[:2]), "distribution: expected finite shares >= 0"),
        (lambda: optimal_target_assignment(p, half / 0), "distribution: expected finite shares >= 0"),
        (lambda: joint_target_assignment([p, p], torch.zeros(2, 2)), "distribution: expected finite shares >= 0"),
        (lambda: joint_target_assignment([], half), "probabilities: expected at least one attribute"),
        (lambda: joint_target_assignment([p, p], half), "distribution: expected shape"),
        (
            lambda: distributional_alignment_loss(p, four, uncertainty=none[:3], drift=none, original=four),
            "uncertainty: expected shape",
        ),
        (
            lambda: distributional_alignment_loss(p, four, uncertainty=none, drift=none, original=none),
            "original: expected an int64 tensor",
        ),
        (
            lambda: distributional_alignment_loss(p, four, uncertainty=none, drift=none, original=four, eased=2.0),
            "eased: expected a number",
        ),
        (lambda: step_weights(torch.tensor([1.0])), "sigmas: expected at least two falling values"),
        (lambda: adjusted_direct_finetune(None, torch.tensor([1.0, 2.0])), "sigmas: expected at least two falling"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
