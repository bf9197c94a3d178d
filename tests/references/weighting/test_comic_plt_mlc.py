"""COMIC against the official code's losses and classifiers, and against numbers worked by hand."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lossary.losses import asymmetric_loss
from lossary.weighting import (
    HeadTailBalancedClassifier,
    ReflectiveLabelCorrectorLoss,
    class_aware_label_correction,
    head_tail_balanced_loss,
    multi_focal_modifier_loss,
)

# wannature/COMIC, run on the CPU on these logits and counts.
LOGITS = torch.tensor([[2.0, -1.0, 1.5, -3.0], [0.3, 2.5, -2.0, 1.2], [-0.7, 1.1, 3.0, 0.4]])
TARGET = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
COUNTS = (1240, 300, 40, 6)


def test_multi_focal_modifier_loss_is_the_official_one():
    """MultiGrainedFocalLoss with gamma_neg 3 and its weights squared, from the power 1/6 to 1/3."""
    z = LOGITS.clone().requires_grad_()
    values = multi_focal_modifier_loss(z, TARGET, class_counts=COUNTS)
    assert values.tolist() == pytest.approx([0.829386, 0.634115, 3.672326], abs=1e-6)
    values.sum().backward()
    official = [-0.119203, 0.0004616, 0.3087158, 0.0, 0.038886, -0.1018324, 8e-07, 0.2353054]
    official += [0.0019471, 0.1786045, 0.4733165, -0.7424077]
    assert z.grad.flatten().tolist() == pytest.approx(official, abs=1e-6)


def test_of_equal_counts_it_is_the_asymmetric_loss():
    settings = {"class_counts": (5, 5, 5, 5), "gamma_pos": 0.0, "w_pos": 1.0, "w_neg": 1.0, "detach_focus": False}
    got = multi_focal_modifier_loss(LOGITS, TARGET, **settings)
    torch.testing.assert_close(got, asymmetric_loss(LOGITS, TARGET, gamma_pos=1.0, gamma_neg=4.0, clip=0.05))


def test_exact_at_saturation_without_clip():
    value = multi_focal_modifier_loss(
        torch.tensor([[200.0, -200.0]]), torch.tensor([[0.0, 1.0]]), class_counts=(3, 3), clip=0.0
    )
    assert value.item() == pytest.approx(400.0)


def test_correction_takes_what_is_sure_and_above_its_class():
    p = torch.tensor([[0.9, 0.75, 0.6, 0.8], [0.8, 0.74, 0.1, 0.9], [0.97, 0.71, 0.2, 0.95]])
    target = torch.tensor([[0.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    # Class means 0.89, 0.733, 0.3 and 0.883.
    expected = [[1, 1, 0, -1], [0, 1, 0, 1], [1, 0, 1, 1]]
    assert class_aware_label_correction(p.logit(), target).tolist() == expected
    assert class_aware_label_correction(p.logit(), target, threshold=0.96).tolist()[0] == [0, 0, 0, -1]


def test_reflective_label_corrector_is_the_official_one_over_epochs():
    """ReflectiveLabelCorrectorLoss with batch_size 3: its value is the sum over the batch."""
    corrector = ReflectiveLabelCorrectorLoss(COUNTS)
    for value, slope, counts in (
        (1.2943050, -0.1000247, [1240, 301, 42, 7]),
        (1.2912605, -0.0998470, [1240, 302, 44, 8]),
    ):
        z = LOGITS.clone().requires_grad_()
        values = corrector(z, TARGET)
        assert values.sum().item() == pytest.approx(value, abs=1e-6)
        values.sum().backward()
        assert z.grad[0, 2].item() == pytest.approx(slope, abs=1e-6)
        assert corrector.counts.tolist() == counts
    assert corrector.new_epoch()(LOGITS, TARGET).sum().item() == pytest.approx(1.2943050, abs=1e-6)
    corrector.eval()(LOGITS, TARGET)
    assert corrector.counts.tolist() == [1240, 301, 42, 7]  # evaluation recalls nothing


def test_recalled_labels_of_all_processes_count(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda recalled: recalled.mul_(2))  # the other process saw the same
    corrector = ReflectiveLabelCorrectorLoss(COUNTS)
    corrector(LOGITS, TARGET)
    assert corrector.counts.tolist() == [1240, 302, 44, 8]


def test_nothing_given_and_nothing_recalled():
    corrector = ReflectiveLabelCorrectorLoss((4, 0))
    values = corrector(torch.full((3, 2), -1.0), torch.zeros(3, 2))
    expected = multi_focal_modifier_loss(torch.full((3, 2), -1.0), torch.zeros(3, 2), class_counts=(4, 1), power=1 / 6)
    torch.testing.assert_close(values, 3 * expected)


FEATURES = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 2.0]])
WEIGHT = torch.tensor([[0.2, -0.4, 0.1], [0.5, 0.3, -0.2]])


def test_head_and_tail_logits_are_the_official_ones():
    """Head- and TailNormClassifier with one group, alpha 2, and the moving vector (0.3, 0.4, 1.2)."""
    classifier = HeadTailBalancedClassifier(3, 2, attention=0.0).eval()
    with torch.no_grad():
        classifier.weight.copy_(WEIGHT)
        classifier.moving.copy_(torch.tensor([0.3, 0.4, 1.2]))
    logits = classifier(FEATURES.expand(3, 2, 3))
    still = [-9.3407764, 13.1105099, 7.7041426, -3.4935493]
    for plain in (logits.balanced, logits.head, logits.tail):
        assert plain.flatten().tolist() == pytest.approx(still, abs=1e-5)
    head, tail = [-9.3249836, 13.1284122, 7.2756286, -3.9793391], [-9.3723602, 13.0747051, 8.5611725, -2.5219707]
    assert logits.head_moved.flatten().tolist() == pytest.approx(head, abs=1e-5)
    assert logits.tail_moved.flatten().tolist() == pytest.approx(tail, abs=1e-5)


def test_the_attention_is_the_official_one():
    """AdditivetionAttention, its weights set as here, a tenth of it on the balanced features."""
    classifier = HeadTailBalancedClassifier(3, 3).eval()
    with torch.no_grad():
        classifier.key.weight.copy_(0.5 * torch.eye(3))
        classifier.query.weight.copy_(0.3 * torch.eye(3).flip(0))
        classifier.energy.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        classifier.weight.copy_(torch.eye(3).expand(3, 3, 3))
    logits = classifier(torch.stack([FEATURES, FEATURES.flip(0) + 0.1, FEATURES * 0.5 - 0.2]))
    attended = torch.tensor([[1.0539416, 1.9842334, -0.8465446], [0.514725, -0.5213823, 2.0642548]])
    torch.testing.assert_close(logits.balanced, F.normalize(attended, dim=1) * 16 / (1 + 1 / 32), atol=1e-5, rtol=0)


def test_moving_vectors_follow_the_batches_in_training_only():
    classifier = HeadTailBalancedClassifier(3, 2)
    batch = torch.stack([FEATURES, 2 * FEATURES, FEATURES - 1])
    before = classifier.eval()(batch)
    torch.testing.assert_close(before.head_moved, before.head)  # nothing has moved yet
    classifier.train()(batch)
    classifier(batch)
    classifier.eval()(batch + 1)
    mean = FEATURES.mean(0)
    torch.testing.assert_close(classifier.moving, 1.9 * torch.stack([2 * mean, mean - 1]))


HEAD = LOGITS
BALANCED = torch.tensor([[0.5, -0.2, 1.0, 0.0], [1.0, 1.2, -1.0, 0.3], [0.0, 0.4, 0.9, 2.0]])
TAIL = torch.tensor([[0.1, 0.2, -0.3, 0.9], [0.6, 0.1, 0.2, -1.5], [1.0, 0.4, -0.7, 0.8]])


def test_head_tail_loss_is_the_official_one():
    """HeadTailBalancerLoss with the loss above."""
    values = head_tail_balanced_loss(BALANCED, HEAD, TAIL, TARGET, class_counts=COUNTS)
    assert values.shape == (3,)
    assert values.sum().item() == pytest.approx(2.8698147, abs=1e-5)


def test_only_the_balanced_network_learns_from_it():
    inputs = [z.clone().requires_grad_() for z in (BALANCED, HEAD, TAIL)]
    head_tail_balanced_loss(*inputs, TARGET, class_counts=COUNTS).sum().backward()
    assert inputs[0].grad.abs().sum() > 0
    assert inputs[1].grad is inputs[2].grad is None


def test_shares_of_a_perfect_head_and_tail_are_equal():
    sure = (2 * TARGET - 1) * 1e4
    got = head_tail_balanced_loss(BALANCED, sure, sure, TARGET, class_counts=COUNTS)
    product = sure.softmax(-1) * BALANCED.softmax(-1)
    torch.testing.assert_close(got, multi_focal_modifier_loss(product, TARGET, class_counts=COUNTS))


def test_refusals():
    with pytest.raises(ValueError, match=r"class_counts: expected 4 counts, one for each class, got shape \(2,\)"):
        multi_focal_modifier_loss(LOGITS, TARGET, class_counts=(3, 2))
    with pytest.raises(ValueError, match=r"gamma_pos: expected gamma_pos \+ w_pos 0 or at least 1, got 0.5"):
        multi_focal_modifier_loss(LOGITS, TARGET, class_counts=COUNTS, gamma_pos=0.5)
    with pytest.raises(ValueError, match="threshold: expected a number >= 0 and <= 1, got 2"):
        class_aware_label_correction(LOGITS, TARGET, threshold=2)
    with pytest.raises(ValueError, match=r"features: expected shape \(3, batch, 3\), got \(2, 4, 3\)"):
        HeadTailBalancedClassifier(3, 2)(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="tail: expected shape"):
        head_tail_balanced_loss(BALANCED, HEAD, TAIL[:2], TARGET, class_counts=COUNTS)
