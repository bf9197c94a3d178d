"""The engine of proper scores, against scoringrules and against their defining property."""

import numpy as np
import scoringrules
import torch
from scipy.optimize import minimize

from lossary.uncertainty._scoring import brier_score, log_score


def test_two_classes_score_as_in_scoringrules():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(40, generator=g, dtype=torch.float64)
    y = torch.randint(2, (40,), generator=g)
    pair = torch.stack([1 - p, p], -1)
    brier = scoringrules.brier_score(y.numpy(), p.numpy())
    np.testing.assert_allclose(brier_score(pair, y), 2 * brier, atol=1e-12)
    np.testing.assert_allclose(log_score(pair, y), scoringrules.log_score(y.numpy(), p.numpy()), atol=1e-12)


def test_scores_are_least_for_the_true_distribution():
    truth = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for score in (log_score, brier_score):

        def risk(z, score=score):
            p = torch.softmax(torch.tensor([*z, 0.0], dtype=torch.float64), 0)
            return float(truth @ score(p.expand(3, 3), torch.arange(3)))

        best = minimize(risk, [0.0, 0.0], method="BFGS").x
        found = torch.softmax(torch.tensor([*best, 0.0], dtype=torch.float64), 0)
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)
