"""The surveyed losses against slow derivations written differently, and the registries against the usual libraries."""

import doctest
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

from lossary import losses
from lossary.claims import Seeds
from lossary.claims.losses import loss_metric_survey as registered
from lossary.criterion import Criterion
from lossary.losses import RegistryEntry, loss_registry, metric_registry
from lossary.losses import _metrics as metrics
from lossary.roles import check, mark_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, classes=2, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected, tolerance=1e-12):
    return torch.allclose(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=tolerance)


# --- the registries -------------------------------------------------------------------------------------------


def test_every_task_is_covered():
    tasks = "regression classification detection segmentation embedding depth generation language".split()
    count = {task: sum(e.task == task for e in loss_registry().values()) for task in tasks}
    assert count == dict(zip(tasks, (6, 10, 5, 4, 9, 3, 4, 2)))
    count = {task: sum(e.task == task for e in metric_registry().values()) for task in tasks}
    assert count == dict(zip(tasks, (7, 9, 1, 5, 0, 0, 2, 3)))


def test_an_entry_is_a_record_that_stays_as_it_is():
    entry = loss_registry()["huber"]
    assert entry == RegistryEntry(entry.call, "regression", "real", (0.0, math.inf), "lower", entry.home, entry.source)
    assert entry.call(draw(3), draw(3)).shape == (3,)
    with pytest.raises(AttributeError, match="cannot assign"):
        entry.better = "higher"


def test_every_loss_is_least_at_a_perfect_prediction():
    assert np.max(registered.every_loss_is_least_at_a_perfect_prediction(Seeds((3,))).method) < 1e-8


def test_every_metric_agrees_with_a_library_or_a_slow_loop():
    assert np.max(registered.every_metric_agrees_with_its_reference(Seeds((3, 4))).method) < 2e-7


def test_names_point_where_they_say():
    longer = {"focal": "sigmoid_focal_loss", "gradient_penalty": "gradient_penalty"}
    torchs = {
        "mse": F.mse_loss,
        "mae": F.l1_loss,
        "huber": F.huber_loss,
        "poisson_nll": F.poisson_nll_loss,
        "triplet": F.triplet_margin_loss,
        "adversarial": F.binary_cross_entropy_with_logits,
        "ctc": F.ctc_loss,
    }
    for name, entry in loss_registry().items():
        assert entry.better == "lower"
        if entry.home == "here":
            assert entry.call is getattr(losses, longer.get(name, f"{name}_loss"))
        elif name in torchs:
            assert entry.call.args == (torchs[name],)
            assert entry.home == "torch"
    lower = {name for name, entry in metric_registry().items() if entry.better == "lower"}
    assert lower == set("mse mae rmse mape smape fpr fdr perplexity".split())


def test_what_others_have_is_theirs():
    entries, z, y, t = loss_registry(), draw(2, 3, 5), labels(2, 3, classes=5), labels(2, 3, 5).double()
    assert entries["poly1"].call is losses.poly1_cross_entropy
    flat = z.flatten(0, 1), y.flatten()
    for name, expected in {
        "cross_entropy": F.cross_entropy(*flat, reduction="none"),
        "label_smoothing": F.cross_entropy(*flat, reduction="none", label_smoothing=0.1),
        "multiclass_hinge": F.multi_margin_loss(*flat, reduction="none"),
        "softmax_focal": (1 - (p := (-F.cross_entropy(*flat, reduction="none")).exp())).square() * -p.log(),
    }.items():
        assert close(entries[name].call(z, y), expected.view(2, 3)), name
    q = draw(2, 3, 5, seed=2).softmax(-1)
    assert close(entries["soft_cross_entropy"].call(z, q), -(q * z.log_softmax(-1)).sum(-1))
    weighted = -(7 * t * F.logsigmoid(z) + (1 - t) * F.logsigmoid(-z)).sum(-1)
    assert close(entries["weighted_bce"].call(z, t, pos_weight=torch.tensor(7.0)), weighted)
    p = z.sigmoid()
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    assert close(entries["dice"].call(z, t), dice)
    assert close(entries["smooth_l1"].call(z, t, beta=2.0), F.smooth_l1_loss(z, t, beta=2.0, reduction="none").sum(-1))


def test_an_entry_makes_a_criterion():
    criterion = Criterion(loss_registry()["focal"].call, gamma=1.0)
    assert criterion(torch.zeros(4, 2), torch.ones(4, 2)).item() == pytest.approx(0.25 * math.log(2))


