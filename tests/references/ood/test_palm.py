"""PALM against the official implementation's numbers, sums written out, and the marginals of a transport."""

import io
import math

import pytest
import torch
import torch.nn.functional as F

from lossary.ood import MahalanobisDetector, PALMLoss, prototype_contrastive_loss, sinkhorn_assignment

PROTOTYPES = [
    [[1.0, 0.2, 0.0], [0.5, 1.0, 0.1], [0.0, 0.3, 1.0]],
    [[-1.0, 0.0, 0.5], [-0.4, -1.0, 0.0], [0.1, -0.2, -1.0]],
]
EMBEDDINGS = [[0.9, 0.1, 0.3], [0.2, 0.8, -0.1], [-0.7, -0.3, 0.2], [0.1, 0.4, 0.9], [-0.2, -0.6, -0.8]]
LABELS = [0, 0, 1, 0, 1]
# What jeff024/PALM's class PALM gives for these, in double precision, with K = 3, k = 2, proto_m = 0.9, epsilon = 0.5.
OFFICIAL_LOSS = 2.4570490814372183
OFFICIAL_PROTOTYPES = [
    [
        [0.9762228345, 0.2159023013, 0.0193693997],
        [0.4481846765, 0.8882962016, 0.1003013159],
        [0.0101134547, 0.2993723220, 0.9540827694],
    ],
    [
        [-0.9013181885, -0.0384168816, 0.4314506534],
        [-0.4041573339, -0.9143655983, -0.0243393128],
        [0.0690875545, -0.2374810656, -0.9689322233],
    ],
]
OFFICIAL_GRADIENT = [
    [0.0878248768, -0.3914887906, -0.1329783669],
    [-0.4557051590, 0.1236728413, 0.0779724120],
    [-0.2376038039, 0.8233274569, 0.4033778715],
    [-0.2807080738, -0.3903629180, 0.2046844162],
    [0.3500187967, 0.4914683230, -0.4561059414],
]


def palm(**hyper):
    settings = {"prototypes": 3, "top": 2, "momentum": 0.9, "epsilon": 0.5} | hyper
    loss = PALMLoss(num_classes=2, num_features=3, **settings).double()
    loss.prototypes = F.normalize(torch.tensor(PROTOTYPES, dtype=torch.float64), dim=-1)
    return loss


def batch():
    return torch.tensor(EMBEDDINGS, dtype=torch.float64, requires_grad=True), torch.tensor(LABELS)


def test_value_move_and_gradient_are_the_official_codes():
    loss, (z, y) = palm(), batch()
    mean = loss(z, y).mean()
    (gradient,) = torch.autograd.grad(mean, z)
    assert mean.item() == pytest.approx(OFFICIAL_LOSS, abs=1e-12)
    torch.testing.assert_close(loss.prototypes.tolist(), OFFICIAL_PROTOTYPES, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient.tolist(), OFFICIAL_GRADIENT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["bound", "mixture"])
def test_values_of_samples_are_sums_over_prototypes_written_out(likelihood):
    loss, (z, y) = palm(likelihood=likelihood, contrast=0.0, temperature=0.3).eval(), batch()
    p = loss.prototypes.flatten(0, 1).tolist()
    unit = [[v / math.hypot(*row) for v in row] for row in EMBEDDINGS]
    cosine = [[sum(a * b for a, b in zip(row, q)) for q in p] for row in unit]
    share = [[math.exp(c / 0.5) for c in row] for row in cosine]
    for _ in range(3):
        columns = [sum(row[k] for row in share) for k in range(6)]
        share = [[v / columns[k] for k, v in enumerate(row)] for row in share]
        share = [[v / sum(row) for v in row] for row in share]
    for value, row, s, label in zip(loss(z, y).tolist(), cosine, share, LABELS):
        own = sorted(range(3 * label, 3 * label + 3), key=lambda k, s=s: -s[k])[:2]
        w = {k: s[k] / sum(s[j] for j in own) for k in own}
        away = math.log(sum(math.exp(c / 0.3) for c in row))
        if likelihood == "bound":
            near = sum(w[k] * row[k] / 0.3 for k in own)
        else:
            near = math.log(sum(w[k] * math.exp(row[k] / 0.3) for k in own))
        assert value == pytest.approx(away - near, abs=1e-12)


def test_the_bound_is_never_below_the_mixture():
    y = torch.arange(40) % 2
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gap = palm().eval()(z, y) - palm(likelihood="mixture").eval()(z, y)
    assert gap.min() >= 0
    assert gap.max() > 0.1


