"""UniF2ace: masked tokens and their score learned together, and experts grouped by what the model is doing.

A model that both writes images as tokens and answers questions about them trains its masked tokens by cross-entropy
plus a little score entropy (D3Diff). With probabilities that sum to 1 the score's part is the cross-entropy over the
mask rate t, so that the sum is cross-entropy with weight 1 + a / t: nearly complete texts count for more, which is the
likelihood bound's own weight, mixed in by a. The feed-forward layer becomes experts in two groups, one for generating
and one for understanding, so that neither task overwrites the other; then one gate for the whole sequence mixes in
features of frozen encoders. Worth a try where one network serves two such tasks; for one alone, take the bound itself.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._noise import noise
from lossary.paper import Paper

PAPER = Paper(
    title="UniF^2ace: Fine-grained Face Understanding and Generation with Unified Multimodal Models",
    year=2025,
    helps=("text-generation", "multi-task"),
    departs=(
        "no code is published: the time weight of the cross-entropy (constant), the form of the noise expert"
        " (w x + (1 - w) noise, w learned) and the factor of the balance loss (the caller's) are our reading",
        "features are resampled by one head of attention",
        "no language model, image tokeniser, encoders or face data",
    ),
    equation=(
        r"\mathcal L=-\log p_\theta(x_0\mid x_t)+a\sum_{y}\bigl[s_y-r_y\log s_y+r_y(\log r_y-1)\bigr] "
        r"=\Bigl(1+\frac at\Bigr)\bigl(-\log p_\theta(x_0\mid x_t)\bigr),\qquad s_y=\frac{p_\theta(y\mid x_t)}t"
    ),
    url="https://arxiv.org/abs/2503.08120",
)

Task = Literal["generation", "understanding"]


def dual_discrete_diffusion_loss(
    input: Float[Tensor, "*batch length tokens"],
    target: Int[Tensor, "*batch length"],
    *,
    masked: Bool[Tensor, "*batch length"],
    t: Float[Tensor, "*batch"],
    weight: float = 0.01,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy + weight * score entropy, mean over the masked tokens: nats per token, 0 where none is masked.

    The score entropy of s = p / t against r = onehot(target) / t, with p a softmax, is the cross-entropy over t.

    Args:
        input: logits of the clean tokens. target: those tokens.
        masked: which of them the network did not see.
        t: mask rate, above 0 to 1.
        weight: a; 0 is plain masked modelling.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a negative weight.

    >>> import torch
    >>> logits, target, masked = torch.zeros(1, 2, 4), torch.tensor([[3, 0]]), torch.tensor([[True, False]])
    >>> dual_discrete_diffusion_loss(logits, target, masked=masked, t=torch.tensor([0.5]), weight=0.1)  # 1.2 log 4
    tensor([1.6636])
    """
    require.classes(input, target)
    require.same_shape("t", t, tuple(target.shape[:-1]))
    require.number("weight", weight, at_least=0.0)
    if masked.dtype is not torch.bool or masked.shape != target.shape:
        raise ValueError(f"masked: expected bool of shape {tuple(target.shape)}, got {masked.dtype} {masked.shape}")
    missed = F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return (1 + weight / t) * (missed * masked).sum(-1) / masked.sum(-1).clamp(min=1)


class TokenSequenceMoE(nn.Module):
    """Experts for each token, then for the sequence, in a group of their own for each task.

    Token level: a shared expert plus the `active` best of `experts` routed ones, weighted by their softmax gates.
    Sequence level: one gate from the mean token, the best two of three ways, weighted to sum to 1. Generation: leave
    the tokens, clear them, or mix in noise; understanding: leave them, or mix in the first or the second features,
    w x + (1 - w) attention(x, features).

    Args:
        width: D of the tokens.
        features: widths of the two frozen encoders' features, such as of CLIP and of a face recogniser.
        experts, active: routed experts in each group, and how many of them a token uses.
        hidden: width inside an expert; None is 4 D.

    Raises:
        ValueError: arguments out of range.

    >>> import torch
    >>> layer = TokenSequenceMoE(8, features=(5, 6))
    >>> y, balance = layer(torch.randn(2, 3, 8), task="generation")
    >>> y.shape, balance.shape
    (torch.Size([2, 3, 8]), torch.Size([]))
    """

    def __init__(
        self, width: int, *, features: tuple[int, int], experts: int = 4, active: int = 2, hidden: int | None = None
    ) -> None:
        super().__init__()
        require.whole("width", width, at_least=1)
        require.whole("experts", experts, at_least=1)
        require.whole("active", active, at_least=1, at_most=experts)
        if len(features) != 2:
            raise ValueError(f"features: expected two widths, got {features}")
        self.active, inner = active, hidden or 4 * width

        def expert() -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

        tasks = get_args(Task)
        self.shared = nn.ModuleDict({task: expert() for task in tasks})
        self.routed = nn.ModuleDict({task: nn.ModuleList(expert() for _ in range(experts)) for task in tasks})
        self.token_gate = nn.ModuleDict({task: nn.Linear(width, experts, bias=False) for task in tasks})
        self.sequence_gate = nn.ModuleDict({task: nn.Linear(width, 3, bias=False) for task in tasks})
        self.keys = nn.ModuleList(nn.Linear(wide, width) for wide in features)
        self.values = nn.ModuleList(nn.Linear(wide, width) for wide in features)
        self.kept = nn.Parameter(torch.full((3,), 0.5))  # w of noise and of the two features

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        *,
        task: Task,
        features: tuple[Tensor, Tensor] | None = None,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, ""]]:
        """New tokens, without a residual path, and the balance loss sum_i f_i P_i, 1 where experts share evenly.

        f_i is expert i's share of the tokens' choices times the number of experts, P_i its mean gate.

        Args:
            x: tokens.
            task: whose experts.
            features: (batch, places, width) of each encoder, for understanding.
            generator: of the noise.

        Raises:
            ValueError: an unknown task, or understanding without features.
        """
        require.floating("x", x, dims=3)
        require.one_of("task", task, get_args(Task))
        if task == "understanding" and features is None:
            raise ValueError("features: expected two tensors for understanding, got None")
        gates = self.token_gate[task](x).softmax(-1)
        best, chosen = gates.topk(self.active)
        weight = torch.zeros_like(gates).scatter(-1, chosen, best)
        h = self.shared[task](x)
        for i, expert in enumerate(self.routed[task]):  # type: ignore[arg-type]
            h = h + weight[..., i : i + 1] * expert(x)
        often = F.one_hot(chosen, gates.shape[-1]).to(gates).mean((0, 1, 2)) * gates.shape[-1]
        balance = (often * gates.mean((0, 1))).sum()
        return self._sequence(h, task, features, generator), balance

    def _sequence(
        self, h: Tensor, task: Task, features: tuple[Tensor, Tensor] | None, generator: Generator | None
    ) -> Tensor:
        if task == "generation":
            ways = [h, torch.zeros_like(h), self.kept[0] * h + (1 - self.kept[0]) * noise(h, generator)]
        else:
            seen = [
                F.scaled_dot_product_attention(h, key(f), value(f))
                for key, value, f in zip(self.keys, self.values, features or ())
            ]
            ways = [h, *(w * h + (1 - w) * s for w, s in zip(self.kept[1:], seen))]
        best, chosen = self.sequence_gate[task](h.mean(1)).softmax(-1).topk(2)
        share = best / best.sum(-1, keepdim=True)
        every = torch.stack(ways, dim=1)  # (batch, ways, length, width)
        rows = torch.arange(len(h), device=h.device)[:, None]
        return (share[..., None, None] * every[rows, chosen]).sum(1)
