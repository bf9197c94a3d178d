"""Class-balanced weights against counted draws, the official code's losses, and DDP on two processes."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lossary.criterion import Criterion
from lossary.weighting import GlyphCharacterEncoder, class_balanced_loss, class_balanced_weights
from tests.processes import in_two

COUNTS = (500, 80, 9, 2)
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.3, 0.2, -2.0, 1.5], [-0.7, 1.1, 0.4, 3.0]])
TARGET = torch.tensor([0, 2, 1])


def by_class(class_counts, beta):
    classes = torch.arange(len(class_counts))
    return class_balanced_weights(
        torch.ones(len(class_counts), dtype=torch.float64), target=classes, class_counts=class_counts, beta=beta
    )


def test_the_effective_number_counts_distinct_draws():
    """All n^4 ways to draw from 4 prototypes, beta = 3/4: the weights are inverse to the mean number of distinct."""

    def distinct(n):
        return sum(len(set(draws)) for draws in product(range(4), repeat=n)) / 4**n

    inverse = torch.tensor([1 / distinct(n) for n in (1, 2, 3, 5)], dtype=torch.float64)
    torch.testing.assert_close(by_class((1, 2, 3, 5), 0.75), 4 * inverse / inverse.sum())


def test_beta_runs_from_equal_weights_to_inverse_frequency():
    assert by_class((30, 10), 0.0).tolist() == [1.0, 1.0]
    assert by_class((30, 10), 1.0).tolist() == [0.5, 1.5]
    torch.testing.assert_close(by_class(COUNTS, 1 - 1e-9), by_class(COUNTS, 1.0))


def test_a_class_without_rows_weighs_nothing_and_leaves_the_others_alone():
    assert by_class((30, 0, 10), 1.0).tolist() == [0.5, 0.0, 1.5]
    with pytest.raises(ValueError, match=r"class_counts: expected a class with rows, got \(0, 0\)"):
        by_class((0, 0), 0.9)
    with pytest.raises(ValueError, match="class_counts: expected a number >= 0, got -1"):
        by_class((3, -1), 0.9)


# CB_loss in mahmouddaif/AraDIC on these logits, one sample at a time.
OFFICIAL = {
    ("softmax_bce", 0.99, 2.0): [0.0101530, 0.9559840, 0.1069079],
    ("softmax_bce", 0.9, 0.5): [0.0732800, 0.9805551, 0.4292133],
    ("focal", 0.99, 2.0): [0.0358320, 2.3691492, 0.3535256],
    ("focal", 0.9, 0.5): [0.6586992, 3.5041776, 1.8249433],
}


@pytest.mark.parametrize("setting", OFFICIAL)
def test_losses_are_those_of_the_official_code(setting):
    form, beta, gamma = setting
    values = class_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, form=form, beta=beta, gamma=gamma)
    assert values.tolist() == pytest.approx(OFFICIAL[setting], abs=1e-6)


def test_the_other_forms_are_torchs_losses_times_the_weight():
    weights = by_class(COUNTS, 0.99)[TARGET].float()
    softmax = class_balanced_loss(LOGITS, TARGET, class_counts=torch.tensor(COUNTS), beta=0.99)
    torch.testing.assert_close(softmax, weights * F.cross_entropy(LOGITS, TARGET, reduction="none"))
    sigmoid = class_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, form="sigmoid")
    bce = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(TARGET, 4).float(), reduction="none")
    torch.testing.assert_close(sigmoid, weights * bce.mean(-1))


def test_softmax_bce_is_exact_where_probabilities_round_to_one():
    """At logits (200, 0) and label 1, -log p_1 = -log(1 - p_0) = 200, which a logarithm of 1 - p cannot give."""
    value = class_balanced_loss(
        torch.tensor([[200.0, 0.0]]), torch.tensor([1]), class_counts=(5, 5), form="softmax_bce"
    )
    assert value.item() == pytest.approx(200.0)


def test_refusals():
    with pytest.raises(ValueError, match="class_counts: expected 4 counts, one for each class, got 3"):
        class_balanced_loss(LOGITS, TARGET, class_counts=(5, 3, 1))
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0 and <= 1, got 1\.5"):
        class_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, beta=1.5)
    with pytest.raises(ValueError, match="gamma: expected a number, got a tensor"):
        class_balanced_loss(LOGITS, TARGET, class_counts=COUNTS, gamma=torch.tensor(2.0))
    with pytest.raises(ValueError, match="size: expected a whole number >= 18, got 17"):
        GlyphCharacterEncoder(size=17)
    with pytest.raises(ValueError, match=r"images: expected pictures of 20 x 20, got shape \(2, 36, 36\)"):
        GlyphCharacterEncoder(size=20)(torch.zeros(2, 36, 36))


def test_the_encoder_is_the_official_stack_and_keeps_characters_in_their_places():
    encoder = GlyphCharacterEncoder().double()
    shapes = [tuple(weight.shape) for weight in encoder.parameters() if weight.ndim > 1]
    assert shapes == [(8, 1, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (128, 200), (128, 128)]  # 36 pixels end as 5 x 5
    alphabet = torch.rand(7, 36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[3, 1, 4, 1], [5, 0, 2, 6]])
    read = encoder(alphabet[text])
    torch.testing.assert_close(read, encoder(alphabet)[text])
    h = alphabet[4][None, None]
    for i, weight in enumerate(w for w in encoder.parameters() if w.ndim == 4):
        bias = list(encoder.parameters())[2 * i + 1]
        h = F.relu(F.conv2d(h, weight, bias))
        h = F.max_pool2d(h, 2) if i < 2 else h.flatten(1)
    *_, w1, b1, w2, b2 = encoder.parameters()
    h = F.relu(F.relu(h @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(read[0, 2], h[0])


def batch():
    g = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, generator=g), torch.tensor([0, 0, 0, 1, 0, 2, 3, 0])


def gradients(model, criteria, x, y):
    found = []
    for criterion in criteria:
        model.zero_grad()
        criterion(model(x), y).backward()
        found.append(torch.cat([w.grad.flatten() for w in model.parameters()]).clone())
    return found


def parts():
    plain = torch.nn.CrossEntropyLoss(reduction="none")

    def weigh(losses, *, target):
        return class_balanced_weights(losses, target=target, class_counts=COUNTS)

    model = torch.nn.Linear(5, 4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    losses = [Criterion(class_balanced_loss, class_counts=COUNTS, form=form) for form in ("softmax", "focal")]
    return model, [Criterion(plain, weighting=weigh), *losses]


def _one_of_two(rank):
    """Gradients that one of two processes ends up with, each having seen half of the batch."""
    model, criteria = parts()
    x, y = (values[rank::2] for values in batch())  # each rare class is on one process alone
    found = torch.stack(gradients(model, criteria, x, y))
    dist.all_reduce(found)  # DistributedDataParallel takes the mean, half of this sum
    return found / 2


def test_two_processes_learn_what_one_does_with_both_halves(tmp_path):
    found = in_two(_one_of_two, tmp_path)[0]
    model, criteria = parts()
    torch.testing.assert_close(found, torch.stack(gradients(model, criteria, *batch())))
