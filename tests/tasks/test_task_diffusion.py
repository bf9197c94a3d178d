"""Denoisers that claims share: what they are given, what they learn, and the distances, against other means."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as peer_energy
from scipy.stats import wasserstein_distance

from lossary.diffusion._distil import OneStepGenerator, ScoreDistillation, log_uniform
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import dpm_solver_pp, karras_sigmas
from lossary.roles.procedure import Procedure
from lossary.tasks import (
    Seeds,
    Tally,
    Unet,
    digit_classifier,
    digit_denoiser,
    digit_distance,
    digit_images,
    digit_student,
    digit_teacher,
    distil,
    drawn_digits,
    drawn_from,
    energy_distance,
    fit_denoiser,
    frechet_distance,
    generated,
    ring_denoiser,
    ring_distance,
    sheet,
    sliced_wasserstein,
    stacked_denoiser,
    trained,
    uneven_ring,
)

RING_MEAN = 1.4 * 3 / 7 * 8 / 20 / (complex(1, 1) / 2**0.5 - 1)  # sum_k (1 + 3k/7) w^k = 3/7 * 8 / (w - 1)


def test_a_stack_learns_a_gaussian():
    seeds, truth = Seeds((0, 1)), Mixture(torch.tensor([[0.5, -0.5]]), 0.4)
    denoise = stacked_denoiser(2, seeds)

    def draw(n, generators):
        return (torch.stack([truth.sample(n, generator=g)[0] for g in generators]),)

    fit_denoiser(denoise, draw, seeds=seeds, steps=300)
    sigmas = karras_sigmas(15, low=0.02, high=20.0)
    start = 20.0 * torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = dpm_solver_pp(denoise, start, sigmas)
    torch.testing.assert_close(found.mean(1), truth.means.expand(2, -1), atol=0.08, rtol=0)
    torch.testing.assert_close(found.std(1), torch.full((2, 2), 0.4), atol=0.08, rtol=0)


def test_a_condition_of_zeros_is_none():
    denoise = stacked_denoiser(2, Seeds((0, 1)), conditions=3)
    x = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoise(x, 1.0, torch.zeros(2, 5, 3)), denoise(x, 1.0))
    assert not torch.allclose(denoise(x, 1.0, torch.ones(2, 5, 3)), denoise(x, 1.0))


def test_no_label_is_the_last_one():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Unet(channels=8)
        x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(net(x, t), net(x, t, torch.full((3,), 10)))
    assert not torch.allclose(net(x, t), net(x, t, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize(("size", "count"), [(8, 1797), (16, 5000)])
def test_digits_come_as_pictures(size, count):
    x, y = digit_images(size)
    assert x.shape == (count, 1, size, size)
    assert -1 <= x.min() < x.max() <= 1
    assert y.bincount().min() > 0.08 * count


def test_distances_are_those_of_scipy_on_a_line():
    x, y = torch.randn(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).unbind()
    y = y + 1
    expected = wasserstein_distance(x.numpy(), y.numpy())
    assert sliced_wasserstein(x[:, None], y[:, None]).item() == pytest.approx(expected)
    assert energy_distance(x[:, None], y[:, None]).item() == pytest.approx(peer_energy(x.numpy(), y.numpy()) ** 2)
    with pytest.raises(ValueError, match="as many"):
        sliced_wasserstein(x[:, None], y[:5, None])


def test_frechet_distance_of_normal_laws():
    """Rotated and scaled copies of the same points: the closed form for covariances that commute, and scipy's root."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    y = 3 * x[0] + 1
    moved = (2 * x[0].mean(0) + 1).square().sum() + 4 * x[0].T.cov().trace()
    assert frechet_distance(x, y)[0].item() == pytest.approx(moved.item())
    other = torch.randn(50, 4, generator=g, dtype=torch.float64)
    c, d = x[1].T.cov().numpy(), other.T.cov().numpy()
    gap = (x[1].mean(0) - other.mean(0)).square().sum().item()
    expected = gap + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert frechet_distance(x, other)[1].item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [8, 16])
