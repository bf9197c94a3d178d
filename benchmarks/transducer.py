"""The transducer loss, forward and backward, against a plain loop over the cells of the lattice.

8 utterances of 200 frames and 50 labels, 32 classes, single precision, one thread. The loop does all utterances at
once, one cell after another, and leaves the gradient to autograd; both give the same values.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._timing import seconds
from lossary.losses import rnnt_loss

BATCH, FRAMES, LABELS, CLASSES = 8, 200, 50, 32
ROUNDS = 5


def measure() -> list[dict[str, str | float]]:
    """How many times faster, the median over rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, FRAMES, LABELS + 1, CLASSES, generator=generator).requires_grad_()
    targets = torch.randint(CLASSES - 1, (BATCH, LABELS), generator=generator)
    frames, labels = torch.full((BATCH,), FRAMES), torch.full((BATCH,), LABELS)

    def turn(loss: Callable[..., Tensor]) -> Tensor:
        logits.grad = None
        values = loss(logits, targets, frames, labels)
        values.sum().backward()
        return values.detach()

    torch.testing.assert_close(turn(rnnt_loss), turn(_cell_by_cell), rtol=1e-5, atol=0)
    ratios = []
    for _ in range(ROUNDS):
        theirs = seconds(lambda: turn(_cell_by_cell))
        ratios.append(theirs / statistics.median(seconds(lambda: turn(rnnt_loss)) for _ in range(3)))
    torch.set_num_threads(threads)
    name = f"{BATCH} x {FRAMES} frames x {LABELS} labels"
    return [{"name": name, "ratio": statistics.median(ratios), "target": ">= 20", "unit": "times faster"}]


def _cell_by_cell(logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Graves' recursion as one would write it down, for utterances of one length."""
    log_p = logits.log_softmax(-1)
    blank = log_p[..., -1]
    label = log_p[:, :, :-1].gather(-1, targets[:, None, :, None].expand(-1, FRAMES, -1, 1)).squeeze(-1)
    alpha = {(0, 0): torch.zeros(BATCH)}
    for t in range(FRAMES):
        for u in range(LABELS + 1):
            ways = []
            if t:
                ways.append(alpha[t - 1, u] + blank[:, t - 1, u])
            if u:
                ways.append(alpha[t, u - 1] + label[:, t, u - 1])
            if ways:
                alpha[t, u] = ways[0] if len(ways) == 1 else torch.logaddexp(*ways)
    return -(alpha[FRAMES - 1, LABELS] + blank[:, -1, -1])
