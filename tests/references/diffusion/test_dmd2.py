"""DMD2 against official formulas, simulations by hand, and what a perfect discriminator says of two Gaussians."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.diffusion import DMD2, backward_simulation, distribution_matching_gradient, few_step_samples
from lossary.diffusion._mixture import Mixture
from lossary.roles.procedure import advance

MEAN, SCALE = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5
DATA = Mixture(MEAN[None], SCALE)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def at(value):
    """Levels that are all the same."""
    return lambda shape, generator: torch.full(shape, value, dtype=torch.float64)


class Fake(nn.Module):
    """A denoiser with a layer to look at, and a condition that is added."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3).double()
        self.outer = nn.Linear(3, 2).double()
        with torch.no_grad():
            for seed, p in enumerate(self.parameters()):
                p.copy_(normals(*p.shape, seed=seed))

    def forward(self, x, sigma, *condition):
        return self.outer(self.inner(x + sum(condition)).tanh())


class Affine(nn.Module):
    def __init__(self, mean=0.0, scale=1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, latent, *condition):
        return self.mean + self.scale * latent + sum(condition)


class Sum(nn.Module):
    def forward(self, features):
        return features.sum(-1, keepdim=True)


def made(**settings):
    settings = {"head": Sum(), "features": "inner", "levels": at(0.8), "gan_levels": at(1e-9)} | settings
    return DMD2(Affine(0.2, 0.9), Fake(), DATA.denoise, **settings)


def test_the_losses_are_the_official_ones():
    procedure = made()
    latent, data = normals(3, 7, 2, seed=8), normals(3, 7, 2, seed=9)
    x = procedure.generator(latent)
    sigma = torch.full((3, 7), 0.8, dtype=torch.float64)
    x_t = x + 0.8 * normals(3, 7, 2, seed=10)
    on_fake, on_real = (procedure.fake.inner(v).sum(-1) for v in (x, data))
    error = (procedure.fake(x_t, sigma) - x).square().mean(-1)
    expected = (1 + 1 / 0.64) * error + 1e-2 * (F.softplus(on_fake) + F.softplus(-on_real))
    found = procedure.fake_loss(x, x_t, sigma, {"real": data}, [rng()] * 3)
    torch.testing.assert_close(found, expected)
    push = distribution_matching_gradient(x, DATA.denoise(x_t, sigma), procedure.fake(x_t, sigma), dims=2).detach()
    found = procedure.generator_loss(x, x_t, sigma, {}, [rng()] * 3)
    torch.testing.assert_close(found, push.square().mean(-1) / 2 + 3e-3 * F.softplus(-on_fake))
    slope = torch.autograd.grad(found.sum(), procedure.generator.mean)[0]
    weight = procedure.fake.inner.weight.sum(0)
    pull = -3e-3 * torch.sigmoid(-on_fake)[..., None] * weight
    torch.testing.assert_close(slope, (push / 2 + pull).sum((0, 1)).detach())


def test_images():
    """Each of the three pictures has a level of its own, and a value."""

    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1).double()

        def forward(self, x, sigma):
            assert sigma.shape == (3,)
            return self.conv(x)

    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 1).double())
    settings = {"head": head, "features": "conv", "steps": (10.0, 1.0), "simulated": False}
    procedure = DMD2(Blur(), Blur(), lambda x, sigma: x / 2, **settings)
    batch = {"latent": normals(3, 1, 4, 4), "real": normals(3, 1, 4, 4, seed=1)}
    for player in ("fake", "generator"):
        assert procedure.objective(player, batch, step=0, generator=rng()).shape == (3,)


