"""DeQA-Score's labels against the official script's numbers and the two equations they solve; its loss pair by pair."""

import math
from statistics import NormalDist

import pytest
import torch

from lossary.losses import score_to_soft_label, soft_label_to_score, thurstone_fidelity_loss


def label(mean, std, **hyper):
    return score_to_soft_label(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64), **hyper)


@pytest.mark.parametrize(
    ("density", "mean", "std", "expected"),
    [
        ("cdf", 2.2, 0.7, [0.15120309457912148, 0.5177892796610217, 0.3070350429675918, 0.027749697794564317, 0.0]),
        ("pdf", 4.1, 1.0, [0.0, 0.02266344294052581, 0.24034404107709176, 0.4645747533133822, 0.30073105342828993]),
        (
            "cdf",
            3.5,
            0.3,
            [0.0, 0.00042906070620457376, 0.49957093909379546, 0.4995709390937955, 0.0004290607062044675],
        ),
        ("cdf", 4.8, 0.7, [0.0, 0.0, 0.012492593248797864, 0.383502514847718, 0.6634739282558472]),
    ],
)
def test_labels_are_those_of_the_official_script(density, mean, std, expected):
    """From build_soft_labels/gen_soft_label.py of zhiyuanyou/DeQA-Score, lowest level first; it adds 1e-9 somewhere."""
    torch.testing.assert_close(
        label(mean, std, density=density), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(("mean", "std", "levels"), [(2.8, 1.3, 5), (3.0, 1.3, 5), (3.0001, 1.3, 5), (4.3, 1.9, 7)])
def test_the_label_is_a_linear_map_of_the_masses_with_sum_one_and_the_scores_mean(mean, std, levels):
    """Where nothing is cut off: equal differences a (raw_i - raw_j), sum 1, mean kept; also at the middle score."""
    p = label(mean, std, levels=levels, max_shift=1e-6).tolist()
    normal = NormalDist(mean, std)
    raw = [normal.cdf(c + 0.5) - normal.cdf(c - 0.5) for c in range(1, levels + 1)]
    assert math.fsum(p) == pytest.approx(1, abs=1e-12)
    assert math.fsum(c * x for c, x in enumerate(p, start=1)) == pytest.approx(mean, abs=1e-12)
    slopes = [(p[i] - p[0]) / (raw[i] - raw[0]) for i in range(1, levels) if abs(raw[i] - raw[0]) > 1e-4]
    assert max(slopes) - min(slopes) < 1e-7
    assert min(p) > 0


def test_the_middle_score_is_no_exception():
    around = [label(3 + d, 0.9) for d in (-1e-3, 0.0, 1e-3)]
    torch.testing.assert_close(around[1], (around[0] + around[2]) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(around[1], around[1].flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (3.25, 0.0, [0, 0, 0.75, 0.25, 0]),
        (3.25, 0.19, [0, 0, 0.75, 0.25, 0]),
        (1.02, 1.0, [0.98, 0.02, 0, 0, 0]),  # cutting off would move the mean by more than 0.1
        (5.0, 0.1, [0, 0, 0, 0, 1]),
        (0.2, 0.1, [1, 0, 0, 0, 0]),  # beyond the scale
    ],
)
def test_where_the_map_does_not_serve_the_two_nearest_levels_do(mean, std, expected):
    torch.testing.assert_close(label(mean, std), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_all_labels_are_distributions_with_nearly_the_scores_mean():
    mean, std = torch.meshgrid(torch.linspace(1, 5, 81), torch.linspace(0, 3, 31), indexing="ij")
    for density in ("cdf", "pdf"):
        p = score_to_soft_label(mean, std, density=density, max_shift=0.05)
        assert (p >= 0).all()
        torch.testing.assert_close(p.sum(-1), torch.ones_like(mean), rtol=0, atol=0.06)  # the official cut, too
        got, _ = soft_label_to_score(p)
        assert (got - mean).abs().max() <= 0.05 + 1e-5


def test_mean_and_spread_of_a_distribution():
    p = torch.tensor([[0.1, 0.2, 0.0, 0.7], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    mean, std = soft_label_to_score(p)
    torch.testing.assert_close(mean, torch.tensor([3.3, 2.5], dtype=torch.float64), rtol=0, atol=1e-14)
    expected = torch.tensor([math.sqrt(0.1 + 0.8 + 0.7 * 16 - 3.3**2), math.sqrt(1.25)], dtype=torch.float64)
    torch.testing.assert_close(std, expected, rtol=0, atol=1e-12)


def test_a_certain_level_has_no_spread_and_no_wild_gradient():
    logits = torch.tensor([200.0, 0.0, 0.0], requires_grad=True)
    mean, std = soft_label_to_score(logits.softmax(0))
    assert std.item() < 1e-18
    (mean + std).backward()
    assert logits.grad.isfinite().all()


def scores():
    g = torch.Generator().manual_seed(0)
    draw = [torch.rand(7, generator=g, dtype=torch.float64) for _ in range(4)]
    return 4 * draw[0], 4 * draw[1], 0.2 + draw[2], 0.2 + draw[3]


def test_the_fidelity_loss_pair_by_pair():
    input, target, input_std, target_std = scores()
    group = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    got = thurstone_fidelity_loss(input, target, input_std=input_std, target_std=target_std, group=group)
    for i in range(7):
        values = []
        for j in range(7):
            if i != j and group[i] == group[j]:
                p, q = (
                    NormalDist().cdf((s[i] - s[j]).item() / math.hypot(d[i], d[j]))
                    for s, d in ((input, input_std), (target, target_std))
                )
                values.append(1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q)))
        assert got[i].item() == pytest.approx(sum(values) / max(len(values), 1), abs=1e-7)
    assert got[5] == 0


def test_it_rests_where_predictions_are_right_up_to_a_shift_of_each_group():
    _, target, _, std = scores()
    group = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    input = (target + 5.0 * group).requires_grad_()
    loss = thurstone_fidelity_loss(input, target, input_std=std, target_std=std, group=group)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)
    loss.sum().backward()
    assert input.grad.abs().max() < 1e-14
    assert thurstone_fidelity_loss(input.detach(), target, input_std=std, target_std=std).max() > 0.1


def test_a_fixed_spread_of_one_is_the_official_training():
    """pred = (1 + erf(d / 2)) / 2 with use_fix_std, as in modeling_mplug_owl2.py."""
    input, target, std = torch.tensor([[2.5, 1.1], [4.0, 3.0], [0.6, 0.8]], dtype=torch.float64)
    p, q = (1 + math.erf(1.4 / 2)) / 2, (1 + math.erf(1.0 / math.sqrt(2))) / 2
    expected = 1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q))
    got = thurstone_fidelity_loss(input, target, target_std=std)
    torch.testing.assert_close(got, torch.full((2,), expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_gradients_of_scores_and_spreads():
    input, target, input_std, target_std = scores()
    input.requires_grad_()
    input_std.requires_grad_()

    def call(z, d):
        return thurstone_fidelity_loss(z, target, input_std=d, target_std=target_std)

    assert torch.autograd.gradcheck(call, (input, input_std))
    one = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (input, one))


def test_hopeless_pairs_ties_and_certain_orders_stay_finite():
    input = torch.tensor([1e4, -1e4, 0.0, 0.0], requires_grad=True)
    target = torch.tensor([-1e4, 1e4, 3.0, 3.0])
    for std in (0.0, 1.0):
        loss = thurstone_fidelity_loss(input, target, input_std=std, target_std=std)
        assert loss.isfinite().all()
        (grad,) = torch.autograd.grad(loss.sum(), input)
        assert grad.isfinite().all()
    hopeless = thurstone_fidelity_loss(input[:2], target[:2])
    torch.testing.assert_close(hopeless, torch.ones(2), rtol=0, atol=1e-6)
    tie = thurstone_fidelity_loss(input[2:], target[2:], target_std=0.0)
    torch.testing.assert_close(tie, torch.zeros(2), rtol=0, atol=1e-6)


def test_stacks_and_order_of_the_batch():
    input, target, input_std, _ = scores()
    group = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    flip = {"input_std": input_std.flip(0), "group": group.flip(0)}
    one = thurstone_fidelity_loss(input, target, input_std=input_std, group=group)
    other = thurstone_fidelity_loss(input.flip(0), target.flip(0), **flip)
    torch.testing.assert_close(other, one.flip(0), rtol=0, atol=1e-14)
    stack = {name: torch.stack([{"input_std": input_std, "group": group}[name], flip[name]]) for name in flip}
    both = thurstone_fidelity_loss(torch.stack([input, input.flip(0)]), torch.stack([target, target.flip(0)]), **stack)
    torch.testing.assert_close(both, torch.stack([one, other]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    input, target, input_std, target_std = (t.to(dtype) for t in scores())
    loss = thurstone_fidelity_loss(input, target, input_std=input_std, target_std=target_std)
    assert loss.dtype == dtype
    double = [t.double() for t in (input, target, input_std, target_std)]
    expected = thurstone_fidelity_loss(*double[:2], input_std=double[2], target_std=double[3])
    torch.testing.assert_close(loss.double(), expected, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.01)
    assert score_to_soft_label(input.abs(), input_std).dtype == dtype


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mean", lambda x: score_to_soft_label(x.long(), x)),
        ("std", lambda x: score_to_soft_label(x, x[:2])),
        ("levels", lambda x: score_to_soft_label(x, x, levels=1)),
        ("density", lambda x: score_to_soft_label(x, x, density="mass")),
        ("min_std", lambda x: score_to_soft_label(x, x, min_std=0.0)),
        ("max_shift", lambda x: score_to_soft_label(x, x, max_shift=-1.0)),
        ("probs", lambda x: soft_label_to_score(x[:1])),
        ("probs", lambda x: soft_label_to_score(x.long())),
        ("input", lambda x: thurstone_fidelity_loss(x.long(), x)),
        ("target", lambda x: thurstone_fidelity_loss(x, x[:2])),
        ("input_std", lambda x: thurstone_fidelity_loss(x, x, input_std=-1.0)),
        ("target_std", lambda x: thurstone_fidelity_loss(x, x, target_std=x[:2])),
        ("target_std", lambda x: thurstone_fidelity_loss(x, x, target_std=x.long())),
        ("group", lambda x: thurstone_fidelity_loss(x, x, group=x)),
    ],
)
def test_what_does_not_fit_is_refused(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(torch.ones(3))
