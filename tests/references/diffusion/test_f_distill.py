"""f-distill: the weights by differentiating f twice, divergences by scipy, gradients by quadrature, the limit DMD2."""

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from lossary.diffusion import DMD2, FDistillation, f_divergence, f_divergence_weight
from lossary.diffusion._mixture import Mixture

ALL = ("reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys")
DATA = Mixture(torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.mark.parametrize("divergence", ALL)
def test_the_weight_is_f_twice_differentiated(divergence):
    r = torch.tensor([0.01, 0.3, 1.0, 4.0, 90.0], dtype=torch.float64, requires_grad=True)
    f = f_divergence(r.log(), divergence)
    (slope,) = torch.autograd.grad(f.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(f_divergence_weight(r.log(), divergence), (curvature * r**2).detach())
    assert f[2].item() == pytest.approx(0.0, abs=1e-12)


def test_divergences_of_two_gaussians():
    """q = N(0, 1), p = N(1, 1): by textbook formulas and by integrals of another form."""
    p, q = norm(1.0).pdf, norm(0.0).pdf
    x = torch.linspace(-12, 13, 20_001, dtype=torch.float64)
    density = torch.from_numpy(q(x.numpy()))
    found = {d: torch.trapezoid(density * f_divergence(x - 0.5, d), x).item() for d in ALL}

    def middle(x):
        return (p(x) + q(x)) / 2

    def kl(a, b):
        return quad(lambda x: a(x) * (torch.tensor(a(x)).log() - torch.tensor(b(x)).log()).item(), -11, 12)[0]

    expected = {
        "reverse_kl": 0.5,
        "softened_reverse_kl": 2 * kl(middle, p),
        "jensen_shannon": kl(p, middle) + kl(q, middle),
        "squared_hellinger": quad(lambda x: (p(x) ** 0.5 - q(x) ** 0.5) ** 2 / 2, -12, 13)[0],
        "forward_kl": 0.5,
        "jeffreys": 1.0,
    }
    for divergence in ALL:
        assert found[divergence] == pytest.approx(expected[divergence], rel=1e-5), divergence


def test_extreme_ratios():
    far = torch.tensor([-80.0, 80.0])
    for divergence in ("reverse_kl", "softened_reverse_kl", "jensen_shannon"):
        weight = f_divergence_weight(far, divergence)
        assert weight.isfinite().all()
        assert weight.max() <= 1
    assert f_divergence_weight(far).tolist() == pytest.approx([1.8e-35, 1.0], rel=0.01)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, latent, *condition):
        return self.mean + latent


class Fake(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(normals(*p.shape, seed=5))

    def forward(self, x, sigma, *condition):
        return self.inner(x + sum(condition))[..., :2] / 3


class Sum(nn.Module):
    def forward(self, features):
        return features.sum(-1)


def losses(procedure):
    generator = procedure.generator
    x = generator(normals(3, 8, 2))
    sigma = torch.full((3, 8), 0.8, dtype=torch.float64)
    x_t = x + 0.8 * normals(3, 8, 2, seed=1)
    found = procedure.generator_loss(x, x_t, sigma, {}, [rng(k) for k in range(3)])
    return found.detach(), torch.autograd.grad(found.sum(), generator.mean)[0], x.detach(), x_t.detach(), sigma


def test_reverse_kl_is_dmd2():
    ours = FDistillation(Affine(), Fake(), DATA.denoise, Sum(), "inner", divergence="reverse_kl")
    theirs = DMD2(Affine(), Fake(), DATA.denoise, head=Sum(), features="inner")
    for a, b in zip(losses(ours), losses(theirs)):
        torch.testing.assert_close(a, b)


def test_pushes_are_weighted_by_the_discriminator_s_ratio():
    procedure = FDistillation(Affine(), Fake(), DATA.denoise, Sum(), "inner", divergence="forward_kl", gan_weight=0.0)
    found, slope, x, x_t, sigma = losses(procedure)
    with torch.no_grad():
        real, fake = DATA.denoise(x_t, sigma), procedure.fake(x_t, sigma)
        r = procedure.fake.inner(x_t).sum(-1).clamp(-5, 5).exp()
    push = (fake - real) / (x - real).abs().mean(-1, keepdim=True) * (r / r.mean(-1, keepdim=True))[..., None]
    torch.testing.assert_close(found, push.square().mean(-1) / 2)
    torch.testing.assert_close(slope, push.sum((0, 1)) / 2)
    assert ((r == torch.tensor(5.0).double().exp()) | (r == torch.tensor(-5.0).double().exp())).any()
    with_gan = FDistillation(Affine(), Fake(), DATA.denoise, Sum(), "inner", divergence="forward_kl", gan_weight=2.0)
    with torch.no_grad():
        logits = with_gan.logits(x, [rng(k) for k in range(3)])
    torch.testing.assert_close(losses(with_gan)[0], found + 2 * F.softplus(-logits))


def test_weights_have_mean_one_in_each_replica():
    procedure = FDistillation(Affine(), Fake(), DATA.denoise, Sum(), "inner", divergence="jeffreys", clip=1.0)
    log_ratio = 3 * normals(4, 9)
    weights = procedure.weights(log_ratio)
    torch.testing.assert_close(weights.mean(-1), torch.ones(4, dtype=torch.float64))
    assert (weights.amax(-1) / weights.amin(-1)).tolist() == pytest.approx([torch.e] * 4)  # (1 + e) / (1 + 1 / e)
    torch.testing.assert_close(weights[2], procedure.weights(log_ratio[2]))


def test_conditions_reach_all():
    low = {"gan_levels": lambda shape, generator: torch.full(shape, 0.1, dtype=torch.float64)}
    procedure = FDistillation(Affine(), Fake(), lambda x, sigma, c: c, Sum(), "inner", **low)
    batch = {"latent": normals(5, 2), "condition": normals(5, 2, seed=1), "real": normals(5, 2, seed=2)}
    batch["real_condition"] = normals(5, 2, seed=3)

    def values(player, **other):
        return procedure.objective(player, batch | other, step=0, generator=rng())

    for player in procedure.players():
        assert (values(player) != values(player, condition=normals(5, 2, seed=4))).all()
    assert (values("fake") != values("fake", real_condition=normals(5, 2, seed=4))).all()
    torch.testing.assert_close(values("generator"), values("generator", real_condition=normals(5, 2, seed=4)))


def test_the_ratio_of_the_weights_is_asked_under_the_condition():
    """The weight of forward KL is the ratio, exp of the sum of the features, here of x moved by the condition."""
    procedure = FDistillation(
        Affine(), Fake(), lambda x, sigma, c: 0 * x, Sum(), "inner", divergence="forward_kl", gan_weight=0.0, clip=50.0
    )
    x, condition = normals(6, 2), normals(6, 2, seed=1)
    real, fake = normals(2, 6, 2, seed=2).unbind()
    found = procedure.push(x, x, torch.ones(6, dtype=torch.float64), real, fake, condition).detach()
    with torch.no_grad():
        r = procedure.fake.inner(x + condition).sum(-1).exp()
    even = (fake - real) / (x - real).abs().mean(-1, keepdim=True)
    torch.testing.assert_close(found, even * (r / r.mean())[:, None])


@pytest.mark.parametrize("divergence", ALL)
def test_the_widest_clip_is_finite_in_float32(divergence):
    procedure = FDistillation(Affine(), Fake(), DATA.denoise, Sum(), "inner", divergence=divergence, clip=50.0)
    for far in (torch.tensor([-1e4, 0.0, 1e4]), torch.tensor([1e4, 1e4]), torch.tensor([-1e4, -1e4])):
        weights = procedure.weights(far)
        assert weights.isfinite().all()
        assert weights.mean().item() == pytest.approx(1.0)


def test_refusals():
    make = (Affine(), Fake(), DATA.denoise, Sum())
    one = torch.ones(2)
    for call, message in (
        (lambda: f_divergence(one, "total_variation"), "divergence: expected one of"),
        (lambda: f_divergence_weight(one, "total_variation"), "divergence: expected one of"),
        (lambda: f_divergence_weight(one.long()), "log_ratio: expected a floating"),
        (lambda: FDistillation(*make, "inner", divergence="kl"), "divergence: expected one of"),
        (lambda: FDistillation(*make, "inner", clip=0.0), "clip: expected a number > 0"),
        (lambda: FDistillation(*make, "inner", clip=100.0), "clip: expected a number > 0 and <= 50"),
        (lambda: FDistillation(*make, "outer"), "features: expected the name"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