def test_what_is_told_apart_is_noised_at_levels_of_its_own():
    procedure = made(gan_levels=at(2.0))
    x = normals(5000, 2)
    shift = procedure.logits(x, rng(1)) - procedure.fake.inner(x).sum(-1)
    wide = 2 * procedure.fake.inner.weight.sum(0).norm()
    assert shift.std().item() == pytest.approx(wide.item(), rel=0.05)
    assert shift.mean().abs() < 0.1 * wide
    ones = torch.ones(5000, 2, dtype=torch.float64)
    conditional = procedure.logits(x, rng(1), ones) - procedure.logits(x, rng(1))
    torch.testing.assert_close(conditional, procedure.fake.inner.weight.sum().expand(5000))
    sigma = torch.full((5000,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(procedure.logits_at(x, sigma), procedure.fake.inner(x).sum(-1))
    assert not procedure.fake.inner._forward_hooks


def test_the_head_plays_with_the_fake_network():
    procedure = made(head=nn.Linear(3, 1).double())
    assert procedure.turns(0) == ("fake",) * 5 + ("generator",)
    own = {id(p) for p in procedure.players()["fake"].parameters()}
    assert own == {id(p) for m in (procedure.fake, procedure.head) for p in m.parameters()}
    before = [p.detach().clone() for p in procedure.parameters()]
    optimizers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in procedure.players().items()}
    batch = {"latent": normals(6, 2), "real": normals(6, 2, seed=1), "condition": normals(6, 2, seed=2)}
    procedure.teacher = lambda x, sigma, c: DATA.denoise(x, sigma)
    advance(procedure, batch | {"real_condition": batch["condition"]}, optimizers, step=0, generator=rng())
    assert all(not torch.equal(a, b) for a, b in zip(before, procedure.parameters()))
    assert not any(name.startswith("guide") for name in procedure.state_dict())
    assert len(procedure.state_dict()) == len(before)
    without = made(head=None)
    assert without.players()["fake"] is without.fake


def test_simulated_inputs_by_hand():
    """A generator that halves: after level 8 comes N(4 z, 4^2), after level 4 half of that and noise of 1."""
    z = torch.full((90_000, 1), 2.0, dtype=torch.float64)
    levels = []

    def halve(x, sigma):
        levels.append(sigma)
        return x / 2

    x, level = backward_simulation(halve, z, (8.0, 4.0, 1.0), random=rng())
    assert levels == [8.0, 4.0]
    for sigma, mean, deviation in ((8.0, 16.0, 0.0), (4.0, 8.0, 4.0), (1.0, 4.0, math.sqrt(4 + 1))):
        here = x[level == sigma]
        assert len(here) == pytest.approx(30_000, rel=0.03)
        assert here.mean().item() == pytest.approx(mean, abs=0.1)
        assert here.std().item() == pytest.approx(deviation, abs=0.05)
    found = few_step_samples(halve, z, (8.0, 4.0, 1.0), random=rng(1))
    assert found.mean().item() == pytest.approx(2.0, abs=0.03)
    assert found.std().item() == pytest.approx(math.sqrt(5) / 2, abs=0.03)
    stacked, _ = backward_simulation(halve, z.view(2, -1, 1), (8.0, 4.0), random=[rng(3), rng(4)])
    alone, _ = backward_simulation(halve, z.view(2, -1, 1)[1], (8.0, 4.0), random=rng(4))
    torch.testing.assert_close(stacked[1], alone)


class Asked(nn.Module):
    """Remembers what it was asked, and answers with a parameter."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.asked = []

    def forward(self, x, sigma):
        self.asked.append((x, sigma))
        return 0 * x + self.value


def test_several_steps_are_trained_where_they_will_work():
    """The generator says 0, the data are at 100: own inputs after the first step are noise, noised data are not."""
    for simulated, centre in ((True, 0.0), (False, 100.0)):
        generator = Asked()
        procedure = DMD2(generator, Fake(), DATA.denoise, steps=(50.0, 2.0), simulated=simulated, levels=at(0.8))
        batch = {"latent": normals(4000, 2), "real": torch.full((4000, 2), 100.0, dtype=torch.float64)}
        loss = procedure.objective("generator", batch, step=0, generator=rng())
        assert loss.requires_grad
        x, sigma = generator.asked[-1]
        torch.testing.assert_close(x[sigma == 50.0], 50 * batch["latent"][sigma == 50.0])
        late = x[sigma == 2.0]
        assert len(late) == pytest.approx(2000, rel=0.1)
        assert late.mean().item() == pytest.approx(centre, abs=0.2)
        assert late.std().item() == pytest.approx(2.0, rel=0.05)
        assert not procedure.objective("fake", batch, step=0, generator=rng()).isnan().any()
        assert procedure(batch["latent"], generator=rng()).abs().max() == 0
        assert generator.asked[-1][1] == 2.0


@pytest.mark.parametrize(("simulated", "expected"), [(True, 3.0), (False, 7.0)])
def test_noised_data_come_with_their_own_condition(simulated, expected):
    """Samples from noised data are of what the data are of, for all three networks; simulated ones of what is asked."""
    seen = []

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2).double()

        def forward(self, x, sigma, condition):
            seen.append(condition.unique().item())
            return self.inner(x)

    made = DMD2(Conditional(), Conditional(), Conditional(), steps=(9.0, 1.0), simulated=simulated)
    x, ones = normals(4, 2), torch.ones(4, 1, dtype=torch.float64)
    batch = {"latent": x, "real": x, "condition": 3 * ones, "real_condition": 7 * ones}
    for player in ("fake", "generator"):
        made.objective(player, batch, step=0, generator=rng())
    assert set(seen) == {expected}
    del batch["real_condition"]
    if not simulated:
        with pytest.raises(ValueError, match="batch: expected 'real_condition' beside 'condition'"):
            made.objective("fake", batch, step=0, generator=rng())


def test_one_step_is_one_evaluation():
    procedure = made()
    torch.testing.assert_close(procedure(normals(4, 2)), procedure.generator(normals(4, 2)))


def test_refusals():
    x = torch.zeros(2, 2, dtype=torch.float64)
    for call, message in (
        (lambda: made(features=""), "features: expected the name"),
        (lambda: made(features="middle"), "features: expected the name"),
        (lambda: made(gan_weight=-1.0), "gan_weight"),
        (lambda: made(head_weight=-1.0), "head_weight"),
        (lambda: made(steps=()), "steps: expected falling"),
        (lambda: made(steps=(1.0, 2.0)), "steps: expected falling"),
        (lambda: made(steps=(1.0, 0.0)), "steps: expected falling"),
        (lambda: few_step_samples(Affine(), x, (1.0, 1.0)), "sigmas: expected falling"),
        (lambda: made(fake_steps=-1), "fake_steps: expected a whole number"),
        (lambda: made().objective("fake", {"latent": x}, step=0), "batch: expected 'real'"),
        (lambda: made().objective("fake", {"latent": x, "real": x, "condition": x}, step=0), "'real_condition' beside"),
        (lambda: made(steps=(1.0,)).objective("fake", {"real": x}, step=0), "batch: expected 'latent'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
