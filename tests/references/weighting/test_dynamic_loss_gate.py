"""The dynamic loss gate against the implementation it was built from, closed forms, and itself on two processes."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import norm

from lossary.criterion import Criterion
from lossary.weighting import DynamicLossGate, fit_loss_gate, loss_gate_label_correction
from tests.processes import in_two

# LGL_threshold_update_gmm of theolepage/wavlm_ssl_sv on these losses; its grid is 0.008 wide.
HEAPS = torch.cat([1.2 * torch.linspace(-2.5, 2.5, 400) - 3, 0.4 * torch.linspace(-2.5, 2.5, 200) + 1]).exp()
OFFICIAL_GATE = -0.5706

# loss/aamsoftmax.py of the same with margin 0, scale 5, lgl_threshold 0.3 and temperature 0.1, stages A and B.
WEIGHT = torch.sin(torch.arange(12.0)).view(4, 3)
X = torch.cos(torch.arange(18.0)).view(6, 3)
CLEAN = (X + 0.3 * torch.sin(2 * torch.arange(18.0)).view(6, 3)) @ WEIGHT.T
Z = 5 * F.normalize(X) @ F.normalize(WEIGHT).T
Y = torch.tensor([0, 1, 2, 3, 0, 1])
STAGE_A = 0.5068914
STAGE_B = {0.5: 0.4520595, 0.96: 0.4031671}  # by its lc_threshold


def test_the_gate_is_that_of_the_implementation():
    assert fit_loss_gate(HEAPS) == pytest.approx(OFFICIAL_GATE, abs=0.0081)


def heap(mean, deviation, samples):
    """Quantiles of a normal distribution."""
    return torch.as_tensor(mean + deviation * norm.ppf((torch.arange(samples) + 0.5) / samples))


@pytest.mark.parametrize(("share", "low", "high"), [(0.6, 0.8, 0.5), (0.3, 0.4, 1.5), (0.8, 0.7, 0.7)])
def test_the_gate_is_where_the_true_curves_cross(share, low, high):
    losses = torch.cat([heap(-3.0, low, round(20_000 * share)), heap(1.5, high, round(20_000 * (1 - share)))]).exp()

    def lead(x):
        return share * norm.pdf(x, -3.0, low) - (1 - share) * norm.pdf(x, 1.5, high)

    assert fit_loss_gate(losses) == pytest.approx(brentq(lead, -3.0, 1.5), abs=0.02)


def test_no_gate_without_two_heaps_and_odd_losses_are_passed_over():
    assert fit_loss_gate(torch.full((50,), 2.0)) is None
    assert fit_loss_gate(torch.full((5,), torch.inf)) is None
    assert fit_loss_gate(torch.tensor([torch.nan, 1.0])) is None
    one_covers_both = torch.cat([heap(0.0, 3.0, 100), heap(1.0, 0.5, 900)])
    assert fit_loss_gate(one_covers_both.exp()) is None
    assert fit_loss_gate((-one_covers_both).exp()) is None
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert fit_loss_gate(torch.cat([HEAPS, odd])) == fit_loss_gate(HEAPS)


def test_losses_of_zero_count_as_tiny_ones():
    zeros = torch.cat([torch.zeros(50), torch.linspace(-1.0, 1.0, 50).exp()])
    tiny = torch.cat([torch.full((50,), 1e-8), torch.linspace(-1.0, 1.0, 50).exp()])
    assert fit_loss_gate(zeros) == fit_loss_gate(tiny)
    assert math.log(1e-8) < fit_loss_gate(zeros) < -1


def test_both_stages_are_those_of_the_implementation():
    losses = F.cross_entropy(Z, Y, reduction="none")
    gate = DynamicLossGate(6)
    gate.threshold.fill_(0.3)
    assert (gate(losses, index=torch.arange(6)) * losses).mean().item() == pytest.approx(STAGE_A, abs=1e-6)
    for confidence, value in STAGE_B.items():
        got = loss_gate_label_correction(Z, Y, clean=CLEAN, threshold=gate.threshold, confidence=confidence)
        assert got.mean().item() == pytest.approx(value, abs=1e-6)


def test_soft_labels_are_the_cross_entropy_with_the_sharpened_prediction():
    z, clean = Z.double(), CLEAN.double()
    got = loss_gate_label_correction(z, Y, clean=clean, threshold=-9.0, temperature=0.5, confidence=0.0, labels="soft")
    expected = F.cross_entropy(z, (clean / 0.5).softmax(-1), reduction="none")
    assert torch.allclose(got, expected)
    soft = {"clean": clean, "threshold": 0.3, "labels": "soft"}
    assert torch.autograd.gradcheck(lambda z: loss_gate_label_correction(z, Y, **soft), z.requires_grad_())


def test_nothing_flows_back_through_the_clean_view():
    clean = CLEAN.clone().requires_grad_()
    z = Z.clone().requires_grad_()
    loss_gate_label_correction(z, Y, clean=clean, threshold=0.3, labels="soft").sum().backward()
    assert clean.grad is None
    assert z.grad.abs().sum() > 0


def epoch_of(gate, losses, batch=3):
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))
    return [gate(losses[rows], index=rows) for rows in order.split(batch)]


def test_it_is_fitted_after_every_epoch_once_it_is_warm():
    losses, gate = HEAPS[::40], DynamicLossGate(15, warmup=2)
    thresholds = []
    for scale in (1.0, 0.5, 0.25):
        weights = epoch_of(gate, scale * losses)
        assert all(w.tolist() == [1.0] * 3 for w in weights) == (len(thresholds) < 2)
        thresholds.append(gate.threshold.item())
    first = fit_loss_gate(0.5 * losses)
    assert thresholds == pytest.approx([math.inf, first, first + math.log(0.5)], abs=1e-4)
    assert (gate.epoch, gate.seen) == (3, 0)


def test_it_remembers_each_samples_last_loss_and_rests_in_evaluation():
    gate = DynamicLossGate(4)
    gate(torch.tensor([1.0, 2.0]), index=torch.tensor([2, 0]))
    gate(torch.tensor([3.0]), index=torch.tensor([2]))
    gate.eval()(torch.tensor([9.0]), index=torch.tensor([1]))
    assert gate.losses.tolist() == [2.0, math.inf, 3.0, math.inf]
    assert gate.seen == 3


def test_a_gate_that_finds_no_crossing_stays_and_one_that_keeps_nothing_weighs_nothing():
    gate = DynamicLossGate(4, warmup=0)
    gate.threshold.fill_(-1.0)
    assert gate(torch.ones(4), index=torch.arange(4)).tolist() == [0.0] * 4
    assert gate.threshold.item() == -1.0
    assert gate.epoch == 1
    infinite = torch.tensor([0.1, torch.inf])
    assert gate(infinite, index=torch.tensor([0, 1])).tolist() == [2.0, 0.0]


def test_a_run_resumes_in_the_middle_of_an_epoch():
    losses = HEAPS[::40]
    gate, resumed = DynamicLossGate(15, warmup=1), DynamicLossGate(15, warmup=1)
    batches = [(scale * losses[rows], rows) for scale in (1.0, 0.5, 0.2) for rows in torch.arange(15).split(3)]
    for values, index in batches[:7]:
        gate(values, index=index)
    resumed.load_state_dict(copy.deepcopy(gate.state_dict()))
    for values, index in batches[7:]:
        assert torch.equal(gate(values, index=index), resumed(values, index=index))
    assert gate.threshold == resumed.threshold < 0


def test_it_weighs_a_criterion():
    gate = DynamicLossGate(6)
    gate.threshold.fill_(0.3)
    criterion = Criterion(partial(F.cross_entropy, reduction="none"), weighting=gate)
    assert criterion(Z, Y, index=torch.arange(6)).item() == pytest.approx(STAGE_A, abs=1e-6)


def batches():
    """Three epochs of global batches of six, the samples in another order each time, losses falling."""
    g = torch.Generator().manual_seed(3)
    losses = HEAPS[::25]  # 16 right labels and 8 wrong ones
    for scale in (1.0, 0.6, 0.3):
        for rows in torch.randperm(24, generator=g).split(6):
            yield scale * losses[rows] * (1 + 0.1 * torch.rand(6, generator=g)), rows


def _one_of_two(rank):
    """What one of two processes sees: the weighted means and gates after each batch, and all it remembers."""
    gate, seen = DynamicLossGate(24, warmup=1), []
    for losses, index in batches():
        losses, index = losses[rank::2], index[rank::2]
        weighted = (gate(losses, index=index) * losses).mean()
        dist.all_reduce(weighted)  # DistributedDataParallel takes the mean, half of this sum
        seen.append((weighted.item() / 2, gate.threshold.item()))
    return seen, gate.losses.tolist()


def test_two_processes_do_what_one_does_with_both_halves(tmp_path):
    seen, remembered = in_two(_one_of_two, tmp_path)[0]
    gate, alone = DynamicLossGate(24, warmup=1), []
    for losses, index in batches():
        weighted = (gate(losses, index=index) * losses).mean()
        alone.append((weighted.item(), gate.threshold.item()))
    assert len({threshold for _, threshold in alone}) == 4  # infinite, then one for each epoch's end
    for both, single in zip(seen, alone):
        assert both == pytest.approx(single, abs=1e-6)
    assert remembered == gate.losses.tolist()


def test_refusals():
    with pytest.raises(ValueError, match="warmup: expected a whole number >= 0"):
        DynamicLossGate(6, warmup=-1)
    with pytest.raises(ValueError, match="labels: expected one of 'hard', 'soft', got 'sharp'"):
        loss_gate_label_correction(Z, Y, labels="sharp")
    with pytest.raises(ValueError, match="clean: expected shape"):
        loss_gate_label_correction(Z, Y, clean=CLEAN[:2])
    with pytest.raises(ValueError, match="threshold: expected a number or a tensor without gradient"):
        loss_gate_label_correction(Z, Y, threshold=torch.tensor(0.1, requires_grad=True))
