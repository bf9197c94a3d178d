"""The engine of the sigmoid losses: against binary cross-entropy, the formula written out, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.losses import _sigmoid
from lossary.losses._sigmoid import binary_losses

G = torch.Generator().manual_seed(0)
PER_LABEL = torch.tensor([1.0, 2.5, 3.0, 1.5, 2.0], dtype=torch.float64)
WEIGHT = torch.rand(4, 5, generator=G, dtype=torch.float64)
SETTINGS = [
    {},
    {"margin": 0.2},
    {"positive": 1.0, "negative": 4.0, "margin": 0.05},
    {"positive": 2.0, "negative": 2.0, "weight": WEIGHT},
    {"positive": 3.0, "negative": 2.5, "negative_weight": 0.3, "weight": PER_LABEL},
    {"positive": PER_LABEL, "negative": PER_LABEL.flip(0), "margin": 0.1},
    {"positive": 2.0, "negative": 3.0, "frozen": True, "weight": PER_LABEL},
]


def batch(*lead: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    input = scale * torch.randn(*lead, 5, generator=g, dtype=torch.float64)
    return input.requires_grad_(), (torch.rand(*lead, 5, generator=g) < 0.4).double()


def by_hand(input: Tensor, target: Tensor, **setting) -> Tensor:
    """One number after another, in Python."""

    def at(value: float | Tensor | None, row: int, label: int) -> float:
        if isinstance(value, Tensor):
            return value.expand(input.shape)[row, label].item()
        return 1.0 if value is None else value

    rows = []
    for i, (z_row, y_row) in enumerate(zip(input.tolist(), target.tolist())):
        total = 0.0
        for c, (z, y) in enumerate(zip(z_row, y_row)):
            p = 1 / (1 + math.exp(-z))
            if y == 1:
                term = (1 - p) ** at(setting.get("positive", 0.0), i, c) * -math.log(p)
            else:
                shifted = max(p - setting.get("margin", 0.0), 0.0)
                term = shifted ** at(setting.get("negative", 0.0), i, c) * -math.log(1 - shifted)
                term *= setting.get("negative_weight", 1.0)
            total += at(setting.get("weight"), i, c) * term
        rows.append(total)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("setting", SETTINGS)
def test_is_the_formula(setting: dict) -> None:
    input, target = batch(4)
    torch.testing.assert_close(binary_losses(input, target, **setting), by_hand(input, target, **setting))


@pytest.mark.parametrize("setting", SETTINGS[:-1])
def test_gradients(setting: dict) -> None:
    input, target = batch(4)
    torch.autograd.gradcheck(lambda z: binary_losses(z, target, **setting), (input,))
    torch.autograd.gradgradcheck(lambda z: binary_losses(z, target, **setting), (input,))


def test_a_frozen_focus_passes_no_gradient() -> None:
    input, target = batch(4)
    (grad,) = torch.autograd.grad(binary_losses(input, target, positive=2.0, negative=2.0, frozen=True).sum(), input)
    wrong = (input.detach().sigmoid() - target).abs()  # 1 - q
    torch.testing.assert_close(grad, wrong**2 * (input.detach().sigmoid() - target))
    torch.autograd.gradgradcheck(lambda z: binary_losses(z, target, positive=2.0, negative=2.0), (input,))


def test_is_binary_cross_entropy_also_at_the_ends() -> None:
    input = torch.tensor([[-1e4, 1e4, -95.0, 95.0], [-1e4, 1e4, -95.0, 95.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    value = binary_losses(input, target)
    expected = F.binary_cross_entropy_with_logits(input, target, reduction="none").sum(-1)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(v.sum(), input)[0] for v in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_margin_leaves_positives_exact_and_bounds_negatives() -> None:
    input = torch.tensor([[-20.0, -1e4, 200.0, 1e4]]).requires_grad_()
    target = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    value = binary_losses(input, target, negative=0.0, margin=0.05)
    assert value.item() == pytest.approx(20 + 1e4 - 2 * math.log(0.05))
    (grad,) = torch.autograd.grad(value.sum(), input)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, -1.0, 0.0, 0.0]]), atol=1e-6, rtol=0)


def test_half_precision_at_the_ends() -> None:
    input = torch.tensor([[-50.0, 50.0, -9.0, 9.0]], dtype=torch.float16, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float16)
    value = binary_losses(input, target)
    (grad,) = torch.autograd.grad(value.sum(), input)
    assert value.item() == pytest.approx(118, rel=1e-3)
    torch.testing.assert_close(grad.float(), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), atol=2e-3, rtol=0)


def test_a_margin_leaves_positives_exact_in_half_precision() -> None:
    input = torch.tensor([[-9.0], [-50.0]], dtype=torch.float16, requires_grad=True)
    value = binary_losses(input, torch.ones_like(input), margin=0.05)
    (grad,) = torch.autograd.grad(value.sum(), input)
    assert value.tolist() == pytest.approx([9, 50], rel=1e-3)  # log(1 + e^9) and log(1 + e^50)
    assert grad.flatten().tolist() == pytest.approx([-1, -1], abs=2e-3)


def test_below_the_margin_there_is_nothing() -> None:
    input = torch.logit(torch.tensor([[0.049, 0.051]], dtype=torch.float64)).requires_grad_()
    for exponent in (0.0, 1.0, 4.0, torch.zeros(2, dtype=torch.float64)):
        value = binary_losses(input, torch.zeros(1, 2, dtype=torch.float64), negative=exponent, margin=0.05)
        (grad,) = torch.autograd.grad(value.sum(), input)
        assert grad[0, 0] == 0
        assert grad[0, 1] > 0


def test_chunks_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    input, target = batch(3, 7)
    whole = binary_losses(input, target, positive=1.0, negative=4.0, margin=0.05, weight=PER_LABEL)
    monkeypatch.setattr(_sigmoid, "CELLS", 10)  # two rows at a time, the last one alone
    parts = binary_losses(input, target, positive=1.0, negative=4.0, margin=0.05, weight=PER_LABEL)
    assert torch.equal(whole, parts)
    assert binary_losses(input[:0], target[:0]).shape == (0, 7)


def test_maps_and_compiles_as_it_runs() -> None:
    input, target = batch(3, 7)
    setting = {"positive": 1.0, "negative": 4.0, "margin": 0.05}
    loss = lambda z, y: binary_losses(z, y, **setting).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(loss(input, target), input)
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(1, 1), out_dims=1)(input.detach(), target)
    torch.testing.assert_close(mapped, expected)
    alone = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(input.detach(), target[0])
    torch.testing.assert_close(alone[0], expected[0])
    compiled = torch.compile(lambda z, y: binary_losses(z, y, **setting), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input, target), binary_losses(input, target, **setting))


@pytest.mark.parametrize(
    ("named", "setting"),
    [
        ("positive", {"positive": 0.5}),
        ("negative", {"negative": -1.0}),
        ("margin", {"margin": 1.0}),
        ("negative_weight", {"negative_weight": -0.1}),
        ("weight", {"weight": torch.ones(5, requires_grad=True)}),
    ],
)
def test_refusals(named: str, setting: dict) -> None:
    with pytest.raises(ValueError, match=named):
        binary_losses(*batch(4), **setting)
