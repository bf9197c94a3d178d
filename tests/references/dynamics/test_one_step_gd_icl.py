"""One-step GD in context against autograd, a token-by-token attention and Monte Carlo."""

import pytest
import torch

from lossary.dynamics import LinearSelfAttention, one_step_gd_predictor, optimal_icl_step_size


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("n", "d", "noise"), [(4, 3, 0.0), (10, 2, 1.5), (1, 1, 0.5)])
def test_step_size_is_what_simulated_prompts_favour(g, n, d, noise):
    """The best eta is the regression of w . q on sum_i y_i x_i . q; a batch gives its standard error too."""
    x, w, q = draw(g, 200_000, n, d), draw(g, 200_000, d, 1), draw(g, 200_000, 1, d)
    y = (x @ w).squeeze(-1) + noise * draw(g, 200_000, n)
    guess = one_step_gd_predictor(x, y, q, step_size=1.0).squeeze()
    truth = (q @ w).squeeze()
    estimate = (guess @ truth) / guess.square().sum()
    error = ((truth - estimate * guess) * guess).square().sum().sqrt() / guess.square().sum()
    eta = optimal_icl_step_size(n, d, noise=noise)
    assert abs(estimate - eta) < 4 * error
    assert error < 0.02 * eta
    loss = (eta * guess - truth).square()
    assert abs(loss.mean() - d * (1 - n * eta)) < 4 * loss.std() / len(loss) ** 0.5


def test_prediction_follows_one_autograd_step(g):
    x, y, q = draw(g, 2, 7, 3), draw(g, 2, 7), draw(g, 2, 4, 3)
    p = draw(g, 3, 3)
    w = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    ((y - (x @ w.unsqueeze(-1)).squeeze(-1)).square().sum() / 2).backward()
    plain = torch.einsum("bqd,bd->bq", q, -0.3 * w.grad)
    torch.testing.assert_close(one_step_gd_predictor(x, y, q, step_size=0.3), plain)
    conditioned = torch.einsum("bqd,de,be->bq", q, p, -0.3 * w.grad)
    torch.testing.assert_close(one_step_gd_predictor(x, y, q, step_size=0.3, preconditioner=p), conditioned)


def test_attention_is_the_sum_over_tokens(g):
    x, y, q = draw(g, 2, 5, 3), draw(g, 2, 5), draw(g, 2, 4, 3)
    attention = LinearSelfAttention(3, scale=1.0, generator=torch.Generator().manual_seed(1)).double()
    for prompt in range(2):
        for query in range(4):
            asked = attention.query @ torch.cat([q[prompt, query], torch.zeros(1).double()])
            total = torch.zeros(4, dtype=torch.float64)
            for i in range(5):
                token = torch.cat([x[prompt, i], y[prompt, i : i + 1]])
                total = total + token * (attention.key @ token).dot(asked)
            torch.testing.assert_close(attention(x, y, q)[prompt, query], attention.value.dot(total))


def test_attention_can_take_the_gradient_step(g):
    x, y, q = draw(g, 2, 5, 3), draw(g, 2, 5), draw(g, 2, 4, 3)
    attention = LinearSelfAttention(3).double()
    inverse = draw(g, 3, 3)
    with torch.no_grad():
        attention.value.copy_(torch.tensor([0.0, 0.0, 0.0, 0.2]))
        attention.key.copy_(torch.eye(4))
        attention.query.zero_()[:3, :3] = inverse
    expected = one_step_gd_predictor(x, y, q, step_size=0.2, preconditioner=inverse.mT)
    torch.testing.assert_close(attention(x, y, q), expected)
    torch.testing.assert_close(attention.effective_matrix(), 0.2 * inverse.mT)


def test_effective_matrix_is_the_response_to_small_targets(g):
    x, y, q = draw(g, 5, 3), torch.zeros(5, dtype=torch.float64), draw(g, 3)
    attention = LinearSelfAttention(3, scale=1.0, generator=torch.Generator().manual_seed(2)).double()

    def answer(y):
        return attention(x, y, q.unsqueeze(0)).squeeze()

    slope = torch.autograd.functional.jacobian(answer, y)
    torch.testing.assert_close(slope, x @ attention.effective_matrix().mT @ q)


def test_state_and_seed_are_kept():
    one, other = (LinearSelfAttention(4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(one.key, other.key)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.effective_matrix(), other.effective_matrix())
    wider = LinearSelfAttention(4, scale=0.3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wider.value, 3 * one.value)


def test_refusals_name_the_argument(g):
    x, y, q = draw(g, 2, 5, 3), draw(g, 2, 5), draw(g, 2, 4, 3)
    with pytest.raises(ValueError, match=r"y: expected shape \(2, 5\), got \(2, 4\)"):
        one_step_gd_predictor(x, y[:, 1:], q, step_size=0.1)
    with pytest.raises(ValueError, match=r"query: expected shape \(2, 4, 3\), got \(2, 4, 2\)"):
        LinearSelfAttention(3).double()(x, y, q[..., 1:])
    with pytest.raises(ValueError, match=r"query: expected shape \(2, 1, 3\), got \(3,\)"):
        one_step_gd_predictor(x, y, q[0, 0], step_size=0.1)
    with pytest.raises(ValueError, match=r"x: expected 4 features, got 3"):
        LinearSelfAttention(4).double()(x, y, q)
    with pytest.raises(ValueError, match=r"preconditioner: expected shape \(3, 3\)"):
        one_step_gd_predictor(x, y, q, step_size=0.1, preconditioner=torch.eye(2))
    with pytest.raises(ValueError, match=r"noise: expected a number >= 0, got -1.0"):
        optimal_icl_step_size(3, 3, noise=-1.0)
