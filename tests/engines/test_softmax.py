"""The softmax engine against torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from lossary.losses._softmax import log_prob


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(4, 5, 7, generator=g, dtype=torch.float64), torch.randint(7, (4, 5), generator=g)


def reference(input, target):
    return -F.cross_entropy(input.movedim(-1, 1), target, reduction="none")


def test_value_and_gradient_are_those_of_cross_entropy(logits):
    input, target = logits
    mine, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    weight = torch.linspace(0.1, 2, 20, dtype=torch.float64).view(4, 5)
    torch.testing.assert_close(log_prob(mine, target), reference(theirs, target), rtol=1e-12, atol=1e-12)
    (log_prob(mine, target) * weight).sum().backward()
    (reference(theirs, target) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


PER_SAMPLE = torch.linspace(0.5, 1.5, 20, dtype=torch.float64).view(4, 5)


@pytest.mark.parametrize("temperature", [0.3, torch.tensor(2.0, dtype=torch.float64), PER_SAMPLE])
@pytest.mark.parametrize("margin", [0.0, -0.5, torch.tensor(1.5, dtype=torch.float64), PER_SAMPLE])
def test_temperature_divides_the_logits_and_the_margin_comes_off_the_true_one(logits, temperature, margin):
    input, target = logits
    by, off = (torch.as_tensor(v, dtype=torch.float64).expand(4, 5).unsqueeze(-1) for v in (temperature, margin))
    expected = reference(input / by - off * F.one_hot(target, 7), target)
    got = log_prob(input, target, temperature=temperature, margin=margin)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_derivatives_by_logits_temperature_and_margin(logits, shape):
    input, target = logits[0][0, :3].clone(), logits[1][0, :3]
    leaves = (input, torch.full(shape, 0.7, dtype=torch.float64), torch.full(shape, 0.4, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()

    def call(input, temperature, margin):
        return log_prob(input, target, temperature=temperature, margin=margin)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_second_derivatives(logits):
    input, target = logits[0][0, :3].clone().requires_grad_(), logits[1][0, :3]
    assert torch.autograd.gradgradcheck(lambda z: log_prob(z, target).expm1() ** 2, (input,))


def test_a_backward_can_be_repeated(logits):
    input = logits[0].clone().requires_grad_()
    total = log_prob(input, logits[1]).sum()
    total.backward(retain_graph=True)
    once = input.grad.clone()
    total.backward()
    torch.testing.assert_close(input.grad, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_underflowing_probability_keeps_its_logarithm(dtype):
    input = torch.tensor([[2e4, 0.0, 1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    expected = torch.tensor([-2e4, -1.0986], dtype=dtype)
    torch.testing.assert_close(
        log_prob(input, torch.tensor([1, 2])), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
    )


def test_it_batches_under_vmap_and_differentiates_under_func(logits):
    input, target = logits
    torch.testing.assert_close(torch.vmap(log_prob)(input, target), log_prob(input, target), rtol=1e-12, atol=1e-12)
    per_replica = torch.vmap(torch.func.grad(lambda z, y: log_prob(z, y).sum()))(input, target)
    expected = F.one_hot(target, 7) - torch.softmax(input, -1)
    torch.testing.assert_close(per_replica, expected, rtol=1e-12, atol=1e-12)


def test_vmap_over_the_target_alone(logits):
    input, target = logits[0][0], logits[1]

    def slope(labels):
        return torch.func.grad(lambda z: log_prob(z, labels, temperature=0.5, margin=0.2).sum())(input)

    torch.testing.assert_close(torch.vmap(slope)(target), torch.stack([slope(labels) for labels in target]))


def test_bad_arguments_are_named():
    good = torch.zeros(3, 4)
    for name, input, target in [
        ("input", good.long(), torch.zeros(3, dtype=torch.long)),
        ("input", good[:, :1], torch.zeros(3, dtype=torch.long)),
        ("target", good, torch.zeros(2, dtype=torch.long)),
        ("target", good, torch.zeros(3)),
        ("target", good, [0, 1, 2]),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            log_prob(input, target)
    for name, value in (("temperature", 0.0), ("temperature", float("nan")), ("margin", float("inf"))):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            log_prob(good, torch.zeros(3, dtype=torch.long), **{name: value})
