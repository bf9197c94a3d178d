"""Binding by direct sums, what projection promises, and that the loss is regression to fixed random unit codes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lossary.losses import HRRClassificationLoss, hrr_bind, hrr_project, hrr_unbind


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def criterion(classes=6, dim=64):
    return HRRClassificationLoss(classes, dim=dim, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("dim", [7, 8])
def test_binding_and_unbinding_by_direct_sums(dim):
    x, y = normal(2, dim).numpy()
    convolved = [sum(x[j] * y[(k - j) % dim] for j in range(dim)) for k in range(dim)]
    involution = np.roll(y[::-1], 1)  # the official code's inverse of a key
    correlated = [sum(x[j] * involution[(k - j) % dim] for j in range(dim)) for k in range(dim)]
    pair = normal(2, dim)
    bound, unbound = hrr_bind(*pair), hrr_unbind(*pair)
    torch.testing.assert_close(bound, torch.tensor(convolved), rtol=0, atol=1e-13)
    torch.testing.assert_close(unbound, torch.tensor(correlated), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dim", [7, 8])
def test_projection_has_unit_spectrum_and_keeps_the_phases(dim):
    before, after = np.fft.fft(normal(dim).numpy()), np.fft.fft(hrr_project(normal(dim)).numpy())
    assert np.abs(after) == pytest.approx(np.ones(dim), abs=1e-13)
    assert np.angle(after) == pytest.approx(np.angle(before), abs=1e-12)


def test_projected_keys_unbind_exactly_and_others_do_not():
    value, key = normal(2, 64)
    exact = hrr_unbind(hrr_bind(value, hrr_project(key)), hrr_project(key))
    torch.testing.assert_close(exact, value, rtol=0, atol=1e-13)
    assert (hrr_unbind(hrr_bind(value, key), key) / key.square().sum() - value).abs().max() > 0.1


def test_codes_are_unit_vectors_bound_from_their_keys_and_values():
    loss = HRRClassificationLoss(6, dim=64, generator=torch.Generator().manual_seed(3))
    spectra = [np.fft.fft(part.double().numpy()) for part in (loss.key, loss.value, loss.code)]
    assert spectra[0] * spectra[1] == pytest.approx(spectra[2], abs=1e-5)
    assert np.abs(spectra[0]) == pytest.approx(np.ones((6, 64)), abs=1e-5)
    assert loss.code.norm(dim=1).numpy() == pytest.approx(np.ones(6), abs=1e-6)


def test_prediction_is_the_nearest_fixed_code_by_cosine():
    """The identity behind the loss: unbinding with unitary keys turns all codes and outputs alike."""
    loss, s = criterion(), normal(200, 64, seed=1).tanh()
    loss.key.copy_(hrr_project(loss.key))  # in double precision
    loss.code.copy_(hrr_bind(loss.key, loss.value))
    cosines = F.normalize(s, dim=1) @ F.normalize(loss.code, dim=1).T
    torch.testing.assert_close(loss.scores(s), cosines, rtol=0, atol=1e-12)
    assert torch.equal(loss.predict(s), cosines.argmax(1))
    loss.key.copy_(normal(6, 64, seed=2) / 8)  # not unitary
    loss.code.copy_(hrr_bind(loss.key, loss.value))
    plain = F.normalize(s, dim=1) @ F.normalize(loss.code, dim=1).T
    assert (loss.scores(s) - plain).abs().max() > 0.05


def test_loss_and_gradient_are_those_of_regression_to_the_codes():
    loss, s, y = criterion(), normal(5, 64, seed=1).requires_grad_(), torch.tensor([0, 5, 2, 2, 1])
    gaps = [sum((a - b) ** 2 for a, b in zip(s[i].tolist(), loss.code[y[i]].tolist())) for i in range(5)]
    assert loss(s, y).tolist() == pytest.approx([gap**0.5 for gap in gaps], abs=1e-12)
    whole = loss.batch_norm(s, y)
    assert whole.item() == pytest.approx(sum(gaps) ** 0.5, abs=1e-12)
    (slope,) = torch.autograd.grad(whole, s)
    torch.testing.assert_close(slope, ((s - loss.code[y]) / whole).detach(), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: loss(s, y), (s,))


def test_a_stack_of_batches_and_half_precision():
    loss, s, y = criterion(), normal(3, 4, 64, seed=1), torch.arange(12).view(3, 4) % 6
    torch.testing.assert_close(loss(s, y)[1], loss(s[1], y[1]))
    assert loss(s.bfloat16(), y).isfinite().all()


def test_state_and_generator_decide_the_codes():
    first, second = (HRRClassificationLoss(4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert not torch.equal(first.code, second.code)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.code, second.code)


def test_refusals():
    loss = criterion()
    with pytest.raises(ValueError, match="input: expected 64 outputs last"):
        loss(normal(5, 6), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="target: expected shape"):
        loss(normal(5, 64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="y: expected last dimension 4"):
        hrr_bind(normal(4), normal(5))
    with pytest.raises(ValueError, match="num_classes: expected"):
        HRRClassificationLoss(1, generator=torch.Generator())
