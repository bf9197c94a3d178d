"""Improvable gap balancing against a plain loop over its definition, and against the official code."""

import io
import math

import pytest
import torch
import torch.distributed as dist

from lossary.weighting import ImprovableGapBalancing, ImprovableGapBalancingRL
from tests.processes import in_two

EPOCH = 20


def stream(steps):
    """Losses of three tasks in units 1 : 10 : 100, noisy and falling to a half."""
    g = torch.Generator().manual_seed(7)
    return [
        torch.tensor([1.0, 10.0, 100.0]) * (0.5 + torch.rand(3, generator=g)) * (1 - 0.5 * t / steps)
        for t in range(steps)
    ]


def agent(seed=3, **options):
    return ImprovableGapBalancingRL(3, steps_per_epoch=EPOCH, generator=torch.Generator().manual_seed(seed), **options)


def test_the_first_form_is_its_definition():
    balance, past = ImprovableGapBalancing(3, steps_per_epoch=EPOCH), []
    for t, losses in enumerate(stream(100)):
        weights = [1.0] * 3
        if t >= 2 * EPOCH:
            base = [math.fsum(seen[k] for seen in past[EPOCH : 2 * EPOCH]) / EPOCH for k in range(3)]
            odds = [math.exp(loss / b) for loss, b in zip(losses.tolist(), base)]
            weights = [3 * o / sum(odds) for o in odds]
        expected = [w * math.log(loss) for w, loss in zip(weights, losses.tolist())]
        assert balance(losses).tolist() == pytest.approx(expected, abs=1e-4)
        past.append(losses.tolist())


def test_the_gradient_takes_weights_as_constants_and_is_free_of_units():
    weights = []
    for unit in (1.0, 1000.0):
        balance = ImprovableGapBalancing(2, steps_per_epoch=1, base_epoch=0)
        balance(torch.tensor([4.0, 2.0 * unit]))
        losses = torch.tensor([3.0, 0.5 * unit], requires_grad=True)
        balance(losses).sum().backward()
        weights.append((losses.grad * losses).tolist())
    odds = [math.exp(3 / 4), math.exp(0.5 / 2)]
    assert weights[0] == pytest.approx([2 * o / sum(odds) for o in odds], abs=1e-6)
    assert weights[1] == pytest.approx(weights[0], abs=1e-6)


def test_the_agent_does_what_the_official_code_does():
    """IGB4MTL's ImprovableGapBalancing_v2 from the same initial networks, handed the same random numbers."""
    balance = agent()
    for t, losses in enumerate(stream(220)):
        values = balance(losses)
        if t == 99:
            assert balance.weights.tolist() == pytest.approx([0.3860, 1.0861, 1.5279], abs=1e-4)
    assert balance.weights.tolist() == pytest.approx([2.00528, 0.22331, 0.77141], abs=1e-4)
    assert balance.log_temperature.exp().item() == pytest.approx(0.198655, abs=1e-5)
    assert values.tolist() == pytest.approx((balance.weights * losses.log()).tolist())
    assert balance.remembered == 180  # from step 40 on


def test_the_latest_transitions_are_remembered():
    balance, losses = agent(memory=8), stream(60)
    for values in losses:
        balance(values)
    assert balance.remembered == 20
    latest = balance.memory[(20 - 1) % 8]  # what was weighed at step 58, and came out at 59
    base = torch.stack(losses[EPOCH : 2 * EPOCH]).mean(0)
    assert torch.equal(latest[:3], losses[58])
    assert torch.equal(latest[6:9], losses[59])
    assert latest[9].item() == pytest.approx(((losses[58] - losses[59]) / base).min().item(), abs=1e-5)
    assert sorted(balance.memory[:, 0].tolist()) == sorted(values[0].item() for values in losses[51:59])


@pytest.mark.parametrize("kind", ["gaps", "agent"])
def test_a_run_resumes_from_its_state(kind):
    def fresh():
        return agent() if kind == "agent" else ImprovableGapBalancing(3, steps_per_epoch=EPOCH)

    running, losses = fresh(), stream(140)
    for values in losses[:110]:
        running(values)
    saved = io.BytesIO()
    torch.save(running.state_dict(), saved)
    saved.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    if kind == "agent":
        resumed.generator.set_state(running.generator.get_state())
    for values in losses[110:]:
        assert torch.equal(running(values), resumed(values))