def test_registries_are_read_only():
    with pytest.raises(TypeError):
        loss_registry()["mse"] = None


def test_the_examples_of_the_metrics_run():
    assert doctest.testmod(metrics, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize(
    "call", [metrics.regression_score, metrics.binary_rate, metrics.roc_auc, metrics.pr_auc, metrics.psnr, metrics.ssim]
)
def test_a_measure_passes_its_battery(call):
    assert mark_of(call).role == "measure"
    assert not [result for result in check(call) if not result.passed]


# --- regression and classification ----------------------------------------------------------------------------


def test_log_cosh():
    x, y = draw(9), draw(9, seed=1)
    assert close(losses.log_cosh_loss(x, y), [math.log(math.cosh(a - b)) for a, b in zip(x.tolist(), y.tolist())])
    tiny = losses.log_cosh_loss(torch.tensor([1e-4]), torch.zeros(1)).item()
    assert tiny == pytest.approx(5e-9, rel=2e-3)


def test_quantile_loss_is_least_at_the_quantile():
    y, at = draw(101), torch.linspace(-2, 2, 4001, dtype=torch.float64)
    for q in (0.1, 0.5, 0.9):
        mean = losses.quantile_loss(at.unsqueeze(1).expand(-1, 101), y.expand(4001, -1), quantile=q).mean(1)
        assert at[mean.argmin()].item() == pytest.approx(y.quantile(q).item(), abs=1e-3)
    x = draw(101, seed=1)
    assert close(losses.quantile_loss(x, y), (x - y).abs() / 2)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.75, 1.5), (1.0, 0.0)])
def test_sigmoid_focal_loss(alpha, gamma):
    z, y = draw(4, 3), labels(4, 3).double()
    expected = [0.0] * 4
    for i, j in product(range(4), range(3)):
        p = 1 / (1 + math.exp(-z[i, j].item()))
        q, weight = (p, alpha) if y[i, j] else (1 - p, 1 - alpha)
        expected[i] -= weight * (1 - q) ** gamma * math.log(q)
    assert close(losses.sigmoid_focal_loss(z, y, alpha=alpha, gamma=gamma), expected)


def test_hinge_agrees_with_scikit_learn():
    from sklearn.metrics import hinge_loss

    z, y = 2 * draw(30, 3), labels(30, 3).double()
    expected = sum(hinge_loss(true, score) for true, score in zip(y.T.numpy(), z.T.numpy()))
    assert losses.hinge_loss(z, y).mean().item() == pytest.approx(expected, abs=1e-12)


# --- boxes ----------------------------------------------------------------------------------------------------

BOXES = [
    ((0, 0, 2, 2), (1, 1, 4, 2)),  # overlapping
    ((0, 0, 1, 3), (5, 4, 7, 5)),  # apart
    ((1, 1, 2, 2), (0, 0, 6, 3)),  # inside
    ((0, 0, 2, 1), (2, 0, 3, 4)),  # touching
]


@pytest.mark.parametrize(("a", "b"), BOXES)
def test_box_losses_by_counting_cells(a, b):
    cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
    iou = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
    low, high = [min(a[i], b[i]) for i in (0, 1)], [max(a[i], b[i]) for i in (2, 3)]
    hull = (high[0] - low[0]) * (high[1] - low[1])
    centres = [((c[0] + c[2]) / 2, (c[1] + c[3]) / 2) for c in (a, b)]
    distance = math.dist(*centres) ** 2 / math.dist(low, high) ** 2
    v = 4 / math.pi**2 * (math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))) ** 2
    x, y = (torch.tensor([c], dtype=torch.float64) for c in (a, b))
    assert losses.iou_loss(x, y).item() == pytest.approx(1 - iou, abs=1e-12)
    assert losses.giou_loss(x, y).item() == pytest.approx(1 - iou + 1 - len(cells[0] | cells[1]) / hull, abs=1e-12)
    assert losses.diou_loss(x, y).item() == pytest.approx(1 - iou + distance, abs=1e-12)
    assert losses.ciou_loss(x, y).item() == pytest.approx(1 - iou + distance + v * v / (1 - iou + v), abs=1e-12)


