"""LDR against numbers of the official code, its variational definition, and its limits worked by hand."""

import numpy as np
import pytest
import torch

from lossary.losses import ALDRKLLoss, _blocks, aldr_kl_loss, ldr_kl_loss, ldr_top_k_loss

LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.4, 0.3], [-4.0, 1.0, 2.0, 0.0], [9.0, -1.0, 2.0, 1.0]])
TARGET = torch.tensor([0, 3, 2, 0])


def gaps(logits: np.ndarray, y: int, margin: float) -> np.ndarray:
    """d_k = f_k - f_y + margin for k other than y, and d_y = 0."""
    d = logits - logits[y] + margin
    d[y] = 0.0
    return d


def log_mean_exp(d: np.ndarray) -> float:
    return d.max() + np.log(np.mean(np.exp(d - d.max())))


@pytest.mark.parametrize(
    ("margin", "lam", "official"),
    [
        (0.1, 1.0, (0.44846326, -0.08762995, -0.73026741, -1.12419832)),
        (2.0, 0.5, (2.60814810, 1.65479329, 0.71652985, -0.25398254)),
    ],
)
def test_ldr_kl_gives_the_numbers_of_the_official_code(margin, lam, official):
    """LDRLoss_V1 of Optimization-AI/ICML2023_LDR, which normalises softplus(logits)."""
    got = ldr_kl_loss(torch.nn.functional.softplus(LOGITS), TARGET, lam=lam, margin=margin, normalize=True)
    assert got.tolist() == pytest.approx(official, abs=2e-6)


@pytest.mark.parametrize(
    ("lam0", "alpha", "official"),
    [
        (1.0, 2.0, (0.32525095, -0.59512591, -0.71484852, -1.02375793)),
        (0.3, 1.5, (0.95351082, -0.27422950, -0.27688602, -0.27725887)),
    ],
)
def test_aldr_kl_gives_the_numbers_at_which_the_official_code_settles(lam0, alpha, official):
    """ALDRLoss_V1 of the same repository after 200 visits to each sample, without a margin."""
    got = aldr_kl_loss(LOGITS, TARGET, lam0=lam0, alpha=alpha, margin=0.0, normalize=True)
    assert got.tolist() == pytest.approx(official, abs=2e-6)


@pytest.mark.parametrize(
    ("lam0", "alpha", "official"),
    [
        (1.0, 2.0, (0.32525095, -0.59512591, -0.71484852, -1.02375793)),
        (0.3, 1.5, (0.95351082, -0.27422950, -0.27688602, -0.27725887)),
    ],
)
def test_visits_lead_the_table_where_they_lead_the_official_one(lam0, alpha, official):
    criterion = ALDRKLLoss(4, lam0=lam0, alpha=alpha, margin=0.0, normalize=True)
    for _ in range(200):
        got = criterion(LOGITS, TARGET, index=torch.arange(4))
    assert got.tolist() == pytest.approx(official, abs=2e-6)


@pytest.mark.parametrize(("classes", "lam0", "margin"), [(2, 1.0, 0.1), (10, 0.3, 1.0), (100, 3.0, 0.1)])
def test_visits_to_unchanged_logits_rise_to_the_exact_loss(classes, lam0, margin):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (5,), generator=generator)
    criterion = ALDRKLLoss(5, lam0=lam0, margin=margin)
    values = torch.stack([criterion(logits, target, index=torch.arange(5)) for _ in range(100)])
    torch.testing.assert_close(values[0], ldr_kl_loss(logits, target, lam=lam0, margin=margin))
    assert (values.diff(dim=0) > -1e-12).all()
    exact = aldr_kl_loss(logits, target, lam0=lam0, margin=margin)
    torch.testing.assert_close(values[-1], exact, rtol=0, atol=1e-6)


def test_a_visit_moves_only_its_own_entries_and_only_in_training():
    criterion = ALDRKLLoss(5, margin=0.0)
    criterion(LOGITS[:2], TARGET[:2], index=torch.tensor([3, 1]))
    for f, share in zip(LOGITS.double(), criterion.share[[3, 1]].tolist()):
        p = f.softmax(-1)
        assert share == pytest.approx(1 - (p * (4 * p).log()).sum().item() / (2 * np.log(4)), abs=1e-6)
    assert criterion.share[[0, 2, 4]].tolist() == [1.0, 1.0, 1.0]
    table = criterion.share.clone()
    criterion.eval()(LOGITS, TARGET, index=torch.arange(4))
    assert torch.equal(criterion.share, table)
    restored = ALDRKLLoss(5, margin=0.0)
    restored.load_state_dict(criterion.state_dict())
    assert torch.equal(restored.share, table)


