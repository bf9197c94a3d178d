"""VAT against the eigenvectors of the Fisher information, formed densely, and against closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from lossary.losses import VATLoss, conditional_entropy_loss, vat_loss, virtual_adversarial_direction
from lossary.tasks import Seeds, stacked_mlp


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()


@pytest.fixture
def x():
    return torch.randn(7, 5, generator=seeded(1), dtype=torch.float64)


def fisher(model, x):
    """J^T (diag p - p p^T) J of each input, (batch, d, d)."""
    jacobian = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
    p = model(x).detach().softmax(-1)
    return jacobian.mT @ (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) @ jacobian


def test_power_iteration_ends_at_the_top_eigenvector_of_the_fisher_information(model, x):
    top = torch.linalg.eigh(fisher(model, x)).eigenvectors[..., -1]
    found = virtual_adversarial_direction(model, x, generator=seeded(0), xi=1e-5, steps=300)
    assert ((found * top).sum(-1).abs() > 1 - 1e-5).all()


def test_one_step_multiplies_the_noise_by_the_fisher_information(model, x):
    noise = torch.randn(7, 5, generator=seeded(3)).double()
    expected = nn.functional.normalize((fisher(model, x) @ noise.unsqueeze(-1)).squeeze(-1), dim=-1)
    found = virtual_adversarial_direction(model, x, generator=seeded(3), xi=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    none = virtual_adversarial_direction(model, x, generator=seeded(3), steps=0)
    torch.testing.assert_close(none, nn.functional.normalize(noise, dim=-1))


def test_a_small_step_costs_half_the_top_eigenvalue_times_its_square(model, x):
    top = torch.linalg.eigvalsh(fisher(model, x))[..., -1]
    value = vat_loss(model, x, epsilon=1e-3, generator=seeded(0), xi=1e-5, steps=300)
    torch.testing.assert_close(value, 0.5e-6 * top, rtol=1e-3, atol=0)


def test_value_and_gradient_are_torchs_divergence_at_the_step(model, x):
    step = 0.7 * virtual_adversarial_direction(model, x, generator=seeded(2))
    expected = nn.functional.kl_div(
        model(x + step).log_softmax(-1), model(x).detach().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    slopes = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for logits in (None, model(x)):
        value = vat_loss(model, x, epsilon=0.7, generator=seeded(2), logits=logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), list(model.parameters())), slopes)
    mean = VATLoss(epsilon=0.7, generator=seeded(2))(model, x)
    torch.testing.assert_close(mean, expected.mean())


def test_in_single_precision_the_default_finds_the_direction_and_the_papers_xi_does_not(model, x):
    exact = virtual_adversarial_direction(model, x, generator=seeded(0), xi=1e-5)
    single = copy.deepcopy(model).float()
    for xi, least in ((0.1, 0.99), (1e-6, -1.0)):
        found = virtual_adversarial_direction(single, x.float(), generator=seeded(0), xi=xi)
        assert found.dtype == torch.float32
        cosine = (found * exact).sum(-1)
        assert cosine.min() > least
    assert cosine.min() < 0.9


def test_a_stack_of_models_is_each_model_alone():
    seeds = Seeds((3, 5))
    stack = stacked_mlp((4, 8, 3), seeds)
    x = torch.randn(2, 6, 4, generator=seeded(0))
    together = vat_loss(stack, x, epsilon=1.0, generator=[seeded(7), seeded(8)])
    for s in range(2):
        alone = vat_loss(stack.replica(s), x[s], epsilon=1.0, generator=seeded(7 + s))
        torch.testing.assert_close(together[s], alone)
    for reduction in ("mean", "sum"):
        each = VATLoss(epsilon=1.0, generator=[seeded(7), seeded(8)], reduction=reduction)(stack, x)
        torch.testing.assert_close(each, getattr(together, reduction)(-1))
    torch.testing.assert_close(
        VATLoss(epsilon=1.0)(stack.replica(0), x[0]),
        vat_loss(stack.replica(0), x[0], epsilon=1.0, generator=seeded(0)).mean(),
    )


def test_images_have_one_direction_each_of_length_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    found = virtual_adversarial_direction(model, torch.zeros(2, 3, 4, 4), generator=seeded(0))
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_statistics_mode_and_gradients(training):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train(training)
    model[1].running_mean.fill_(2.0)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(6, 5, generator=seeded(0))
    with torch.no_grad():
        value = vat_loss(model, x, epsilon=1.0, generator=seeded(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert model[1].track_running_stats
    assert all(weight.grad is None for weight in model.parameters())
    # Batches are normalised as in any other pass of the mode that the model is in.
    torch.testing.assert_close(vat_loss(model, x, epsilon=1.0, generator=seeded(0), logits=model(x)), value)
    after = model[1].num_batches_tracked
    assert after == training, "what the caller runs itself does count"


def test_statistics_count_again_after_a_model_that_fails():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 2))
    with pytest.raises(RuntimeError):
        vat_loss(model, torch.zeros(3, 5), epsilon=1.0, generator=seeded(0))
    assert model[0].track_running_stats


def test_a_model_that_does_not_change_has_no_direction_and_no_loss():
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    x = torch.ones(2, 5)
    assert not virtual_adversarial_direction(model, x, generator=seeded(0)).any()
    assert not vat_loss(model, x, epsilon=1.0, generator=seeded(0)).any()


def test_half_precision_and_sure_predictions_stay_finite():
    model = nn.Linear(5, 3).bfloat16()
    value = vat_loss(model, torch.ones(2, 5).bfloat16(), epsilon=1.0, generator=seeded(0))
    assert value.dtype == torch.bfloat16
    assert value.isfinite().all()
    sure = nn.Linear(5, 3)
    nn.init.constant_(sure.weight, 1e4)
    nn.init.zeros_(sure.weight[0])
    value = vat_loss(sure, torch.randn(4, 5, generator=seeded(0)), epsilon=1.0, generator=seeded(0))
    assert value.isfinite().all()


def test_entropy_is_scipys_and_its_gradient_too():
    from scipy.stats import entropy

    z = torch.randn(5, 4, generator=seeded(0), dtype=torch.float64).mul(3).requires_grad_()
    expected = entropy(z.detach().softmax(-1).numpy(), axis=-1)
    assert conditional_entropy_loss(z).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert torch.autograd.gradcheck(conditional_entropy_loss, (z,))
    far = torch.tensor([[1e4, -1e4]], requires_grad=True)
    (slope,) = torch.autograd.grad(conditional_entropy_loss(far).sum(), far)
    assert slope.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -1.0}, "epsilon: expected a number >= 0"),
        ({"epsilon": torch.tensor(1.0)}, "epsilon: expected a number, got a tensor"),
        ({"xi": 0.0}, "xi: expected a number > 0"),
        ({"xi": math.nan}, "xi: expected a finite number"),
        ({"steps": -1}, "steps: expected a whole number >= 0"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "x: expected a floating-point tensor"),
        ({"logits": torch.zeros(3, 3)}, r"logits: expected one row for each input of x \(2, 5\)"),
        ({"generator": [seeded(0)]}, "generator: expected one for each of 2 replicas, got 1"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(2, 5), "epsilon": 1.0, "generator": seeded(0)} | change
    with pytest.raises(ValueError, match=message):
        vat_loss(nn.Linear(5, 3), arguments.pop("x"), **arguments)