def test_the_weight_of_the_shape_passes_no_gradient():
    a, b = (torch.tensor([box], dtype=torch.float64) for box in BOXES[0])
    a.requires_grad_()
    (slope,) = torch.autograd.grad(losses.ciou_loss(a, b) - losses.diou_loss(a, b), a)
    w, h = 2.0, 2.0
    gap = math.atan(w / h) - math.atan(3.0)
    v = 4 / math.pi**2 * gap**2
    by_width = 8 / math.pi**2 * gap * h / (w * w + h * h) * v / (1 - 1 / 6 + v)
    assert close(slope, [[-by_width, by_width, by_width, -by_width]])


def test_apart_iou_is_flat_and_the_others_are_not():
    a, b = (torch.tensor([box], dtype=torch.float64) for box in BOXES[1])
    a.requires_grad_()
    steep = [
        torch.autograd.grad(call(a, b).sum(), a)[0].abs().sum().item()
        for call in (losses.iou_loss, losses.giou_loss, losses.diou_loss, losses.ciou_loss)
    ]
    assert steep[0] == 0
    assert min(steep[1:]) > 0.01


@pytest.mark.parametrize("call", [losses.iou_loss, losses.giou_loss, losses.diou_loss, losses.ciou_loss])
def test_an_empty_box_costs_one_and_has_a_finite_slope(call):
    point = torch.full((1, 4), 2.0, requires_grad=True)
    value = call(point, torch.full((1, 4), 2.0))
    assert value.item() == 1
    assert torch.autograd.grad(value.sum(), point)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"input: expected boxes .* got shape \(2, 5\)"):
        call(torch.zeros(2, 5), torch.zeros(2, 5))


# --- masks ----------------------------------------------------------------------------------------------------


def test_tversky():
    z, y = draw(3, 8), labels(3, 8).double()
    p = z.sigmoid()
    for row, got in enumerate(losses.tversky_loss(z, y, alpha=0.2, beta=0.9, smooth=0.5).tolist()):
        tp = sum(a * b for a, b in zip(p[row].tolist(), y[row].tolist()))
        fp = sum(a * (1 - b) for a, b in zip(p[row].tolist(), y[row].tolist()))
        fn = sum((1 - a) * b for a, b in zip(p[row].tolist(), y[row].tolist()))
        assert got == pytest.approx(1 - (tp + 0.5) / (tp + 0.2 * fp + 0.9 * fn + 0.5), abs=1e-12)
    half = losses.tversky_loss(z, y, alpha=0.5, beta=0.5, smooth=0.5)
    assert close(loss_registry()["dice"].call(z, y, smooth=1.0), half)
    assert losses.tversky_loss(torch.full((1, 4), -99.0), torch.zeros(1, 4)).item() == 0


def choquet(errors, there):
    """The Lovasz extension as an integral: over levels t, the Jaccard loss of having wrong what errs by t or more."""
    levels = sorted({0.0, *errors})
    total = 0.0
    for low, high in pairwise(levels):
        wrong = {i for i, e in enumerate(errors) if e >= high}
        true = {i for i, y in enumerate(there) if y}
        total += (high - low) * (1 - len(true - wrong) / len(true | wrong))
    return total


def test_lovasz_hinge_is_an_integral_over_levels():
    z, y = 2 * draw(4, 9), labels(4, 9).double()
    y[3] = 0
    expected = [
        choquet([max(0.0, 1 - a if b else 1 + a) for a, b in zip(*rows)], rows[1])
        for rows in zip(z.tolist(), y.tolist())
    ]
    assert close(losses.lovasz_hinge_loss(z, y), expected)
    assert expected[3] == pytest.approx(1 + z[3].max().item())  # without positives the largest error


def test_lovasz_softmax_is_an_integral_over_levels():
    z, y = 2 * draw(3, 9, 4), labels(3, 9, classes=4)
    y[2] = 1  # only one class is there
    expected = []
    for p, own in zip(z.softmax(-1).tolist(), y.tolist()):
        each = [
            choquet([abs((c == k) - row[k]) for row, c in zip(p, own)], [c == k for c in own])
            for k in range(4)
            if k in own
        ]
        expected.append(sum(each) / len(each))
    assert close(losses.lovasz_softmax_loss(z, y), expected)


def test_counts_of_large_masks_survive_float16():
    z = torch.full((1, 80_000), 3.0, dtype=torch.float16)
    z[0, :20_000] = -1.0  # a quarter missed, each by 2
    assert losses.lovasz_hinge_loss(z, torch.ones_like(z)).item() == pytest.approx(0.5, abs=1e-3)


