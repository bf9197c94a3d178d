import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lossary.tasks import (
    Seeds,
    accuracy,
    auroc,
    balanced_accuracy,
    cross_entropy,
    log_loss,
    mean_average_precision,
    stacked_mlp,
    top_hessian_eigenvalue,
    worst_group_accuracy,
)


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 200, 4, generator=generator)
    target = torch.randint(4, (3, 200), generator=generator)
    return logits, target, torch.randint(5, (3, 200), generator=generator)


def test_accuracies_are_scikit_learns(scored) -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    logits, target, group = scored
    guess = logits.argmax(-1)
    for s in range(3):
        within = [accuracy_score(target[s][group[s] == g], guess[s][group[s] == g]) for g in range(5)]
        assert accuracy(logits, target)[s] == pytest.approx(100 * accuracy_score(target[s], guess[s]))
        assert balanced_accuracy(logits, target)[s] == pytest.approx(100 * balanced_accuracy_score(target[s], guess[s]))
        assert worst_group_accuracy(logits, target, group)[s] == pytest.approx(100 * min(within))


def test_absent_classes_and_groups_do_not_count() -> None:
    logits = torch.eye(4)[torch.tensor([[0, 3, 3, 1]])]
    target = torch.tensor([[0, 3, 0, 1]])
    assert balanced_accuracy(logits, target).tolist() == [pytest.approx(100 * 2.5 / 3)]  # recalls 1/2, 1, 1
    assert worst_group_accuracy(logits, target, torch.tensor([[4, 4, 2, 4]])).tolist() == [0]
    assert worst_group_accuracy(logits, target, torch.tensor([[4, 4, 4, 2]])).tolist() == [pytest.approx(200 / 3)]


def test_auroc_is_scikit_learns_with_ties(scored) -> None:
    from sklearn.metrics import roc_auc_score

    score = (2 * scored[0][..., 0]).round()  # about ten distinct values
    positive = scored[1] == 0
    assert score.unique().numel() < 20
    for s in range(3):
        assert auroc(score, positive)[s] == pytest.approx(100 * roc_auc_score(positive[s], score[s]), abs=1e-10)
    assert auroc(torch.zeros(2, 6), torch.tensor([1, 0, 0, 1, 0, 0])).tolist() == [50, 50]
    assert math.isnan(auroc(torch.arange(3.0), torch.zeros(3)))


def test_mean_average_precision_is_scikit_learns_with_ties() -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 80, 5, generator=generator).mul(2).round()
    target = (torch.rand(3, 80, 5, generator=generator) < 0.2).float()
    for s in range(3):
        expected = 100 * average_precision_score(target[s], score[s])
        assert mean_average_precision(score, target)[s] == pytest.approx(expected, abs=1e-10)
    without = target[0].clone()
    without[:, 2] = 0  # a label that never occurs is passed over
    expected = 100 * average_precision_score(without[:, [0, 1, 3, 4]], score[0][:, [0, 1, 3, 4]])
    assert mean_average_precision(score[0], without) == pytest.approx(expected, abs=1e-10)
    assert math.isnan(mean_average_precision(score[0], torch.zeros(80, 5)))


def test_log_loss_is_scikit_learns(scored) -> None:
    from sklearn.metrics import log_loss as reference

    logits, target, _ = scored
    for s in range(3):
        expected = reference(target[s], logits[s].double().softmax(-1), labels=range(4))
        assert log_loss(logits, target)[s] == pytest.approx(expected, rel=1e-6)


def test_targets_may_be_shared_and_no_gradient_remains(scored) -> None:
    logits, target, group = scored[0].requires_grad_(), scored[1][0], scored[2][0]
    repeated = target.expand(3, -1)
    for measure in (accuracy, balanced_accuracy, log_loss):
        assert torch.equal(measure(logits, target), measure(logits, repeated))
        assert not measure(logits, target).requires_grad
        assert measure(logits[0], target).ndim == 0
    assert worst_group_accuracy(logits, target, group).shape == (3,)
    assert not auroc(logits[..., 0], target == 0).requires_grad


def test_top_hessian_eigenvalue_is_that_of_the_dense_hessian() -> None:
    seeds = Seeds((4, 5))
    model = stacked_mlp((3, 4, 3), seeds, activation="tanh").double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (2, 30), generator=generator)
    found = top_hessian_eigenvalue(model, x, y, loss=cross_entropy, seeds=seeds, iterations=300)
    for s in range(2):
        single = model.replica(s)
        names, values = zip(*single.named_parameters())
        sizes = [value.numel() for value in values]

        def mean_loss(flat: torch.Tensor, s=s, single=single, names=names, values=values, sizes=sizes) -> torch.Tensor:
            pieces = [piece.view_as(value) for piece, value in zip(flat.split(sizes), values)]
            return torch.nn.functional.cross_entropy(functional_call(single, dict(zip(names, pieces)), (x[s],)), y[s])

        flat = torch.cat([value.detach().flatten() for value in values])
        eigenvalues = np.linalg.eigvalsh(torch.autograd.functional.hessian(mean_loss, flat))
        assert found[s] == pytest.approx(max(eigenvalues, key=abs), rel=1e-6)