def test_gradients_at_a_table_that_stays():
    lam0 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    margin = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    criterion = ALDRKLLoss(4, lam0=lam0, margin=margin, normalize=True)
    input = (LOGITS.double() + 0.05).requires_grad_()  # off the kink that |logit| has at 0
    for _ in range(2):
        criterion(input, TARGET, index=torch.arange(4))
    criterion.eval()

    def values(f, *_):
        return criterion(f, TARGET, index=torch.arange(4))

    assert torch.autograd.gradcheck(values, (input, lam0, margin))
    assert torch.autograd.gradgradcheck(values, (input, lam0, margin))


@pytest.mark.parametrize(("classes", "lam0", "alpha"), [(2, 1.0, 1.5), (7, 0.2, 3.0), (7, 4.0, 2.0), (100, 1.0, 2.0)])
def test_no_lambda_on_a_fine_grid_does_better(classes, lam0, alpha):
    rng = np.random.default_rng(0)
    logits, target = 3 * rng.standard_normal((4, classes)), rng.integers(classes, size=4)
    got = aldr_kl_loss(torch.tensor(logits), torch.tensor(target), lam0=lam0, alpha=alpha, margin=0.5).numpy()
    for value, f, y in zip(got, logits, target):
        d = gaps(f, y, 0.5)
        held = alpha * np.log(classes) / (2 * lam0)
        grid = np.linspace(0.01, 1, 1001) * lam0
        best = max(lam * log_mean_exp(d / lam) - held * (lam - lam0) ** 2 for lam in grid)
        assert best <= value + 1e-12
        assert value == pytest.approx(best, abs=1e-5)


def test_aldr_kl_held_firmly_is_ldr_kl():
    firm = aldr_kl_loss(LOGITS.double(), TARGET, lam0=0.7, alpha=1e7)
    torch.testing.assert_close(firm, ldr_kl_loss(LOGITS.double(), TARGET, lam=0.7), rtol=0, atol=1e-6)


def test_at_lambda_one_without_a_margin_it_is_cross_entropy_less_log_k():
    expected = torch.nn.functional.cross_entropy(LOGITS, TARGET, reduction="none") - np.log(4)
    torch.testing.assert_close(ldr_kl_loss(LOGITS, TARGET, lam=1.0, margin=0.0), expected)


@pytest.mark.parametrize(("lam", "reduce"), [(1e-3, np.max), (1e5, np.mean)])
def test_small_lambda_is_the_svm_and_large_lambda_the_mean_gap(lam, reduce):
    """In single precision, where a margin of 1000 lam would vanish next to a p_y that rounds to 1."""
    expected = [reduce(gaps(f, y, 1.0)) for f, y in zip(LOGITS.double().numpy(), TARGET)]
    assert ldr_kl_loss(LOGITS, TARGET, lam=lam, margin=1.0).tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_top_k_is_attained_by_filling_up_to_the_cap(k, lam):
    """p_k = min(1 / k, c exp(d_k / lam)) with c found by bisection; its gain is the loss and its excess the slope."""
    rng = np.random.default_rng(k)
    logits, target = 2 * rng.standard_normal((5, 8)), rng.integers(8, size=5)
    input = torch.tensor(logits, requires_grad=True)
    loss = ldr_top_k_loss(input, torch.tensor(target), k=k, lam=lam, margin=0.5)
    loss.sum().backward()
    for value, slope, f, y in zip(loss.tolist(), input.grad.numpy(), logits, target):
        d = gaps(f, y, 0.5)
        low, high = -200.0, 200.0
        for _ in range(100):
            c = (low + high) / 2
            p = np.minimum(1 / k, np.exp(np.minimum(d / lam + c, 0.0)))
            low, high = (c, high) if p.sum() < 1 else (low, c)
        assert value == pytest.approx(p @ d - lam * np.sum(p * np.log(8 * p)), abs=1e-9)
        np.testing.assert_allclose(slope, p - np.eye(8)[y], atol=1e-9)


def test_top_k_without_a_price_is_the_mean_of_the_k_largest_gaps():
    expected = [np.sort(gaps(f, y, 1.0))[-3:].mean() for f, y in zip(LOGITS.double().numpy(), TARGET)]
    assert ldr_top_k_loss(LOGITS, TARGET, k=3, lam=1e-3, margin=1.0).tolist() == pytest.approx(expected, abs=0.01)


def test_top_k_survives_logits_that_leave_nothing_for_the_rest():
    input = torch.tensor([[1e4, -1e4, -1e4, 0.0]], requires_grad=True)
    loss = ldr_top_k_loss(input, torch.tensor([1]), k=2, margin=0.0)
    (slope,) = torch.autograd.grad(loss, input)
    assert loss.item() == pytest.approx((2e4 + 1e4) / 2 - np.log(2), rel=1e-6)
    assert slope.tolist() == [[0.5, -1.0, 0.0, 0.5]]