# --- embeddings -----------------------------------------------------------------------------------------------


def moved(cosine, y, scale, move):
    """Cross-entropy by torch at scaled cosines, the true class's angle handed to `move`."""
    logits = cosine.clone()
    for row, c in enumerate(y.tolist()):
        logits[row, c] = move(math.acos(cosine[row, c].item()))
    return F.cross_entropy(scale * logits, y, reduction="none")


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_softmax_stretches_the_angle(m):
    cosine, y = draw(40, 3).tanh(), labels(40, classes=3)
    norm = draw(40, seed=5).exp()

    def psi(t):
        k = next(k for k in range(m) if t <= (k + 1) * math.pi / m)
        return (-1) ** k * math.cos(m * t) - 2 * k

    assert close(losses.a_softmax_loss(cosine, y, margin=m, scale=30.0), moved(cosine, y, 30.0, psi), 1e-10)
    scaled = moved(cosine, y, norm.unsqueeze(1), psi)
    assert close(losses.a_softmax_loss(cosine, y, margin=m, scale=norm), scaled, 1e-10)
    ends = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    at_ends = F.cross_entropy(torch.tensor([[1.0, 0.0], [1.0 - 2 * m, 0.0]]).double(), labels(2) * 0, reduction="none")
    got = losses.a_softmax_loss(ends, labels(2) * 0, margin=m, scale=1.0)
    assert close(got.detach(), at_ends)
    assert (torch.autograd.grad(got.sum(), ends)[0][:, 0] < 0).all()  # a larger cosine is always better


def test_cosface_takes_the_margin_off_the_cosine():
    cosine, y = draw(40, 3).tanh(), labels(40, classes=3)
    assert close(losses.cosface_loss(cosine, y), moved(cosine, y, 64.0, lambda t: math.cos(t) - 0.35), 1e-10)


def test_arcface_adds_the_margin_to_the_angle():
    cosine, y = draw(40, 3).tanh(), labels(40, classes=3)
    cosine[0, y[0]] = -0.99  # beyond pi - margin

    def turn(t):
        return math.cos(t + 0.5) if t + 0.5 <= math.pi else math.cos(t) - 0.5 * math.sin(0.5)

    assert close(losses.arcface_loss(cosine, y), moved(cosine, y, 64.0, turn), 1e-6)
    one = torch.tensor([[1.0, 0.2]], requires_grad=True)
    (slope,) = torch.autograd.grad(losses.arcface_loss(one, torch.tensor([0]), scale=1.0), one)
    assert slope.isfinite().all()


def test_center_loss():
    x, centers, y = draw(5, 3), draw(4, 3, seed=1), labels(5, classes=4)
    expected = [math.dist(a, centers[c].tolist()) ** 2 / 2 for a, c in zip(x.tolist(), y.tolist())]
    assert close(losses.center_loss(x, y, centers=centers), expected)
    with pytest.raises(ValueError, match=r"centers: expected shape \(4, 3\), got \(4, 2\)"):
        losses.center_loss(x, y, centers=centers[:, :2])


def test_contrastive_loss():
    a, b, same = draw(6, 3), draw(6, 3, seed=1), torch.tensor([True, False] * 3)
    expected = [
        (d if s else max(0.0, 2.5 - d)) ** 2 / 2
        for d, s in zip((math.dist(x, y) for x, y in zip(a.tolist(), b.tolist())), same.tolist())
    ]
    assert close(losses.contrastive_loss(a, b, same=same, margin=2.5), expected)
    a.requires_grad_()
    (slope,) = torch.autograd.grad(losses.contrastive_loss(a, a.detach(), same=same).sum(), a)
    assert slope.abs().sum() == 0


def test_circle_loss_by_pairs():
    x, y, m, gamma = draw(7, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2]), 0.3, 5.0
    x.requires_grad_()
    unit = x / x.norm(dim=1, keepdim=True)
    expected = []
    for i in range(7):
        negative = positive = 0.0
        for j in range(7):
            s = unit[i] @ unit[j]
            if y[i] != y[j]:
                negative = negative + torch.exp(gamma * max(0.0, s.item() + m) * (s - m))
            elif i != j:
                positive = positive + torch.exp(-gamma * max(0.0, 1 + m - s.item()) * (s - (1 - m)))
        expected.append(torch.log(1 + negative * positive))
    expected = torch.stack(expected)
    got = losses.circle_loss(x, y, margin=m, gamma=gamma)
    assert close(got, expected.detach())
    assert close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("y", [[0, 0, 0], [0, 1, 2]])
