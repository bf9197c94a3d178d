"""The square-root schedule by its definition, and embeddings of a stack."""

import math

import pytest
import torch

from lossary.diffusion._tokens import embedded, square_root


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_schedule(factor):
    process, t = square_root(factor=factor), torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    kept = [1 - math.sqrt(u + 1e-4) for u in t.tolist()]
    assert process.alpha(t).tolist() == pytest.approx([math.sqrt(k) for k in kept])
    assert process.sigma(t).tolist() == pytest.approx([factor * math.sqrt(1 - k) for k in kept])
    torch.testing.assert_close(process.time(process.ratio(t)), t, atol=1e-9, rtol=1e-9)
    assert process.ratio(torch.ones(1)).isfinite()


def test_embeddings_of_a_stack_are_those_of_each():
    g = torch.Generator().manual_seed(0)
    table, tokens = torch.randn(3, 5, 2, generator=g), torch.randint(5, (3, 4, 6), generator=g)
    found = embedded(table, tokens)
    for s in range(3):
        assert torch.equal(found[s], embedded(table[s], tokens[s]))
        assert torch.equal(found[s, 1, 2], table[s, tokens[s, 1, 2]])
