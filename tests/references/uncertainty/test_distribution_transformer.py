"""The Distribution Transformer against a conjugate posterior in closed form, and its parts by hand."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from lossary.uncertainty import DistributionTransformer, GMMTokens, prior_posterior_nll


def mixture(weights, means, factors):
    quick = {"validate_args": False}  # torch looks at every Cholesky factor otherwise
    return MixtureSameFamily(
        Categorical(weights, **quick), MultivariateNormal(means, scale_tril=factors, **quick), **quick
    )


@pytest.fixture
def planar():
    g = torch.Generator().manual_seed(0)
    factors = torch.eye(2).repeat(5, 3, 1, 1) * torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    factors[..., 1, 0] = torch.randn(5, 3, generator=g)
    return mixture(torch.rand(5, 3, generator=g) + 0.1, torch.randn(5, 3, 2, generator=g), factors)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_a_token_is_logit_mean_and_cholesky_factor(planar):
    tokens = GMMTokens(2, d_model=6, jitter=0.01)
    tokens.embedding = tokens.de_embedding = nn.Identity()
    w, normal = planar.mixture_distribution.probs, planar.component_distribution
    got = tokens(planar)
    torch.testing.assert_close(got[..., 0], (w / (1 - w)).log())
    torch.testing.assert_close(got[..., 1:3], normal.loc)
    torch.testing.assert_close(got[..., 3:5], torch.tensor([2.0, 0.5]).log().expand(5, 3, 2))
    torch.testing.assert_close(got[..., 5], normal.scale_tril[..., 1, 0])
    back = tokens.decode(got)
    torch.testing.assert_close(back.mixture_distribution.probs, w)
    torch.testing.assert_close(back.component_distribution.scale_tril, normal.scale_tril + 0.01 * torch.eye(2))
    half = tokens.decode(got - 40 * torch.eye(6)[0])  # all weights tiny: still divided by their sum
    torch.testing.assert_close(half.mixture_distribution.probs, (w / (1 - w)) / (w / (1 - w)).sum(1, keepdim=True))


def test_a_single_component_has_a_finite_token():
    lone = mixture(torch.ones(2, 1), torch.zeros(2, 1, 3), torch.eye(3).expand(2, 1, 3, 3))
    tokens = GMMTokens(3)
    assert tokens(lone).isfinite().all()
    assert tokens.decode(tokens(lone)).log_prob(torch.zeros(2, 3)).isfinite().all()


def test_the_body_reads_all_observations_and_starts_at_zero(planar):
    model = seeded(lambda: DistributionTransformer(2, {"a": 1, "b": 3}, heads=2, layers=2, feedforward=16))
    for block in model.body.layers:
        assert not block.self_attn.out_proj.weight.any()
        assert not block.linear2.weight.any()
    seen = {}
    model.body.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0], context=inputs[1]))
    a, b = torch.ones(5, 1), torch.arange(60.0).view(5, 4, 3)
    prior, posterior = model(planar, b=b, a=a)
    torch.testing.assert_close(seen["tokens"], model.tokens(planar))
    torch.testing.assert_close(seen["context"], torch.cat([model.sources["a"](a)[:, None], model.sources["b"](b)], 1))
    torch.testing.assert_close(prior.mean, model.tokens.decode(model.tokens(planar)).mean)
    assert posterior.batch_shape == (5,)
    assert posterior.event_shape == (2,)


def test_it_learns_the_conjugate_posterior():
    # x ~ N(m, s^2), z ~ N(x, 1): the posterior is N((m + s^2 z) / (1 + s^2), s^2 / (1 + s^2)).
    model = seeded(lambda: DistributionTransformer(1, {"z": 1}, d_model=16, heads=2, layers=1, feedforward=32))
    g, adam = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters())

    def draw(n):
        m, s = torch.randn(n, 1, generator=g), torch.rand(n, 1, generator=g) + 0.5
        x = m + s * torch.randn(n, 1, generator=g)
        prior = mixture(torch.ones(n, 1), m.unsqueeze(1), s[..., None, None])
        return prior, m, s, x, x + torch.randn(n, 1, generator=g)

    for step in range(300):
        prior, _, _, x, z = draw(64)
        adam.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * step / 300)) / 2
        adam.zero_grad()
        prior_posterior_nll(*model(prior, z=z), x).mean().backward()
        adam.step()
    prior, m, s, _, z = draw(500)
    with torch.no_grad():
        read, posterior = (q.component_distribution for q in model(prior, z=z))
    variance = s.square() / (1 + s.square())
    exact = Normal((m + s.square() * z) / (1 + s.square()), variance.sqrt())

    def gap(p, q):
        return kl_divergence(p, Normal(q.loc[:, 0], q.scale_tril[:, 0, :, 0])).mean()

    assert gap(exact, posterior) < 0.05
    assert gap(Normal(m, s), read) < 0.02
    assert gap(exact, prior.component_distribution) > 0.3  # what there was to learn


def test_other_priors_come_by_their_parameters():
    model = seeded(lambda: DistributionTransformer(1, {"z": 1}, prior_parameters=2, components=4, heads=2, layers=1))
    read, posterior = model(torch.ones(6, 2), z=torch.zeros(6, 1))
    assert read.component_distribution.batch_shape == (6, 4)
    assert posterior.log_prob(torch.zeros(6, 1)).shape == (6,)
    assert read.mean[0] == read.mean[1]
    assert model(torch.zeros(6, 2), z=torch.zeros(6, 1))[0].mean[0] != read.mean[0]


def test_the_loss_adds_both_terms(planar):
    other = mixture(torch.ones(5, 1), torch.ones(5, 1, 2), torch.eye(2).expand(5, 1, 2, 2))
    x = torch.zeros(5, 2)
    expected = -planar.log_prob(x) + math.log(2 * math.pi) + 1
    torch.testing.assert_close(prior_posterior_nll(planar, other, x), expected)


def test_a_state_dict_holds_all_of_it(planar):
    def make():
        return DistributionTransformer(2, {"z": 1}, heads=2, layers=1, feedforward=8)

    one, other = seeded(make), make()
    other.load_state_dict(one.state_dict())
    z, x = torch.ones(5, 1), torch.zeros(5, 2)
    torch.testing.assert_close(other(planar, z=z)[1].log_prob(x), one(planar, z=z)[1].log_prob(x))


def test_refusals_name_the_argument(planar):
    model = DistributionTransformer(2, {"z": 1}, heads=2, layers=1, feedforward=8)
    with pytest.raises(ValueError, match=r"d_model: expected a multiple of heads, 5, got 32"):
        DistributionTransformer(1, {"z": 1}, heads=5)
    with pytest.raises(ValueError, match=r"components: expected with prior_parameters and only then, got 3"):
        DistributionTransformer(1, {"z": 1}, components=3)
    with pytest.raises(ValueError, match=r"observations: expected \['z'\], got \['y'\]"):
        model(planar, y=torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"z: expected shape \(5, 1, 1\), got \(5, 1, 2\)"):
        model(planar, z=torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"prior: expected a MixtureSameFamily, got Tensor"):
        model(torch.ones(5, 2), z=torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"mixture: expected multivariate normals in 3 dimensions"):
        GMMTokens(3)(planar)
    with pytest.raises(ValueError, match=r"x: expected shape \(5, 2\), got \(5,\)"):
        prior_posterior_nll(planar, planar, torch.ones(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees(planar):
    model = seeded(lambda: DistributionTransformer(2, {"z": 1}, heads=2, layers=1, feedforward=8))
    z, x = torch.ones(5, 1), torch.zeros(5, 2)
    expected = model(planar, z=z)[1].log_prob(x)
    normal = planar.component_distribution
    there = mixture(planar.mixture_distribution.probs.cuda(), normal.loc.cuda(), normal.scale_tril.cuda())
    got = model.cuda()(there, z=z.cuda())[1].log_prob(x.cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)