def test_circle_loss_without_pairs_is_zero_with_a_slope_of_zero(y):
    x = draw(3, 2).requires_grad_()
    value = losses.circle_loss(x, torch.tensor(y))
    assert value.tolist() == [0, 0, 0]
    assert torch.autograd.grad(value.sum(), x)[0].abs().sum() == 0


def test_barlow_twins_against_numpys_correlations():
    a, b = draw(20, 4), draw(20, 4, seed=1)
    b += a
    c = np.corrcoef(a.numpy(), b.numpy(), rowvar=False)[:4, 4:]
    expected = ((1 - np.diag(c)) ** 2).sum() + 0.02 * (c**2).sum() - 0.02 * (np.diag(c) ** 2).sum()
    got = losses.barlow_twins_loss(a, b, redundancy=0.02)
    assert got.mean().item() == pytest.approx(expected, abs=1e-3)  # the paper's 1e-5 under the root
    wide = losses.barlow_twins_loss(1e3 * a, 1e3 * b, redundancy=0.02)
    assert wide.mean().item() == pytest.approx(expected, abs=1e-9)


def test_simsiam_stops_the_gradient_of_its_target():
    p, z = draw(5, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    value = losses.simsiam_loss(p, z)
    expected = [-np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p.tolist(), z.tolist())]
    assert close(value.detach(), expected)
    by_p, by_z = torch.autograd.grad(value.sum(), (p, z), allow_unused=True)
    assert by_p.abs().sum() > 0
    assert by_z is None


# --- depth, images, generation --------------------------------------------------------------------------------


def test_scale_invariant_log_loss_compares_pairs_of_pixels():
    x, y = draw(2, 6).exp(), draw(2, 6, seed=1).exp()
    d = (x.log() - y.log()).tolist()
    pairs = [sum((a - b) ** 2 for a in row for b in row) / (2 * 36) for row in d]
    assert close(losses.scale_invariant_log_loss(x, y, ratio=1.0), pairs)
    squares = [sum(a * a for a in row) / 6 for row in d]
    half = [(a + b) / 2 for a, b in zip(pairs, squares)]
    assert close(losses.scale_invariant_log_loss(x, y), half)
    assert close(losses.scale_invariant_log_loss(3 * x, y, ratio=1.0), pairs)


def slow_ssim(x, y, weight, data_range):
    """Mean over windows and channels, window by window, from weighted deviations."""
    k, values = len(weight), []
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for a, b in zip(x.numpy(), y.numpy()):
        for i, j in product(range(a.shape[0] - k + 1), range(a.shape[1] - k + 1)):
            u, v = a[i : i + k, j : j + k], b[i : i + k, j : j + k]
            mu, mv = (weight * u).sum(), (weight * v).sum()
            spread = (weight * (u - mu) ** 2).sum() + (weight * (v - mv) ** 2).sum()
            common = (weight * (u - mu) * (v - mv)).sum()
            values.append((2 * mu * mv + c1) * (2 * common + c2) / ((mu**2 + mv**2 + c1) * (spread + c2)))
    return sum(values) / len(values)


def test_ssim_window_by_window():
    x, y = 4 * draw(2, 2, 9, 7).sigmoid(), 4 * draw(2, 2, 9, 7, seed=1).sigmoid()
    weight = np.exp([[-((i - 2) ** 2 + (j - 2) ** 2) / (2 * 1.2**2) for j in range(5)] for i in range(5)])
    expected = [slow_ssim(a, b, weight / weight.sum(), 4.0) for a, b in zip(x, y)]
    assert close(metrics.ssim(x, y, data_range=4.0, window=5, sigma=1.2), expected)
    with pytest.raises(ValueError, match="input: expected images of at least 11x11"):
        metrics.ssim(x, y)
    with pytest.raises(ValueError, match="window: expected an odd number, got 4"):
        metrics.ssim(x, y, window=4)


