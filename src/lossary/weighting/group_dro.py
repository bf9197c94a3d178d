"""Group DRO: minimise the loss of the worst group, by weights on groups that grow with the group's loss.

Every group g has a share q_g of the objective. At each batch q_g is multiplied by exp(step_size * loss of g)
and the shares are rescaled to sum to one, so that groups which lag behind gain. Use it when groups are known in
training (a hospital, a dialect, label x background) and the worst of them counts. Regularise strongly or stop
early, as the paper insists: a network that can fit every training row drives all groups' losses to zero, after
which there is no worst group left to weigh and nothing is gained over plain training. The paper draws its
batches from all groups equally often; with few rows of a rare group in a batch the weights are noisy.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import measure, weighting

PAPER = Paper(
    title="Distributionally Robust Neural Networks for Group Shifts:"
    " On the Importance of Regularization for Worst-Case Generalization",
    year=2020,
    helps=("worst-group",),
    departs=(
        "the official code's greedy variant (CVaR over groups) and its loss normalisation are left out",
        "sampling groups equally often is the sampler's business",
    ),
    equation=(
        r"q_g\leftarrow\frac{q_g\,e^{\eta(L_g+C/\sqrt{n_g})}} "
        r"{\sum_{g'}q_{g'}\,e^{\eta(L_{g'}+C/\sqrt{n_{g'}})}},\qquad "
        r"\min_\theta\ \sum_g q_g\,L_g(\theta)"
    ),
    url="https://arxiv.org/abs/1911.08731",
)


@weighting(
    examples=({}, {"step_size": 0.5, "adjustment": 2.0, "group_counts": (50, 30, 20)}),
    tune={"step_size": (0.001, 0.01, 0.1)},
)
class GroupDRO(nn.Module):
    """Weights with which the mean loss of a batch becomes sum_g q_g L_g over the groups in it, Algorithm 1.

    In training mode a call first updates the shares, q_g <- q_g exp(step_size (L_g + adjustment / sqrt(n_g)))
    rescaled to sum 1, where L_g is the mean loss of group g in the batch; a group that is absent keeps its
    factor 1, as in the paper. (The official code adds the adjustment to absent groups too.) The model then
    learns from the new shares. In evaluation mode q stays.

    Under `torch.distributed` losses and counts are summed over all processes, so that they share one q and
    together do what a single process would do with all their samples.

    Args:
        num_groups: m.
        step_size: eta_q >= 0, in 1/nats; 0 weighs all groups alike for good.
        adjustment: C >= 0 of the group adjustments, 0 to 5 in the paper, in nats: small groups, whose training
            loss says less about new data, count as worse than they look.
        group_counts: n_g, training rows of each group; needed where `adjustment` is not 0.

    Attributes:
        q: (num_groups,), the shares; a buffer.

    Raises:
        ValueError: a hyper-parameter out of range; losses that are not (batch,), or group numbers that do not
            fit them. Several replicas at once are refused too, since each needs a q of its own.

    >>> dro = GroupDRO(2, step_size=1.0)
    >>> losses, group = torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1])
    >>> (dro(losses, group=group) * losses).mean()  # q_1 L_1, with q_1 = e^2 / (1 + e^2)
    tensor(1.7616)
    >>> dro.q
    tensor([0.1192, 0.8808])
    """

    def __init__(
        self,
        num_groups: int,
        *,
        step_size: float = 0.01,
        adjustment: float = 0.0,
        group_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require.whole("num_groups", num_groups, at_least=1)
        require.number("step_size", step_size, at_least=0.0)
        require.number("adjustment", adjustment, at_least=0.0)
        if adjustment and (group_counts is None or len(group_counts) != num_groups or min(group_counts) < 1):
            raise ValueError(f"group_counts: expected {num_groups} numbers >= 1 for the adjustment, got {group_counts}")
        self.step_size = step_size
        self.register_buffer("q", torch.full((num_groups,), 1 / num_groups))
        counts = torch.tensor(group_counts if adjustment else [1.0] * num_groups, dtype=torch.float32)
        self.register_buffer("gap", adjustment / counts.sqrt(), persistent=False)

    @torch.no_grad()
    def forward(self, losses: Float[Tensor, " batch"], *, group: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Update q, in training mode, and weigh the samples: q_g * batch / (samples of g in the batch)."""
        require.floating("losses", losses, dims=1)
        require.integers("group", group, shape=losses.shape)
        values = losses.to(self.q.dtype)
        sums = self.q.new_zeros(2, len(self.q)).index_add(1, group, torch.stack([torch.ones_like(values), values]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count, total = sums
        each = count.clamp(min=1)
        if self.training:
            gain = torch.where(count > 0, total / each + self.gap, 0)
            self.q.copy_((self.q.log() + self.step_size * gain).softmax(0))
        return (self.q * count.sum() / each).index_select(0, group).to(losses.dtype)


@measure(
    known=(
        {
            "inputs": {
                "input": [[2.0, 1.0], [0.0, 1.0], [3.0, 0.5], [0.2, 0.1], [1.0, 4.0]],
                "target": [0, 1, 1, 0, 1],
                "group": [0, 0, 2, 2, 2],
            },
            "value": 0.6666666666666666,
        },
    ),
    within=(0.0, 1.0),
)
def worst_group_accuracy(
    input: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], group: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Smallest accuracy over the groups that occur, from 0 to 1.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        group: group numbers from 0; those that do not occur are passed over.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.5], [0.2, 0.1]])
    >>> worst_group_accuracy(logits, torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 2, 2]))
    tensor(0.5000)
    """
    require.floating("input", input, dims=2)
    require.classes(input, target)
    require.integers("group", group, shape=target.shape)
    _, member = group.unique(return_inverse=True)
    hits = member.bincount(weights=(input.argmax(-1) == target).double())
    return (hits / member.bincount()).min().to(input.dtype)
