"""GOL against scipy's Gumbel distribution, a formula printed by the authors, and a slow count of what is dropped."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r

from lossary.detection import gumbel_activation, gumbel_binary_cross_entropy, gumbel_optimized_loss

Z = torch.linspace(-3.9, 9.9, 47, dtype=torch.float64)


def test_activation_is_the_gumbel_distribution_function():
    z = torch.linspace(-8, 30, 39, dtype=torch.float64)
    np.testing.assert_allclose(gumbel_activation(z).numpy(), gumbel_r.cdf(z.numpy()), rtol=1e-12)


def test_costs_are_the_logarithms_of_the_distribution_and_of_its_survival():
    z = Z.unsqueeze(1)
    there, absent = (
        gumbel_binary_cross_entropy(z, torch.ones_like(z)),
        gumbel_binary_cross_entropy(z, torch.zeros_like(z)),
    )
    np.testing.assert_allclose(there.numpy(), -gumbel_r.logcdf(Z.numpy()), rtol=1e-12)
    np.testing.assert_allclose(absent.numpy(), -gumbel_r.logsf(Z.numpy()), rtol=1e-9)


def test_the_readme_of_the_authors():
    """kostas1515/GOL: logits cut to -4 and 10, p = 1 / exp(exp(-z)), torch's binary cross-entropy of p."""
    z = 6 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (torch.rand(20, 5, generator=torch.Generator().manual_seed(1)) < 0.3).double()
    p = 1 / torch.exp(torch.exp(-z.clamp(min=-4, max=10)))
    expected = torch.nn.functional.binary_cross_entropy(p, y, reduction="none").sum(1)
    torch.testing.assert_close(gumbel_binary_cross_entropy(z, y), expected)
    assert (z.abs() > 4).any()


def test_gradient_of_a_positive_grows_and_of_a_negative_fades_faster_than_the_sigmoid_s():
    z = Z.clone().unsqueeze(1).requires_grad_()
    (pull,) = torch.autograd.grad(gumbel_binary_cross_entropy(z, torch.ones_like(z)).sum(), z)
    torch.testing.assert_close(pull[:, 0], -torch.exp(-Z))
    (push,) = torch.autograd.grad(gumbel_binary_cross_entropy(z, torch.zeros_like(z)).sum(), z)
    density, survival = gumbel_r.pdf(Z.numpy()), gumbel_r.sf(Z.numpy())
    np.testing.assert_allclose(push[:, 0].numpy(), density / survival, rtol=1e-9)
    low = Z < -1
    assert (push[low, 0] < Z[low].sigmoid()).all()


def test_single_precision_where_the_survival_is_small():
    z = torch.tensor([[9.0]])
    assert gumbel_binary_cross_entropy(z, torch.zeros(1, 1)).item() == pytest.approx(-gumbel_r.logsf(9.0), rel=1e-6)


def test_what_is_dropped():
    """Three objects, one of them rare: a background proposal counts against a rare class with a chance of 1/3."""
    g = torch.Generator().manual_seed(0)
    n, classes = 6000, 4
    rare = torch.tensor([False, False, True, True])
    target = torch.full((n,), classes)
    target[:3] = torch.tensor([0, 1, 2])
    z = torch.randn(n, classes, generator=g, dtype=torch.float64)
    z[3:] = 0.0
    found = gumbel_optimized_loss(z, target, rare, generator=torch.Generator().manual_seed(1))

    def there(v):
        return math.exp(-v)

    def absent(v):
        return -math.log(1 - math.exp(-math.exp(-v)))

    rows = z[:3].tolist()
    expected = [
        there(rows[0][0]) + absent(rows[0][1]),
        absent(rows[1][0]) + there(rows[1][1]),
        absent(rows[2][0]) + absent(rows[2][1]) + there(rows[2][2]),
    ]
    assert found[:3].tolist() == pytest.approx(expected)
    counted = found[3:] / absent(0.0) - 2  # of the two rare classes
    assert set(counted.round(decimals=9).tolist()) == {0.0, 1.0, 2.0}
    share = counted.mean().item() / 2
    assert abs(share - 1 / 3) < 4.5 * math.sqrt(2 / 9 / (2 * (n - 3)))


def test_without_objects_nothing_is_dropped_and_without_rare_classes_either():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ground, rare = torch.full((5,), 3), torch.tensor([True, True, False])
    whole = gumbel_binary_cross_entropy(z, torch.zeros(5, 3))
    torch.testing.assert_close(gumbel_optimized_loss(z, ground, rare), whole)
    target = torch.tensor([0, 1, 2, 3, 3])
    plain = gumbel_binary_cross_entropy(z, torch.nn.functional.one_hot(target, 4)[:, :3].float())
    torch.testing.assert_close(gumbel_optimized_loss(z, target, torch.zeros(3, dtype=torch.bool)), plain)
    assert gumbel_optimized_loss(z[:0], target[:0], rare).shape == (0,)


def test_refusals():
    z, target, rare = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="rare"):
        gumbel_optimized_loss(z, target, rare[:2])
    with pytest.raises(ValueError, match="rare"):
        gumbel_optimized_loss(z, target, rare.float())
    with pytest.raises(ValueError, match="target"):
        gumbel_optimized_loss(z, target[:2], rare)
    with pytest.raises(ValueError, match="input"):
        gumbel_optimized_loss(z[0], target, rare)