@pytest.mark.parametrize("make", [agent, lambda: ImprovableGapBalancing(3, steps_per_epoch=EPOCH)])
def test_evaluation_records_nothing(make):
    balance, losses = make(), stream(50)
    for values in losses:
        balance(values)
    before = {name: value.clone() for name, value in balance.state_dict().items() if name != "_extra_state"}
    balance.eval()(losses[0])
    assert all(torch.equal(value, before[name]) for name, value in balance.state_dict().items() if name in before)


def test_losses_that_are_zero_or_not_finite():
    balance = ImprovableGapBalancing(2, steps_per_epoch=3, base_epoch=0)
    for losses in ([2.0, 0.0], [torch.inf, 0.0], [4.0, 0.0]):
        values = balance(torch.tensor(losses))
    assert balance.base.tolist() == [3.0, 0.0]  # the infinite step is left out
    losses = torch.tensor([3.0, 0.0], requires_grad=True)
    values = balance(losses)
    values.sum().backward()
    assert values.isfinite().all()
    odds = [math.e, 1.0]  # the second task's gap is 0
    assert losses.grad.tolist() == pytest.approx([2 * math.e / sum(odds) / 3, 0.0])

    learner = agent()
    for t, losses in enumerate(stream(60)):
        learner(losses if t != 50 else losses * torch.inf)
    assert learner.remembered == 18  # of 20, two were next to the infinite step
    assert learner.memory.isfinite().all()


def test_a_gradient_balancer_takes_the_weighted_log_losses():
    """torchjd's IMTL-G combines them so that the step has the same component along every task's gradient."""
    autojac = pytest.importorskip("torchjd.autojac")
    from torchjd.aggregation import IMTLG

    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    balance = ImprovableGapBalancing(2, steps_per_epoch=1, base_epoch=0)
    balance(torch.tensor([5.0, 800.0]))

    def objectives():
        return balance.eval()(torch.stack([(w[:2] ** 2).sum(), 100 * ((w - 1) ** 2).sum()]))

    autojac.backward(list(objectives()), inputs=[w])
    autojac.jac_to_grad([w], IMTLG())
    rows = [torch.autograd.grad(objectives()[k], w)[0] for k in range(2)]
    first, second = (w.grad @ row / row.norm() for row in rows)
    assert first.item() == pytest.approx(second.item(), rel=1e-5)
    assert first.item() > 0


def _halves(rank):
    """Weights, and the mean over two processes of the gradient, each having half of the samples."""
    balance, w = ImprovableGapBalancing(2, steps_per_epoch=1, base_epoch=0), torch.tensor([1.0], requires_grad=True)
    for _ in range(2):
        w.grad = None
        balance(_squares(w, DATA[rank::2])).sum().backward()
        dist.all_reduce(w.grad)
    return balance.weights.tolist(), (w.grad / 2).item()


DATA = torch.tensor([0.5, -1.0, 3.0, 2.0])


def _squares(w, data):
    return torch.stack([(w - data).square().mean(), (3 * w + data).square().mean()])


def test_two_processes_do_what_one_does_with_both_halves(tmp_path):
    weights, gradient = in_two(_halves, tmp_path)[0]
    balance, w = ImprovableGapBalancing(2, steps_per_epoch=1, base_epoch=0), torch.tensor([1.0], requires_grad=True)
    balance(_squares(w, DATA))
    balance(_squares(w, DATA)).sum().backward()
    assert weights == pytest.approx(balance.weights.tolist())
    assert gradient == pytest.approx(w.grad.item(), rel=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"losses: expected shape \(3,\), got \(2,\)"):
        ImprovableGapBalancing(3, steps_per_epoch=1)(torch.ones(2))
    with pytest.raises(ValueError, match="steps_per_epoch: expected a whole number >= 1, got 0"):
        ImprovableGapBalancing(3, steps_per_epoch=0)
    with pytest.raises(ValueError, match=r"generator: expected a torch\.Generator, got NoneType"):
        ImprovableGapBalancingRL(3, steps_per_epoch=1, generator=None)
    with pytest.raises(ValueError, match="lr: expected a number, got a tensor"):
        agent(lr=torch.tensor(0.1))