def test_top_k_treats_equal_gaps_alike():
    """Three gaps of 2 and one of 0 at a cap of 1/2: no class is at the cap, so p is softmax."""
    input = torch.tensor([[2.0, 2.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = ldr_top_k_loss(input, torch.tensor([2]), k=2, margin=0.0)
    (slope,) = torch.autograd.grad(loss, input)
    top = np.exp(2) / (3 * np.exp(2) + 1)
    assert loss.item() == pytest.approx(np.log((3 * np.exp(2) + 1) / 4), abs=1e-12)
    assert slope[0].tolist() == pytest.approx([top, top, -3 * top, top], abs=1e-12)


def test_blocks_and_leading_dimensions_change_nothing(monkeypatch):
    input, target = LOGITS.repeat(3, 1).view(2, 6, 4).requires_grad_(), TARGET.repeat(3).view(2, 6)
    lam = torch.linspace(0.5, 2.0, 12).view(2, 6)
    whole = ldr_top_k_loss(input, target, lam=lam)
    monkeypatch.setattr(_blocks, "CELLS", 20)  # five samples
    blocks = ldr_top_k_loss(input, target, lam=lam)
    torch.testing.assert_close(blocks, whole)
    slopes = [torch.autograd.grad(values.sum(), input)[0] for values in (blocks, whole)]
    torch.testing.assert_close(*slopes)
    for i, j in ((0, 4), (0, 5), (1, 5)):
        alone = ldr_top_k_loss(input[i, j : j + 1], target[i, j : j + 1], lam=lam[i, j].item())
        torch.testing.assert_close(alone[0], whole[i, j])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_second_derivatives_of_top_k(k):
    input = (LOGITS.double() + 0.05).requires_grad_()  # off the kink that |logit| has at 0
    lam = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def values(f, t):
        return ldr_top_k_loss(f, TARGET, k=k, lam=t, normalize=True)

    assert torch.autograd.gradgradcheck(values, (input, lam))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # scatter_ in the slope, mapped one by one
@pytest.mark.parametrize("k", [1, 2])
def test_it_maps_over_logits_targets_and_prices(k):
    lam, input = torch.tensor([0.5, 2.0]), torch.stack([LOGITS, LOGITS.flip(0)])
    target = torch.stack([TARGET, TARGET.flip(0)])

    def slope(f, y, t):
        return torch.func.grad(lambda f: ldr_top_k_loss(f, y, k=k, lam=t, normalize=True).sum())(f)

    for f, y, t in ((input, target, lam), (LOGITS, target, 0.7), (input, TARGET, lam), (LOGITS, TARGET, lam)):
        dims = tuple(None if v is LOGITS or v is TARGET or v is t is not lam else 0 for v in (f, y, t))
        each = [tuple(v if d is None else v[i] for v, d in zip((f, y, t), dims)) for i in range(2)]
        torch.testing.assert_close(torch.vmap(slope, in_dims=dims)(f, y, t), torch.stack([slope(*one) for one in each]))


@pytest.mark.parametrize("loss", [ldr_kl_loss, aldr_kl_loss, ldr_top_k_loss])
def test_normalised_logits_forget_their_scale(loss):
    plain = loss(LOGITS / LOGITS.abs().mean(-1, keepdim=True), TARGET)
    torch.testing.assert_close(loss(LOGITS, TARGET, normalize=True), plain)
    torch.testing.assert_close(loss(50 * LOGITS, TARGET, normalize=True), plain)
    assert loss(torch.zeros(1, 4), torch.tensor([0]), normalize=True).isfinite().all()


def test_second_derivatives_of_ldr_kl():
    input = (LOGITS[:2].double() + 0.05).requires_grad_()  # off the kink that |logit| has at 0
    lam = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda f, t: ldr_kl_loss(f, TARGET[:2], lam=t, normalize=True), (input, lam))


def test_refusals():
    with pytest.raises(ValueError, match="lam: expected a number > 0, got 0"):
        ldr_kl_loss(LOGITS, TARGET, lam=0.0)
    with pytest.raises(ValueError, match="alpha: expected a number > 1, got 1"):
        aldr_kl_loss(LOGITS, TARGET, alpha=1.0)
    with pytest.raises(ValueError, match="k: expected a whole number >= 1 and <= 4, got 5"):
        ldr_top_k_loss(LOGITS, TARGET, k=5)
    with pytest.raises(ValueError, match="alpha: expected a number > 1, got 1"):
        ALDRKLLoss(4, alpha=1.0)
    with pytest.raises(ValueError, match="num_samples: expected a whole number >= 1, got 0"):
        ALDRKLLoss(0)
    with pytest.raises(ValueError, match=r"index: expected shape \(4,\), got \(2,\)"):
        ALDRKLLoss(4)(LOGITS, TARGET, index=torch.arange(2))
    with pytest.raises(ValueError, match="margin: expected a number >= 0"):
        ldr_kl_loss(LOGITS, TARGET, margin=-1.0)
