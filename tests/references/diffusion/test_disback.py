"""DisBack: the recorded path against exact posterior means, the schedule of targets by hand, the limit of no path."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lossary.diffusion import DistributionBacktracking, degradation_path
from lossary.diffusion._distil import ScoreDistillation
from lossary.roles.procedure import advance


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def at(value):
    return lambda shape, generator: torch.full(shape, value, dtype=torch.float64)


class Line(nn.Module):
    """denoise(x) = shift + keep x, which is exact for Gaussians at one noise level."""

    def __init__(self, shift=0.0, keep=0.5):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(float(shift), dtype=torch.float64))
        self.keep = nn.Parameter(torch.tensor(float(keep), dtype=torch.float64))

    def forward(self, x, sigma, *condition):
        return self.shift + self.keep * x + sum(condition)


class Shift(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))

    def forward(self, latent, *condition):
        return self.mean + latent


def test_the_path_leads_to_the_generator_s_posterior_mean():
    """Samples N(3, 1) at noise 1: E[x_0 | x] = 1.5 + x / 2, from a teacher that says 0."""
    teacher, generator = Line(0.0, 0.0), Shift(3.0)
    batches = [{"latent": normals(256, 1, seed=k)} for k in range(300)]
    path = degradation_path(
        teacher, generator, batches, partial(torch.optim.SGD, lr=0.02), every=100, levels=at(1.0), random=rng()
    )
    assert len(path) == 4
    assert (path[0].shift, path[0].keep, teacher.shift) == (0, 0, 0)
    assert path[-1].shift.item() == pytest.approx(1.5, abs=0.1)
    assert path[-1].keep.item() == pytest.approx(0.5, abs=0.05)
    x = 3 + normals(4000, 1)
    apart = [(node(x, 1.0) - (1.5 + x / 2)).square().mean().item() for node in path]
    assert apart[0] > 2 * apart[1] > 2 * apart[2]
    assert not any(p.requires_grad for node in path for p in node.parameters())
    assert generator.mean == 3
    assert generator.mean.grad is None


def test_points_are_kept_every_so_many_batches():
    batches = [{"latent": normals(4, 1, seed=k)} for k in range(7)]
    once = degradation_path(
        Line(), Shift(1.0), batches, partial(torch.optim.SGD, lr=0.1), every=1, levels=at(1.0), random=rng()
    )
    thrice = degradation_path(
        Line(), Shift(1.0), batches, partial(torch.optim.SGD, lr=0.1), every=3, levels=at(1.0), random=rng()
    )
    assert [n.shift.item() for n in thrice] == [n.shift.item() for n in once[::3]]
    assert len({n.shift.item() for n in once}) == 8


def test_targets_move_back_to_the_teacher():
    path = [Line(10.0 * k) for k in range(4)]
    procedure = DistributionBacktracking(Shift(0.0), path, interval=5, levels=at(1.0))
    assert procedure.fake.shift == 30
    assert [procedure.target(s) for s in (0, 4, 5, 9, 10, 14, 15, 1000)] == [2, 2, 1, 1, 0, 0, 0, 0]
    x, batch = normals(6, 1), {"latent": normals(6, 1)}
    for step, shift in ((0, 20.0), (7, 10.0), (12, 0.0)):
        # push = (fake - real) / sigma^2 = 30 - shift for every sample; the surrogate is half its square
        loss = procedure.objective("generator", batch, step=step, generator=rng())
        torch.testing.assert_close(loss, torch.full((6,), (30 - shift) ** 2 / 2, dtype=torch.float64))
        torch.testing.assert_close(procedure.teacher(x, 1.0), shift + x / 2)


def test_players_move_and_the_path_does_not():
    path = [Line(0.0), Line(1.0), Line(2.0)]
    procedure = DistributionBacktracking(Shift(2.0), path, interval=1, levels=at(1.0), fake_steps=2)
    assert procedure.turns(0) == ("fake", "fake", "generator")
    before = copy.deepcopy(procedure.state_dict())
    optimizers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in procedure.players().items()}
    batch = {"latent": normals(8, 1), "condition": normals(8, 1, seed=1)}
    for step in range(3):
        advance(procedure, batch, optimizers, step=step, generator=rng(step))
    for name, value in procedure.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("teacher"), name
    assert all(p.requires_grad for node in path for p in node.parameters())


def test_targets_drop_nothing():
    """In training mode, too, a target with dropout says the same twice; the fake network drops."""

    class Dropping(Line):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x, sigma):
            return self.dropout(super().forward(x, sigma))

    torch.manual_seed(0)
    batches = [{"latent": normals(4, 1, seed=k)} for k in range(4)]
    path = degradation_path(
        Dropping(), Shift(1.0), batches, partial(torch.optim.SGD, lr=0.1), every=2, levels=at(1.0), random=rng()
    )
    procedure = DistributionBacktracking(Shift(1.0), path, interval=1, levels=at(1.0)).train()
    x = normals(50, 1)
    assert not any(m.training for m in procedure.teacher.modules())
    assert torch.equal(procedure.teacher(x, 1.0), procedure.teacher(x, 1.0))
    assert not torch.equal(procedure.fake(x, 1.0), procedure.fake(x, 1.0))


def test_the_teacher_alone_is_plain_distillation():
    teacher, latent = Line(1.0, 0.3), normals(9, 1)
    plain = ScoreDistillation(Shift(0.5), None, teacher, levels=at(0.7))
    ours = DistributionBacktracking(Shift(0.5), [teacher], interval=1, levels=at(0.7))
    for player in ("fake", "generator"):
        a, b = (p.objective(player, {"latent": latent}, step=3, generator=rng()) for p in (plain, ours))
        torch.testing.assert_close(a, b)
    own = DistributionBacktracking(Shift(0.5), [teacher], interval=1, levels=at(0.7), fake=Line(7.0))
    assert own.fake.shift == 7


def test_refusals():
    record = partial(degradation_path, Line(), Shift(0.0), levels=at(1.0))
    sgd = partial(torch.optim.SGD, lr=0.1)
    for call, message in (
        (lambda: DistributionBacktracking(Shift(0.0), [], interval=1, levels=at(1.0)), "path: expected at least"),
        (lambda: DistributionBacktracking(Shift(0.0), [Line()], interval=0, levels=at(1.0)), "interval"),
        (lambda: record([{"latent": normals(2, 1)}], sgd, every=0), "every"),
        (lambda: record([{"latent": normals(2, 1)}], sgd, every=2), "batches: expected at least every = 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
