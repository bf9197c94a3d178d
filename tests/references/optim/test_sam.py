"""SAM against its closed form on a quadratic, worked out in numpy, and against a peer library."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lossary.optim import SAM, sam_perturbation

CURVATURE = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]])
START = np.array([3.0, -2.0, 1.0])


def train(optimizer, loss, steps):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def quadratic(w):
    return 0.5 * w @ torch.from_numpy(CURVATURE) @ w


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_quadratic_follows_its_closed_form_under_momentum_and_weight_decay(adaptive):
    lr, momentum, decay, rho = 0.1, 0.8, 0.05, 0.3
    w, velocity = START.copy(), np.zeros(3)
    for _ in range(20):
        unit = np.abs(w) if adaptive else np.ones(3)
        g = CURVATURE @ w
        uphill = w + rho * unit**2 * g / np.linalg.norm(unit * g)
        velocity = momentum * velocity + CURVATURE @ uphill + decay * w
        w = w - lr * velocity

    got = nn.Parameter(torch.from_numpy(START.copy()))
    sam = SAM([got], torch.optim.SGD, rho=rho, adaptive=adaptive, lr=lr, momentum=momentum, weight_decay=decay)
    losses = train(sam, lambda: quadratic(got), 20)
    np.testing.assert_allclose(got.detach().numpy(), w, rtol=1e-10)
    assert losses[0] == pytest.approx(0.5 * START @ CURVATURE @ START)


def test_each_group_has_its_own_rho_within_one_norm():
    near, far = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    sam = SAM([{"params": [near]}, {"params": [far], "rho": 1.0}], rho=0.5, lr=0.0)
    (0.5 * near**2 + 0.5 * far**2).sum().backward()  # a gradient of (3, 4), norm 5
    sam.first_step()
    assert near.item() == pytest.approx(3 + 0.5 * 3 / 5)
    assert far.item() == pytest.approx(4 + 1.0 * 4 / 5)
    sam.second_step()
    assert (near.item(), far.item()) == (3.0, 4.0)


def test_rho_zero_is_the_base_optimizer():
    got, expected = (nn.Parameter(torch.from_numpy(START.copy())) for _ in range(2))
    train(SAM([got], torch.optim.AdamW, rho=0.0, lr=0.1), lambda: quadratic(got), 10)
    train(torch.optim.AdamW([expected], lr=0.1), lambda: quadratic(expected), 10)
    assert torch.equal(got, expected)


def test_the_perturbation_of_one_replica_ignores_the_others():
    w = [torch.tensor([[1.0, 2.0], [0.5, 1.0], [9.0, 9.0]]), torch.tensor([2.0, 1.0, 9.0])]
    g = [torch.tensor([[3.0, 0.0], [0.0, 0.6], [0.0, 0.0]]), torch.tensor([4.0, 0.8, 0.0])]
    weight, bias = sam_perturbation(w, g, rho=10.0, replicas=True)  # norms 5, 1 and 0
    torch.testing.assert_close(weight, torch.tensor([[6.0, 0.0], [0.0, 6.0], [0.0, 0.0]]))
    torch.testing.assert_close(bias, torch.tensor([8.0, 8.0, 0.0]))
    weight, bias = sam_perturbation(w, g, rho=10.0, adaptive=True, replicas=True)
    norm = math.hypot(1 * 3, 2 * 4)  # of the first replica's w g; the second's is 1
    torch.testing.assert_close(weight, torch.tensor([[10 * 1 * 3 / norm, 0.0], [0.0, 6.0], [0.0, 0.0]]))
    torch.testing.assert_close(bias, torch.tensor([10 * 4 * 4 / norm, 8.0, 0.0]))


def test_half_precision_gradients_do_not_overflow_in_the_norm():
    (e,) = sam_perturbation(
        [torch.zeros(4, dtype=torch.float16)], [torch.full((4,), 6e4, dtype=torch.float16)], rho=1.0
    )
    torch.testing.assert_close(e, torch.full((4,), 0.5, dtype=torch.float16))


def test_running_statistics_see_the_first_evaluation_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    plain = copy.deepcopy(model)
    x = torch.randn(8, 2)
    plain(x)
    train(SAM(model.parameters(), model=model, rho=1.0, lr=0.1), lambda: model(x).square().mean(), 1)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[0], name), getattr(plain[0], name)), name
    assert model[0].track_running_stats


def test_a_closure_that_fails_uphill_leaves_the_weights_where_they_were():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    sam = SAM([w], rho=0.5, lr=0.1)

    def closure():
        if w[0] > 3:
            raise MemoryError
        (0.5 * w.square().sum()).backward()
        return 0.0

    with pytest.raises(MemoryError):
        sam.step(closure)
    assert w.tolist() == [3.0, 4.0]


def test_a_copy_goes_on_as_the_original():
    w = nn.Parameter(torch.from_numpy(START.copy()))
    sam = SAM([w], torch.optim.Adam, rho=0.3, lr=0.1)
    train(sam, lambda: quadratic(w), 3)
    twin = copy.deepcopy(sam)
    (v,) = twin.param_groups[0]["params"]
    train(sam, lambda: quadratic(w), 3)
    train(twin, lambda: quadratic(v), 3)
    assert torch.equal(v, w)
    assert not torch.equal(w, torch.from_numpy(START))


def test_misuse_is_refused():
    w = nn.Parameter(torch.tensor([3.0]))
    sam = SAM([w], lr=0.1)
    with pytest.raises(ValueError, match="closure: expected a function"):
        sam.step()
    w.sum().backward()
    sam.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        sam.first_step()
    with pytest.raises(ValueError, match="rho: expected a number >= 0"):
        SAM([{"params": [w], "rho": -0.1}])
    with pytest.raises(ValueError, match="grads: expected the shapes"):
        sam_perturbation([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="params: expected one leading dimension"):
        sam_perturbation([torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(3)], replicas=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_pytorch_optimizer():
    peer = pytest.importorskip("pytorch_optimizer").SAM
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    options = {"rho": 0.2, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    train(SAM(model.parameters(), torch.optim.SGD, **options), lambda: nn.functional.cross_entropy(model(x), y), 5)
    theirs = peer(twin.parameters(), torch.optim.SGD, **options)

    def closure():
        theirs.zero_grad()
        loss = nn.functional.cross_entropy(twin(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        closure()
        theirs.step(closure)
    for ours, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
