"""RIDE's loss, gates and routing against the official code's numbers, and against slow loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.weighting import ExpertRouter, MultiExpertHead, ride_loss, router_loss

Z = torch.tensor(
    [
        [[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 3.0, -1.0], [2.0, 2.0, -1.0, 0.5]],
        [[-1.0, 0.0, 1.0, 2.0], [0.5, -0.5, 1.5, 0.0], [4.0, 0.0, 0.0, 1.0]],
    ]
)
Y = torch.tensor([2, 0])
COUNTS = (100, 40, 9, 2)


def wave(*shape, step):
    return torch.sin(torch.arange(math.prod(shape)) * step).reshape(shape)


@pytest.mark.parametrize(
    ("gamma", "values", "slope"),
    [
        (0.0, [6.515076637, 5.267180443], [0.2790, 0.0529, -0.4299, 0.0979]),
        (0.05, [6.512657642, 5.348759174], [0.2819, 0.0504, -0.4283, 0.0975]),
    ],
)
def test_values_and_gradients_are_the_official_codes(gamma, values, slope):
    """RIDELoss of frank-xwang/RIDE-LongTailRecognition with LDAM, factor -0.45, s 3, before and after re-weighting."""
    z = Z.clone().requires_grad_()
    got = ride_loss(z, Y, class_counts=COUNTS, diversity=0.45, gamma=gamma, scale=3.0)
    got.mean().backward()
    assert got.tolist() == pytest.approx(values, abs=1e-5)
    assert z.grad[0, 0].tolist() == pytest.approx(slope, abs=5e-5)


def slow(z, y, counts, *, diversity, gamma, temperature, max_margin, scale, against):
    """One sample, with the definitions read aloud."""
    counts = [max(1, n) for n in counts]
    margins = [n**-0.25 / min(counts) ** -0.25 * max_margin for n in counts]
    shares = [gamma * n / (sum(counts) / len(counts)) + 1 - gamma for n in counts]
    heat = [temperature * share / max(shares) for share in shares]

    def softmax(values):
        return [math.exp(v) / math.fsum(map(math.exp, values)) for v in values]

    def kl(p, q):
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q))

    probabilities = [softmax([v / t for v, t in zip(expert, heat)]) for expert in z]
    mean = softmax([sum(column) / len(z) / t for column, t in zip(zip(*z), heat)])
    total = 0.0
    for i, expert in enumerate(z):
        shifted = [v - (scale * margins[c] if c == y else 0.0) for c, v in enumerate(expert)]
        total -= math.log(softmax(shifted)[y])
        apart = kl(mean, probabilities[i])
        if against == "experts":
            others = [kl(probabilities[i], q) for j, q in enumerate(probabilities) if j != i]
            apart = sum(others) / max(1, len(others))
        total -= diversity * (sum(heat) / len(heat)) ** 2 * apart
    return total


@pytest.mark.parametrize("against", ["mean", "experts"])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_values_are_the_definition(against, experts):
    hyper = {"diversity": 0.3, "gamma": 0.4, "temperature": 1.5, "max_margin": 0.6, "scale": 2.0, "against": against}
    counts = (60, 0, 12, 5)
    got = ride_loss(Z[:, :experts].double(), Y, class_counts=counts, **hyper)
    expected = [slow(z[:experts].tolist(), y, counts, **hyper) for z, y in zip(Z, Y.tolist())]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)  # margins and temperatures are single precision


def test_without_diversity_and_margin_it_is_the_sum_of_cross_entropies():
    got = ride_loss(Z, Y, class_counts=COUNTS, diversity=0.0, max_margin=0.0)
    expected = F.cross_entropy(Z.flatten(0, 1), Y.repeat_interleave(3), reduction="none").view(2, 3).sum(1)
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_experts_that_agree_have_nothing_to_gain():
    z = Z[:, :1].expand(-1, 3, -1)
    plain, diverse = (ride_loss(z, Y, class_counts=COUNTS, diversity=weight) for weight in (0.0, 5.0))
    assert torch.allclose(plain, diverse, atol=1e-5)


@pytest.mark.parametrize("against", ["mean", "experts"])
def test_a_stack_of_batches_is_treated_as_one(against):
    stack = torch.stack([Z, Z.flip(1), Z.flip(2)])
    labels = torch.stack([Y, Y.flip(0), Y + 1])
    rows = [ride_loss(z, y, class_counts=COUNTS, against=against) for z, y in zip(stack, labels)]
    assert torch.allclose(ride_loss(stack, labels, class_counts=COUNTS, against=against), torch.stack(rows))


def test_gradients_agree_with_finite_differences_where_nothing_is_held():
    def loss(z):
        return ride_loss(z, Y, class_counts=COUNTS, against="experts", scale=2.0)

    assert torch.autograd.gradcheck(loss, Z.double().requires_grad_())


def test_extreme_logits_stay_finite():
    z = (Z.sign() * 1e4).requires_grad_()
    value = ride_loss(z, Y, class_counts=COUNTS)
    value.sum().backward()
    assert value.isfinite().all()
    assert z.grad.isfinite().all()


def test_the_head_is_a_cosine_for_each_expert():
    head = MultiExpertHead(3, 4, width=2, experts=2, scale=7.0, block=lambda i: nn.Linear(3, 2))
    x = wave(5, 3, step=1.3)
    logits = head(x)
    for i in range(2):
        features, alone = head.expert(x, i)
        cosine = F.cosine_similarity(head.blocks[i](x).unsqueeze(1), head.weight[i].unsqueeze(0), dim=-1)
        assert torch.allclose(logits[:, i], 7.0 * cosine, atol=1e-5)
        assert torch.allclose(alone, 7.0 * cosine, atol=1e-5)
        assert torch.equal(features, head.features(x)[:, i])
    assert head.weight.norm(dim=-1).flatten().tolist() == pytest.approx([1.0] * 8)


class Given:
    """A head whose features and logits are known for every row number."""

    def __init__(self):
        self.features, self.logits = wave(6, 3, 3, step=1.7), 3 * wave(6, 3, 4, step=2.3)

    def expert(self, x, i):
        rows = x[:, 0].long()
        return self.features[rows, i], self.logits[rows, i]


def given_router():
    router = ExpertRouter(3, top=2)
    with torch.no_grad():
        for i, layer in enumerate(router.hidden):
            layer.weight.copy_(wave(16, 3, step=0.9 + i))
            layer.bias.copy_(wave(16, step=0.3 + i))
        router.output.weight.copy_(wave(1, 18, step=0.7))
        router.output.bias.fill_(-0.6)
    return router


def test_the_router_and_its_loss_are_the_official_codes():
    """ResNet_s in ea_resnet_cifar.py on the same features, logits and weights, pos_weight 20."""
    head, router = Given(), given_router()
    gates = router(head.features, head.logits)
    loss = router_loss(gates, head.logits, torch.tensor([0, 1, 2, 3, 0, 1]), pos_weight=20.0)
    assert loss.mean().item() == pytest.approx(2.0170, abs=1e-4)
    logits, used = router.route(head, torch.arange(6.0).unsqueeze(1))
    assert used.tolist() == [1, 1, 1, 3, 1, 3]
    assert logits[3].tolist() == pytest.approx([0.7402, -0.0496, -0.6742, 0.9480], abs=1e-4)
    assert logits[4].tolist() == pytest.approx([-1.2893, -1.1609, 2.8363, -2.6186], abs=1e-4)


@pytest.mark.parametrize(("bias", "lengths"), [(-0.15, {1, 2, 3}), (0.6, {2, 3}), (-9.0, {1}), (9.0, {3})])
def test_routing_runs_what_the_gates_say(bias, lengths):
    head, router = Given(), given_router()
    router.output.bias.data.fill_(bias)
    gates = router(head.features, head.logits) > 0
    expected = [1 + (int(on[0]) and 1 + int(on[1])) for on in gates]
    logits, used = router.route(head, torch.arange(6.0).unsqueeze(1))
    assert used.tolist() == expected
    assert set(expected) == lengths
    for row, n in enumerate(expected):
        assert torch.allclose(logits[row], head.logits[row, :n].mean(0), atol=1e-6)


def test_gates_learn_where_a_longer_row_repairs_an_error():
    """Targets by hand: classes 0 and 1, leads of class 0; right, wrong then right, and wrong to the end."""
    lead = torch.tensor([[1.0, -3.0, 5.0], [-1.0, -1.0, 9.0], [-1.0, 4.0, -9.0], [-1.0, -1.0, 1.0]])
    logits = torch.stack([lead, torch.zeros_like(lead)], dim=-1)
    gates = torch.zeros(4, 2, requires_grad=True)
    router_loss(gates, logits, torch.zeros(4, dtype=torch.int64), pos_weight=3.0).sum().backward()
    on = [[False, True], [True, True], [True, False], [False, False]]
    assert (gates.grad < 0).tolist() == on
    assert gates.grad[1, 0].item() == pytest.approx(-3 * 0.5 / 2)
    assert gates.grad[3, 0].item() == pytest.approx(0.5 / 2)


def test_the_router_leaves_the_experts_alone():
    head, router = MultiExpertHead(3, 6, width=4), ExpertRouter(4)
    features = head.features(wave(5, 3, step=1.1))
    logits = head.classify(features)
    router_loss(router(features, logits), logits, torch.arange(5)).mean().backward()
    assert all(p.grad is None for p in head.parameters())
    assert all(p.grad is not None for p in router.parameters())
    other = ExpertRouter(4)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(features, logits), router(features, logits))


def test_refusals():
    with pytest.raises(ValueError, match=r"gamma: expected a number >= 0 and < 1, got 1\.0"):
        ride_loss(Z, Y, class_counts=COUNTS, gamma=1.0)
    with pytest.raises(ValueError, match="class_counts: expected 4 numbers"):
        ride_loss(Z, Y, class_counts=(1, 2))
    with pytest.raises(ValueError, match=r"target: expected shape \(2,\), got \(2, 3\)"):
        ride_loss(Z, torch.zeros(2, 3, dtype=torch.int64), class_counts=COUNTS)
    with pytest.raises(ValueError, match="diversity: expected a number, got a tensor"):
        ride_loss(Z, Y, class_counts=COUNTS, diversity=torch.tensor(0.2))
    with pytest.raises(ValueError, match="logits: expected at least 5 classes, as top says, got 4"):
        ExpertRouter(3)(torch.zeros(2, 3, 3), Z)
    with pytest.raises(ValueError, match=r"features: expected \(\*batch, 3, ...\), got shape \(2, 2, 3\)"):
        ExpertRouter(3, top=2)(torch.zeros(2, 2, 3), Z)
    with pytest.raises(ValueError, match=r"gates: expected shape \(2, 2\), got \(2, 3\)"):
        router_loss(torch.zeros(2, 3), Z, Y)
