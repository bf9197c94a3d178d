"""Counting on sequences of tokens: n-grams and longest common subsequences."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any


def ngrams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    """How often each run of n tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def common_subsequence(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest sequence that both contain in order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