def test_the_judge_knows_digits_and_what_is_none(size):
    x, y = digit_images(size)
    judge = digit_classifier(size=size)
    assert (judge(x).argmax(-1) == y).double().mean() > 0.95
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:600]
    blurred = torch.nn.functional.avg_pool2d(x[rows], 3, stride=1, padding=1)
    near, far = digit_distance(torch.stack([x[rows], blurred])).tolist()
    assert digit_distance(x).item() == pytest.approx(0, abs=1e-6)
    assert 5 * near < far


def counted(calls):
    def train(net):
        calls.append(1)
        with torch.no_grad():
            net.weight.fill_(len(calls))

    return train


def test_a_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []
    first, again = (trained(lambda: torch.nn.Linear(1, 1), counted(calls), key="a") for _ in range(2))
    assert first.weight.item() == again.weight.item() == len(calls) == 1
    assert not again.training
    assert not again.weight.requires_grad
    trained(lambda: torch.nn.Linear(1, 1), counted(calls), key="b")
    assert len(calls) == 2
    for file in tmp_path.rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:40])  # torn
    assert trained(lambda: torch.nn.Linear(1, 1), counted(calls), key="a").weight.item() == 3
    assert trained(lambda: torch.nn.Linear(1, 1), counted(calls), key="a").weight.item() == 3


def test_the_ring_is_uneven():
    truth = uneven_ring()
    mean = truth.weights @ truth.means
    assert complex(*mean) == pytest.approx(RING_MEAN)
    torch.testing.assert_close(truth.means.norm(dim=1), torch.full((8,), 1.4, dtype=torch.float64))
    assert (truth.weights[-1] / truth.weights[0]).item() == pytest.approx(4)
    (x,) = drawn_from(truth)(40_000, Seeds((0, 1)).torch("data"))
    assert (x.shape, x.dtype) == ((2, 40_000, 2), torch.float32)
    torch.testing.assert_close(x.mean(1), mean.float().expand(2, -1), atol=0.03, rtol=0)
    second = 1.4**2 + 2 * 0.12**2  # E|x|^2 does not depend on the weights
    torch.testing.assert_close(x.square().sum(-1).mean(1), torch.full((2,), second), atol=0.01, rtol=0)


def test_a_denoiser_of_the_ring_is_fitted_once_and_handed_out_as_copies():
    seeds = Seeds((0, 1))
    (clean,) = drawn_from(uneven_ring())(2000, seeds.torch("data"))
    x_t = clean + 2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    denoise = ring_denoiser(seeds)
    with torch.no_grad():
        found = denoise(x_t, 2.0)
        for weight in denoise.parameters():
            weight.fill_(torch.nan)
        again = ring_denoiser(seeds)(x_t, 2.0)
    assert (found - uneven_ring().denoise(x_t, 2.0)).square().mean((1, 2)).sqrt().max() < 0.1
    assert torch.equal(again, found)


class Signs(Procedure):
    """Objectives sign x parameter: gradients are 1 or -1, so that steps are learning rates."""

    def __init__(self, names):
        super().__init__()
        self.parts = torch.nn.ModuleDict({name: torch.nn.ParameterList([torch.zeros(2, 1)]) for name in names})
        self.seen = []

    def players(self):
        return self.parts

    def turns(self, step):
        return ("fake", "generator", "generator")

    def objective(self, player, batch, *, step, generator):
        self.seen.append(batch["sign"])
        return batch["sign"] * self.parts[player][0]