def test_the_mixtures_gradient_is_finite_although_shares_are_cut():
    z, y = batch()
    value = palm(likelihood="mixture", epsilon=0.001, top=1)(z, y)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_the_contrast_is_the_prototypes_loss_and_adds_alike_to_all():
    (z, y), names = batch(), torch.tensor([0, 0, 0, 1, 1, 1])
    added = palm(contrast=0.7).eval()(z, y) - palm(contrast=0.0).eval()(z, y)
    p = palm().prototypes.flatten(0, 1)
    torch.testing.assert_close(added, 0.7 * prototype_contrastive_loss(p, names).mean().expand(5), rtol=0, atol=1e-12)


def test_contrast_by_hand():
    """Two of one class at right angles, one of another opposite to the first."""
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    got = prototype_contrastive_loss(p, torch.tensor([4, 4, 9]), temperature=0.5)
    first, second = math.log(1 + math.exp(-2)), math.log(2)
    third = math.log(math.exp(-2) + 1)
    torch.testing.assert_close(got.tolist(), [first, second, third], rtol=0, atol=1e-12)


def test_shares_are_optimal_transport():
    """Rows and columns get their mass, and the logarithm is cosines / epsilon but for a term a row and one a column."""
    similarity = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = sinkhorn_assignment(similarity, epsilon=0.5, iterations=500)
    torch.testing.assert_close(share.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(share.sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-12)
    rest = share.log() - similarity / 0.5
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-9
    stacked = sinkhorn_assignment(similarity.expand(2, 12, 4), epsilon=0.5, iterations=500)
    assert torch.equal(stacked[1], share)


def test_a_prototype_without_samples_stays_and_evaluation_moves_none():
    z, y = batch()
    loss = palm()
    before = loss.prototypes.clone()
    loss(z[:2], y[:2])
    torch.testing.assert_close(loss.prototypes[1], before[1], rtol=0, atol=1e-15)
    assert not torch.allclose(loss.prototypes[0], before[0], atol=1e-3)
    loss = palm().eval()
    loss(z, y)
    assert torch.equal(loss.prototypes, before)


def test_a_state_dict_continues_the_run():
    z, y = batch()
    loss, other = palm(), PALMLoss(2, 3, prototypes=3, top=2, momentum=0.9, epsilon=0.5).double()
    loss(z, y)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(z, y), loss(z, y))
    assert torch.equal(other.prototypes, loss.prototypes)


def test_the_generator_alone_draws_the_prototypes_uniformly():
    state = torch.random.get_rng_state()
    first, again = (PALMLoss(5, 2, prototypes=400, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.prototypes, again.prototypes)
    torch.testing.assert_close(first.prototypes.norm(dim=-1), torch.ones(5, 400))
    assert first.prototypes.mean((0, 1)).norm() < 0.06  # 2.7 standard deviations of a mean of 2000 directions


def test_row_order_and_low_precision():
    z, y = batch()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(palm()(z[order], y[order]), palm()(z, y)[order], rtol=0, atol=1e-12)
    low = PALMLoss(2, 3, generator=torch.Generator().manual_seed(0))(z.detach().bfloat16(), y)
    assert low.dtype is torch.bfloat16
    assert low.isfinite().all()


def test_an_embedding_trained_with_it_serves_the_detector():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 4, generator=g) / 4
    x[:, 0] += 4.0 * y - 2.0
    head = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    loss = PALMLoss(2, 3, momentum=0.9, generator=g)
    optimizer = torch.optim.SGD([*head.parameters()], lr=0.3)
    means = []
    for _ in range(60):
        value = loss(head(x), y).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        means.append(value.item())
    assert means[-1] < means[0] - 0.5
    with torch.no_grad():
        detector = MahalanobisDetector().fit(head(x), y)
        assert detector.anomaly_score(head(9 * x.flip(1))).mean() > 10 * detector.anomaly_score(head(x)).mean()


def test_refusals_name_the_argument():
    z, y = batch()
    with pytest.raises(ValueError, match=r"embeddings: expected \(batch, 3\), got shape \(5, 2\)"):
        palm()(z[:, :2], y)
    with pytest.raises(ValueError, match=r"labels: expected shape \(5,\), got \(4,\)"):
        palm()(z, y[:4])
    with pytest.raises(ValueError, match=r"top: expected a whole number >= 1 and <= 3, got 4"):
        palm(top=4)
    with pytest.raises(ValueError, match=r"momentum: expected a number > 0 and < 1, got 1.0"):
        palm(momentum=1.0)
    with pytest.raises(ValueError, match=r"likelihood: expected one of 'bound', 'mixture', got 'exact'"):
        palm(likelihood="exact")
    with pytest.raises(ValueError, match=r"epsilon: expected a number > 0, got 0.0"):
        sinkhorn_assignment(torch.ones(2, 2), epsilon=0.0)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(3,\)"):
        prototype_contrastive_loss(torch.ones(2, 2), torch.tensor([0, 1, 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees():
    z, y = batch()
    torch.testing.assert_close(palm().cuda()(z.cuda(), y.cuda()).cpu(), palm()(z, y))
