"""Error norm truncation against the official code's numbers and closed forms."""

import math

import pytest
import torch
from torch import nn

from lossary.criterion import Criterion
from lossary.losses import _blocks
from lossary.weighting import ErrorNormTruncationLoss, error_norm

LOGITS = torch.tensor(
    [
        [[2.0, 0.0, -1.0, 0.5], [0.3, -0.2, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0], [6.0, 1.0, 0.0, 0.0]],
        [[1.0, 5.0, 0.0, -1.0], [0.0, 0.5, 1.0, 1.5], [-3.0, 3.0, 0.0, 0.0], [0.2, 0.1, 0.0, 7.0]],
    ]
)
TARGET = torch.tensor([[0, 3, 2, 2], [0, 2, 3, 1]])  # 1 is padding
# compute_el2n and label_smoothed_nll_loss (epsilon 0) in fairseq/criterions/label_smoothed_cross_entropy_token.py of
# tianjianl/error_norm_truncation on these; their fraction of 0.25 counts the padding and cuts two tokens.
ERRORS = [0.3459, 1.3637, 0.8660, 1.4043, 1.3827, 0.8773, 1.3180]
ABOVE_1_2 = [0.3423496, 0.0, 1.3862944, 0.0, 0.0, 1.2873387, 0.0, 0.0]
TOP_TWO = [0.3423496, 4.0564132, 1.3862944, 0.0, 0.0, 1.2873387, 3.0971746, 0.0]


def test_errors_and_truncated_losses_are_those_of_the_official_code():
    assert error_norm(LOGITS, TARGET).flatten()[:7].tolist() == pytest.approx(ERRORS, abs=1e-4)
    by_threshold = ErrorNormTruncationLoss(threshold=1.2, ignore_index=1)(LOGITS, TARGET)
    assert by_threshold.flatten().tolist() == pytest.approx(ABOVE_1_2, abs=1e-6)
    by_fraction = ErrorNormTruncationLoss(fraction=2 / 7 + 1e-6, ignore_index=1)(LOGITS, TARGET)
    assert by_fraction.flatten().tolist() == pytest.approx(TOP_TWO, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_errors_of_a_flat_and_of_a_certain_prediction(classes):
    flat, certain = torch.zeros(1, classes), torch.zeros(1, classes)
    certain[0, 0] = 1e4
    right, wrong = torch.tensor([0]), torch.tensor([1])
    assert error_norm(flat, right).item() == pytest.approx(math.sqrt(1 - 1 / classes), abs=1e-6)
    assert error_norm(certain, right).item() == 0.0
    assert error_norm(certain, wrong).item() == pytest.approx(math.sqrt(2), abs=1e-6)


def test_a_small_error_keeps_its_digits():
    """The expanded square, sum p^2 - 2 p_y + 1, would be 0 or rounding here."""
    miss = math.exp(-12.0) / (1 + math.exp(-12.0))  # of two classes; the error is sqrt(2) * miss
    error = error_norm(torch.tensor([[12.0, 0.0]]), torch.tensor([0])).item()
    assert error == pytest.approx(math.sqrt(2) * miss, rel=1e-2)


def test_blocks_change_nothing(monkeypatch):
    whole = error_norm(LOGITS, TARGET)
    monkeypatch.setattr(_blocks, "CELLS", 12)  # three tokens at a time
    assert torch.equal(error_norm(LOGITS, TARGET), whole)


def test_equally_improbable_targets_are_told_apart():
    """Both targets have probability 0.01; the paper's point is that only the second looks like a mistake."""
    flat = torch.full((100,), 0.01).log()
    peaked = torch.tensor([0.01, 0.98] + [0.01 / 98] * 98).log()
    values = ErrorNormTruncationLoss(threshold=1.3)(torch.stack([flat, peaked]), torch.tensor([0, 0]))
    assert values.tolist() == pytest.approx([-math.log(0.01), 0.0], abs=1e-5)


def test_what_is_cut_or_ignored_teaches_nothing():
    logits = LOGITS.clone().requires_grad_()
    ErrorNormTruncationLoss(threshold=1.2, ignore_index=1)(logits, TARGET).sum().backward()
    plain = LOGITS.softmax(-1) - nn.functional.one_hot(TARGET, 4)
    kept = torch.tensor(ABOVE_1_2).view(2, 4, 1) > 0
    assert torch.allclose(logits.grad, plain * kept, atol=1e-6)


def test_equal_errors_are_all_kept_and_a_fraction_without_tokens_cuts_none():
    loss = ErrorNormTruncationLoss(fraction=0.5)
    assert loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).tolist() == pytest.approx([math.log(3)] * 4)
    assert loss(torch.zeros(2, 3), torch.tensor([-100, -100])).tolist() == [0.0, 0.0]


def test_it_starts_after_the_warm_up_which_survives_a_checkpoint_and_rests_in_evaluation():
    loss = ErrorNormTruncationLoss(threshold=1.2, warmup=2, ignore_index=1)
    cut = []
    for _ in range(2):
        cut.append((loss(LOGITS, TARGET) == 0).sum().item())
        loss.eval()
        cut.append((loss(LOGITS, TARGET) == 0).sum().item())
        loss.train()
    resumed = ErrorNormTruncationLoss(threshold=1.2, warmup=2, ignore_index=1)
    resumed.load_state_dict(loss.state_dict())
    cut.append((resumed(LOGITS, TARGET) == 0).sum().item())
    cut.append((resumed.eval()(LOGITS, TARGET) == 0).sum().item())
    assert cut == [1, 1, 1, 1, 5, 1]  # one token is padding


def test_without_cuts_it_drops_in_for_cross_entropy_on_padded_sequences():
    input, target = LOGITS.movedim(-1, 1), TARGET.masked_fill(TARGET == 1, -100)
    criterion = Criterion(ErrorNormTruncationLoss, threshold=1.5, class_dim=1, reduction="sum")
    assert criterion(input, target).item() == pytest.approx(nn.CrossEntropyLoss(reduction="sum")(input, target).item())


def test_refusals():
    with pytest.raises(ValueError, match=r"fraction: expected a number >= 0 and < 1, got 1.0"):
        ErrorNormTruncationLoss(fraction=1.0)
    with pytest.raises(ValueError, match="threshold: expected a number, got a tensor"):
        ErrorNormTruncationLoss(threshold=torch.tensor(1.2))
    with pytest.raises(ValueError, match="ignore_index: expected a whole number, got None"):
        ErrorNormTruncationLoss(ignore_index=None)