def test_players_move_by_falling_steps_without_momentum():
    procedure, seeds = Signs(("fake", "generator", "idle")), Seeds((3, 4))

    def batch(generators):
        return {"sign": torch.stack([torch.randint(2, (1,), generator=g) * 2.0 - 1 for g in generators])}

    distil(procedure, batch, seeds=seeds, steps=10, lr=0.01)
    signs = torch.stack(procedure.seen[::3])
    assert len(signs.unique()) == 2
    assert torch.equal(signs[0], batch(seeds.torch("distil"))["sign"])
    rates = torch.tensor([0.01 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    moved = -(rates[:, None, None] * signs).sum(0)
    for name, turns in (("fake", 1), ("generator", 2), ("idle", 0)):
        torch.testing.assert_close(procedure.parts[name][0].detach(), turns * moved)


def test_what_is_generated_is_compared_with_the_ring():
    seeds = Seeds((0, 5))
    found = generated(lambda latent: 2 * latent, seeds)
    assert found.shape == (2, 2000, 2)
    assert found.std().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(found[1:], generated(lambda latent: 2 * latent, Seeds((5,))))
    (same,) = drawn_from(uneven_ring())(500, seeds.torch("true"))
    assert ring_distance(same, seeds).tolist() == [0, 0]
    shifted = ring_distance(same + torch.tensor([3.0, 4.0]), seeds)  # by 5: on average over directions 5 * 2 / pi
    torch.testing.assert_close(shifted, torch.full((2,), 10 / math.pi), atol=0.3, rtol=0)


@pytest.mark.parametrize("perfect", [True, False])
def test_evaluations_are_counted_by_sample(perfect):
    """Of 5 samples: 2 a turn of the fake network, 3 one of the generator, which asks the teacher, too."""
    seeds = Seeds((0, 1))
    networks = [stacked_denoiser(2, seeds, hidden=(4,)) for _ in range(3)]
    teacher = uneven_ring().denoise if perfect else networks[2]
    parts = OneStepGenerator(networks[0]), networks[1], teacher
    procedure = ScoreDistillation(*parts, levels=log_uniform(0.1, 5.0), fake_steps=3)
    tally = Tally(procedure)
    distil(procedure, lambda generators: {"latent": torch.ones(2, 5, 2)}, seeds=seeds, steps=4, lr=0.001)
    assert tally.taken() == 4 * 5 * (3 * 2 + 3)
    generated(procedure, Seeds((0, 1), smoke=True))
    assert (tally.taken(), tally.taken()) == (16, 0)


def test_a_teacher_of_stacked_digits_is_the_network_of_pictures():
    seeds = Seeds((0, 1), smoke=True)
    teacher, network = digit_teacher(seeds), digit_denoiser(steps=2)
    x, classes = drawn_digits(6, seeds.torch("rows"))
    labels = classes.argmax(-1)
    real, true = digit_images()
    for s in range(2):
        for k in range(6):
            (row,) = (real.flatten(1) == x[s, k]).all(1).nonzero()[0]
            assert true[row] == labels[s, k]
    sigma = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    classes[1, 2] = 0  # no class
    labels[1, 2] = 10
    given, without = teacher(x, sigma, classes), teacher(x, 0.7)
    for s in range(2):
        pictures = x[s].view(6, 1, 8, 8)
        torch.testing.assert_close(given[s].view_as(pictures), network(pictures, sigma[s], labels[s]))
        torch.testing.assert_close(without[s].view_as(pictures), network(pictures, 0.7))


def test_a_student_of_digits_knows_them_and_their_classes():
    """Its error lies below the variance, which is that of the best guess without a picture; classes lower it more."""
    seeds = Seeds((0,))
    x, classes = drawn_digits(1000, seeds.torch("rows"))
    x_t = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    student = digit_student(seeds, steps=200, conditions=10)
    with torch.no_grad():
        given, without = ((student(x_t, 1.0, *c) - x).square().mean() for c in ([classes], []))
        for weight in student.parameters():
            weight.zero_()
        again = (digit_student(seeds, steps=200, conditions=10)(x_t, 1.0, classes) - x).square().mean()
    assert given < 0.9 * without
    assert without < 0.75 * (x - x.mean(1)).square().mean()
    assert again == given


def test_a_sheet_has_pictures_in_rows():
    x = torch.linspace(-1, 1, 7)[:, None, None, None].expand(-1, 1, 2, 3)
    shown = sheet(x, columns=5)
    assert shown.shape == (4, 15)
    assert shown[0, ::3].tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6])
    assert shown[3, ::3].tolist() == pytest.approx([5 / 6, 1, 0, 0, 0])
