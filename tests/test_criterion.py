"""`Criterion` against `F.cross_entropy`, whose conventions it shares."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.criterion import Criterion
from lossary.losses import comp_sum_loss, ldr_kl_loss, poly1_cross_entropy


def data(*shape: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with classes last and class numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, classes, generator=generator), torch.randint(classes, shape, generator=generator)


class PerSample(nn.Module):
    """A loss with a state for every sample, as a class: counts the visits and scales by them."""

    def __init__(self, *, num_samples: int) -> None:
        super().__init__()
        self.register_buffer("visits", torch.zeros(num_samples))

    def forward(self, input, target, index):
        self.visits[index] += 1
        return self.visits[index] * F.cross_entropy(input, target, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_cross_entropy(reduction):
    input, target = data(6)
    criterion = Criterion(comp_sum_loss, tau=1.0, reduction=reduction)
    torch.testing.assert_close(criterion(input, target), F.cross_entropy(input, target, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_images_with_classes_in_the_second_dimension(reduction):
    input, target = data(2, 3, 4)
    images = input.movedim(-1, 1).contiguous().requires_grad_()
    criterion = Criterion(comp_sum_loss, tau=1.0, class_dim=1, reduction=reduction)
    got, expected = criterion(images, target), F.cross_entropy(images, target, reduction=reduction)
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad(value.sum(), images)[0] for value in (got, expected)]
    torch.testing.assert_close(*slopes)


def test_hyper_parameters_reach_the_loss():
    input, target = data(6)
    got = Criterion(poly1_cross_entropy, epsilon=2.0, reduction="none")(input, target)
    torch.testing.assert_close(got, poly1_cross_entropy(input, target, epsilon=2.0))


def test_weights_multiply_and_do_not_enter_the_divisor():
    input, target = data(6)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0])
    criterion = Criterion(comp_sum_loss, tau=1.0, weighting=lambda losses, *, target: weight[target])
    expected = F.cross_entropy(input, target, weight=weight, reduction="sum") / 6
    torch.testing.assert_close(criterion(input, target), expected)


def test_weighting_sees_values_without_a_graph_and_only_what_it_names():
    input, target = data(6)
    input.requires_grad_()
    seen = {}

    def halve(losses, *, index):
        seen.update(losses=losses, index=index)
        return torch.full_like(losses, 0.5)

    index = torch.arange(6)
    value = Criterion(comp_sum_loss, weighting=halve)(input, target, index=index, group=index)
    assert not seen["losses"].requires_grad
    assert seen["index"] is index
    torch.testing.assert_close(value, comp_sum_loss(input, target).mean() / 2)
    assert value.requires_grad


def test_a_loss_with_a_state_is_a_part_of_the_criterion():
    input, target = data(3)
    criterion = Criterion(PerSample, num_samples=10, reduction="none")
    index = torch.tensor([7, 2, 0])
    criterion(input, target, index=index)
    twice = criterion(input, target, index=index)
    torch.testing.assert_close(twice, 2 * F.cross_entropy(input, target, reduction="none"))
    assert criterion.state_dict()["loss.visits"].tolist() == [2, 0, 2, 0, 0, 0, 0, 2, 0, 0]
    ready = Criterion(PerSample(num_samples=10), reduction="none")
    torch.testing.assert_close(ready(input, target, index=index), twice / 2)


def test_losses_on_numbers_need_no_class_dimension():
    def absolute(input, target):
        return (input - target).abs()

    input, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    assert Criterion(absolute, class_dim=None, check=True)(input, target).item() == 2.0


@pytest.mark.parametrize(
    ("logit", "label", "message"),
    [
        (float("nan"), 0, "input: contains NaN or infinite values"),
        (float("inf"), 0, "input: contains NaN or infinite values"),
        (0.0, 5, "target: expected class numbers from 0 to 4, got 0 to 5"),
        (0.0, -1, "target: expected class numbers from 0 to 4, got -1 to 0"),
    ],
)
def test_check_refuses_bad_values(logit, label, message):
    input, target = torch.zeros(2, 5), torch.tensor([0, label])
    input[1, 3] = logit
    with pytest.raises(ValueError, match=message):
        Criterion(comp_sum_loss, check=True)(input, target)


def test_check_refuses_targets_that_are_not_finite():
    with pytest.raises(ValueError, match="target: contains NaN"):
        Criterion(lambda input, target: input - target, class_dim=None, check=True)(
            torch.zeros(2), torch.tensor([0.0, float("nan")])
        )


def test_check_lets_good_values_pass():
    input, target = data(2, 3)
    assert Criterion(comp_sum_loss, class_dim=1, check=True)(input.movedim(-1, 1), target).isfinite()


def test_refusals():
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'average'"):
        Criterion(comp_sum_loss, reduction="average")
    with pytest.raises(ValueError, match="epsilon: comp_sum_loss takes tau"):
        Criterion(comp_sum_loss, epsilon=1.0)
    with pytest.raises(ValueError, match="samples: PerSample takes num_samples"):
        Criterion(PerSample, samples=3)


def test_repr_names_loss_settings_and_reduction():
    assert repr(Criterion(ldr_kl_loss, lam=0.5)) == "Criterion(ldr_kl_loss, lam=0.5, reduction='mean')"
    module = repr(Criterion(PerSample, num_samples=3, reduction="sum"))
    assert module.splitlines()[1].strip() == "PerSample, reduction='sum'"


def test_every_argument_of_the_constructor_is_explained():
    missing = [name for name in inspect.signature(Criterion).parameters if name not in Criterion.__doc__]
    assert not missing