def test_photometric_loss():
    x, y = draw(2, 3, 5, 6).sigmoid(), draw(2, 3, 5, 6, seed=1).sigmoid()
    expected = [
        0.6 * (1 - slow_ssim(a, b, np.full((3, 3), 1 / 9), 1.0)) / 2 + 0.4 * np.abs(a.numpy() - b.numpy()).mean()
        for a, b in zip(x, y)
    ]
    assert close(losses.photometric_loss(x, y, alpha=0.6), expected)


def test_smoothness_loss():
    d, image = draw(2, 1, 3, 4), draw(2, 3, 3, 4, seed=1)
    expected = []
    for n in range(2):
        total = {}
        for axis, (di, dj) in {"x": (0, 1), "y": (1, 0)}.items():
            terms = [
                abs(d[n, 0, i + di, j + dj] - d[n, 0, i, j]).item()
                * math.exp(-sum(abs(image[n, c, i + di, j + dj] - image[n, c, i, j]).item() for c in range(3)) / 3)
                for i, j in product(range(3 - di), range(4 - dj))
            ]
            total[axis] = sum(terms) / len(terms)
        expected.append(total["x"] + total["y"])
    assert close(losses.smoothness_loss(d, image), expected)


def test_gaussian_kl_and_elbo_against_torchs_distributions():
    mean, log_variance, z, x = draw(4, 3), draw(4, 3, seed=1), draw(4, 6, seed=2), labels(4, 6).double()
    zero = torch.zeros_like(mean)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(zero, zero + 1)).sum(1)
    assert close(losses.gaussian_kl_loss(mean, log_variance), kl)
    expected = 0.3 * kl - Bernoulli(logits=z).log_prob(x).sum(1)
    assert close(losses.negative_elbo_loss(z, x, mean=mean, log_variance=log_variance, beta=0.3), expected)


