"""The link against autograd's gradient of the potential written down, against logistic regression, and as proper."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossary.losses import ICNNGradientLink, LegendreTron, softmax_plus


def scores(n=6, width=3, size=2.0):
    return size * torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def bent(made):
    """Weights far from their start, so that every part of the map counts."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g, dtype=torch.float64))
    return made


def test_softmax_plus_by_hand_and_as_a_gradient():
    t = scores().requires_grad_()
    p = softmax_plus(t)
    for row, got in zip(t.tolist(), p.tolist()):
        total = 1 + math.fsum(map(math.exp, row))
        assert got == pytest.approx([math.exp(x) / total for x in row] + [1 / total], abs=1e-14)
    (gradient,) = torch.autograd.grad((1 + t.exp().sum(-1)).log().sum(), t)
    torch.testing.assert_close(p[:, :-1], gradient, rtol=0, atol=1e-14)
    assert softmax_plus(torch.tensor([0.3])).tolist() == pytest.approx(
        [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(0.3))]
    )


@pytest.mark.parametrize(("hidden", "layers"), [(4, 1), (5, 2), (3, 4)])
def test_the_link_is_the_gradient_of_its_convex_function(hidden, layers):
    link = bent(ICNNGradientLink(3, hidden=hidden, layers=layers).double())
    s = scores().requires_grad_()
    w = dict(link.named_parameters())
    softplus = torch.nn.Softplus(threshold=1000)
    z = softplus(s @ w["scores.0.weight"].T + w["scores.0.bias"])
    for n in range(1, layers):
        inner = z @ softplus(w[f"hidden.{n - 1}"]).T + s @ w[f"scores.{n}.weight"].T + w[f"scores.{n}.bias"]
        z = softplus(inner)
    potential = softplus(w["quadratic"]) / 2 * s.square().sum(-1) + z @ softplus(w["weight"])
    (expected,) = torch.autograd.grad(potential.sum(), s)
    torch.testing.assert_close(link(s), expected, rtol=1e-12, atol=1e-12)


def test_its_jacobian_is_symmetric_with_eigenvalues_of_at_least_a():
    link = bent(ICNNGradientLink(4, hidden=6, layers=3).double())
    least = F.softplus(link.quadratic).item()
    for s in scores(width=4):
        jacobian = torch.autograd.functional.jacobian(link, s)
        torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)
        assert torch.linalg.eigvalsh(jacobian).min() >= least - 1e-12


def test_it_starts_near_the_identity():
    torch.manual_seed(0)
    s = scores(width=5)
    assert (ICNNGradientLink(5).double()(s) - s).abs().max() < 0.1


def test_without_the_network_it_is_multinomial_logistic_regression():
    head = LegendreTron(4).double()
    with torch.no_grad():
        head.links[0].weight.fill_(-100.0)
    s, y = scores(), torch.tensor([0, 1, 2, 3, 3, 0])
    logits = torch.cat([s, torch.zeros(6, 1, dtype=torch.float64)], -1)
    torch.testing.assert_close(head(s), logits.log_softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(head.loss(s, y), F.cross_entropy(logits, y, reduction="none"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2])
def test_log_loss_stays_proper_its_minimum_is_at_the_true_probabilities(blocks):
    head = bent(LegendreTron(4, hidden=5, blocks=blocks).double())
    truth = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    s = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [s], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def risk():
        optimizer.zero_grad()
        every = torch.stack([head.loss(s, torch.full((2,), y)) for y in range(4)], -1)
        total = (truth * every).sum()
        total.backward()
        return total

    optimizer.step(risk)
    torch.testing.assert_close(head(s).exp(), truth, rtol=0, atol=1e-6)


def test_the_composed_link_is_monotone_in_its_spectrum_but_not_a_gradient():
    """A product of two symmetric positive definite matrices: real positive eigenvalues, but not symmetric."""
    head = bent(LegendreTron(4, hidden=5).double())
    jacobian = torch.autograd.functional.jacobian(lambda s: head(s).exp()[:-1], scores(1, size=0.5)[0])
    eigenvalues = torch.linalg.eigvals(jacobian)
    assert (eigenvalues.real > 0).all()
    assert eigenvalues.imag.abs().max() < 1e-12
    assert (jacobian - jacobian.T).abs().max() > 1e-3 * jacobian.abs().max()


def test_blocks_follow_one_another():
    head = bent(LegendreTron(4, hidden=5, blocks=2).double())
    first, second = head.links
    expected = torch.cat([second(first(scores())), torch.zeros(6, 1).double()], -1).log_softmax(-1)
    torch.testing.assert_close(head(scores()), expected, rtol=0, atol=1e-13)


def test_leading_dimensions_and_large_scores():
    head = bent(LegendreTron(4, hidden=5).double())
    torch.testing.assert_close(head(scores().view(2, 3, 3)), head(scores()).view(2, 3, 4), rtol=0, atol=1e-13)
    s = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = LegendreTron(4).loss(s, torch.tensor([1]))
    assert value.isfinite().all()
    value.sum().backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input", lambda: softmax_plus(torch.zeros(3).long())),
        ("input", lambda: softmax_plus(torch.zeros(3, 0))),
        ("num_features", lambda: ICNNGradientLink(0)),
        ("hidden", lambda: ICNNGradientLink(2, hidden=0)),
        ("layers", lambda: ICNNGradientLink(2, layers=0)),
        ("num_classes", lambda: LegendreTron(1)),
        ("blocks", lambda: LegendreTron(3, blocks=0)),
        ("scores", lambda: LegendreTron(3)(torch.zeros(2, 3))),
        ("target", lambda: LegendreTron(3).loss(torch.zeros(2, 2), torch.zeros(2))),
    ],
)
def test_what_does_not_fit_is_refused(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()
