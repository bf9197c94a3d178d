"""Denoisers that claims share: what they are given, what they learn, and the distances, against other means."""

import pytest
import torch
from scipy.stats import energy_distance as peer_energy
from scipy.stats import wasserstein_distance

from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import dpm_solver_pp, karras_sigmas
from lossary.tasks import (
    Seeds,
    Unet,
    digit_images,
    energy_distance,
    fit_denoiser,
    sliced_wasserstein,
    stacked_denoiser,
    trained,
)


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