def test_gradient_penalty_of_a_quadratic_critic():
    real, fake, weight = draw(5, 3), draw(5, 3, seed=1), torch.tensor(0.7, requires_grad=True)
    place = torch.rand(5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    points = [
        [u * a + (1 - u) * b for a, b in zip(x, y)] for u, x, y in zip(place.tolist(), real.tolist(), fake.tolist())
    ]
    expected = [(0.7 * math.hypot(*point) - 1) ** 2 for point in points]
    got = losses.gradient_penalty(
        lambda x: weight * x.square().sum(1) / 2, real, fake, generator=torch.Generator().manual_seed(8)
    )
    assert close(got, expected, 1e-7)
    (slope,) = torch.autograd.grad(got.sum(), weight)
    assert slope.item() == pytest.approx(sum(2 * (0.7 * math.hypot(*p) - 1) * math.hypot(*p) for p in points), rel=1e-6)


# --- metrics --------------------------------------------------------------------------------------------------

HYPOTHESES = [
    "the cat sat on the mat today",
    "a quick brown fox jumped over lazy dogs now",
    "it is what it is my friend",
]
REFERENCES = [
    ["the cat is on the mat today", "there sat the cat on the mat today"],
    ["the quick brown fox jumped over the lazy dogs"],
    ["it is what it is dear friend of mine", "it is so what it is my friend"],
]


def test_bleu_is_nltks_and_sacrebleus():
    found, true = [h.split() for h in HYPOTHESES], [[r.split() for r in rs] for rs in REFERENCES]
    assert metrics.bleu(found, true) == pytest.approx(0.6414105256422726, abs=1e-12)  # sacreBLEU: 64.14105256422724
    assert metrics.bleu(found, true, order=2) == pytest.approx(0.7923079110065351, abs=1e-12)
    short = ["quick brown fox jumped".split(), "brown fox jumped over the lazy".split()]
    assert metrics.bleu(short, [true[1], true[1]]) == pytest.approx(0.44932896411722156, abs=1e-12)
    assert metrics.bleu(["a b c".split()], [["a b c".split()]]) == 0  # no run of four
    letters = "a b c d e f g h i".split()
    longer = metrics.bleu([letters[:7]], [[letters, letters[:4]]])  # the nearest in length is the longer
    assert longer == pytest.approx(math.exp(1 - 9 / 7), abs=1e-12)
    assert metrics.bleu([letters[:7]], [[letters, letters[:5]]]) == 1  # of two as near the shorter
    with pytest.raises(ValueError, match="target: expected references for each of 1 translations"):
        metrics.bleu(found[:1], [[]])


def test_rouge_l_is_rouge_scores():
    expected = (0.8571428571428571, 0.7777777777777778, 0.75)
    for hypothesis, references, f in zip(HYPOTHESES, REFERENCES, expected):
        assert metrics.rouge_l(hypothesis.split(), references[0].split()) == pytest.approx(f, abs=1e-12)
    p, r = 6 / 7, 6 / 9  # the third pair; 6 of 7 and of 9 words
    got = metrics.rouge_l(HYPOTHESES[2].split(), REFERENCES[2][0].split(), beta=2.0)
    assert got == pytest.approx(5 * p * r / (r + 4 * p), abs=1e-12)
    assert metrics.rouge_l([], ["a"]) == 0


def test_what_the_data_lack_is_not_a_number():
    none, some = torch.zeros(4, dtype=torch.int64), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert all(
        metrics.binary_rate(some, none, rate=rate).isnan() for rate in ("precision", "recall", "f1", "iou", "fdr")
    )
    assert metrics.roc_auc(some, none).isnan()
    assert metrics.pr_auc(some, none).isnan()
    empty = torch.zeros(3, 6, 6, dtype=torch.bool)
    disc = empty.clone()
    disc[1:, 2:4, 2:4] = True
    assert str(metrics.boundary_f1(disc, torch.stack((disc[0], disc[1], empty[0]))).tolist()) == "[nan, 1.0, 0.0]"


def test_segments_of_different_categories_do_not_match():
    true = torch.tensor([[[0, 0], [0, 0], [1, 1], [1, 1]]])
    found = torch.tensor([[[0, 0], [0, 0], [2, 1], [2, 1]]])
    assert metrics.panoptic_quality(found, true).item() == pytest.approx(1 / 3)  # one of three categories is right


def test_rates_and_areas_go_over_the_last_dimension():
    score, target = draw(3, 20).sigmoid(), labels(3, 20)
    for call in (metrics.binary_rate, metrics.roc_auc, metrics.pr_auc):
        assert close(call(score, target), [call(a, b).item() for a, b in zip(score, target)])


def test_scores_out_of_reach():
    zero = torch.zeros(3)
    assert metrics.regression_score(zero, zero, score="smape") == 0
    assert metrics.regression_score(zero + 1, zero, score="mape") == math.inf
    assert metrics.psnr(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)) == math.inf
    with pytest.raises(ValueError, match="predictors: expected a whole number >= 0 and <= 1, got 2"):
        metrics.regression_score(zero, zero, predictors=2)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: losses.contrastive_loss(x, x, same=y), "same: expected bool"),
        (lambda x, y: losses.contrastive_loss(x, x, same=y > 0, margin=0.0), "margin: expected a number > 0"),
        (lambda x, y: losses.circle_loss(x, y[:2]), r"target: expected shape \(4,\), got \(2,\)"),
        (lambda x, y: losses.circle_loss(x, y, gamma=-1.0), "gamma: expected a number > 0"),
        (lambda x, y: losses.barlow_twins_loss(x, x[:2]), r"target: expected shape \(4, 3\), got \(2, 3\)"),
        (lambda x, y: losses.simsiam_loss(x, y), "target: expected a floating-point tensor"),
        (lambda x, y: losses.scale_invariant_log_loss(x, x, ratio=2.0), "ratio: expected a number"),
        (lambda x, y: losses.photometric_loss(x, x), "input: expected 4 dimensions"),
        (lambda x, y: losses.gaussian_kl_loss(x, x[:2]), "log_variance: expected shape"),
        (lambda x, y: losses.gradient_penalty(x.sum, x, x[:2], generator=None), "fake: expected shape"),
        (lambda x, y: losses.lovasz_softmax_loss(x[0], y[0]), "input: expected at least 2 dimensions"),
        (lambda x, y: losses.sigmoid_focal_loss(x, x, gamma=0.5), "gamma: expected 0 or a number >= 1"),
        (lambda x, y: losses.a_softmax_loss(x, y, margin=0), "margin: expected a whole number >= 1"),
        (lambda x, y: metrics.boundary_f1(x, x), "input: expected bool masks"),
        (lambda x, y: metrics.panoptic_quality(y, y), "input: expected .n, pixels, 2."),
        (lambda x, y: metrics.binary_rate(x[:, 0], y, rate="fame"), "rate: expected one of 'accuracy'"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(4, 3), labels(4))
