"""SNOOPI: one-step distillation under guidance of random strength, and negative prompts by subtracting attention.

Two ideas, each by itself. Distillation with a guided teacher hangs on one fixed guidance scale; here teacher and fake
network are guided alike, by a scale drawn anew each time. And a generator of one step, which classifier-free guidance
only blurs, is steered away from a negative prompt inside its cross-attention: what its queries would take from the
negative prompt is subtracted from what they take from the prompt. The second needs no training and hardly any time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._attention import inputs, keys_and_values, outputs
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels, ScoreDistillation, needed, pushed
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance",
    year=2024,
    helps=("slow-sampling", "guidance"),
    departs=(
        "the fake network is any network; the paper adapts the teacher by LoRA of rank 64",
        "the fake network goes without condition for a tenth of the samples (`drop`), so that its guidance means"
        " something; the paper does not say",
        "NASA serves cross-attention, not the joint attention of FLUX",
        "later titled Supercharged One-step Text-to-Image Diffusion Models with Negative Prompts",
    ),
    equation=(
        r"\nabla_\theta=\mathbb E_{\kappa\sim U(0.5,4)}\Bigl[w(t)\bigl(\hat\epsilon_\psi(x_t,y,\kappa)"
        r"-\hat\epsilon_\pi(x_t,y,\kappa)\bigr)\frac{\partial f_\theta}{\partial\theta}\Bigr],\qquad"
        r" Z=\operatorname{softmax}\!\Bigl(\tfrac{QK_+^{\top}}{\sqrt d}\Bigr)V_+"
        r"-\alpha\operatorname{softmax}\!\Bigl(\tfrac{QK_-^{\top}}{\sqrt d}\Bigr)V_-"
    ),
    url="https://arxiv.org/abs/2412.02687",
)


def random_guidance_scale(low: float = 0.5, high: float = 4.0, *, per_sample: bool = False) -> Levels:
    """scales(shape, generator) -> guidance scales of that shape, uniform, one for all of a batch.

    Args:
        low, high: the range; the paper has 4 for Stable Diffusion, 3 for PixArt-alpha. Equal ones fix the scale.
        per_sample: whether each sample has one of its own.

    Raises:
        ValueError: high below low.

    >>> random_guidance_scale(2.0, 2.0)((3,), None)
    tensor([2., 2., 2.])
    """
    require.number("low", low)
    require.number("high", high, at_least=low)

    def scales(shape: tuple[int, ...], generator: Randomness) -> Tensor:
        drawn = shape if per_sample else (*shape[:-1], 1)
        return (low + (high - low) * noise(drawn, generator, kind=torch.rand)).expand(shape)

    return scales


class ProperGuidanceDistillation(ScoreDistillation):
    """The procedure with players "fake" and "generator".

    A batch is {"latent": standard normals, "condition": (*replicas, B, ...)} and, where no condition is one by itself,
    {"null": like condition}; without it networks are called without condition. With {"negative": like condition} the
    teacher, and it alone, is guided away from that instead.

    Args:
        generator: latent, condition -> x.
        fake: denoise(x, sigma (, condition)), trained here; None copies the teacher.
        teacher: denoise(x, sigma (, condition)), frozen.
        levels: where scores are compared, see `log_uniform`.
        scales: guidance scales of both, see `random_guidance_scale`, which None is; 1 is no guidance.
        drop: share of samples, 0 to 1, of which the fake network learns without their condition.
        fake_steps: updates of the fake network before each of the generator.

    Raises:
        ValueError: a drop out of range, or a batch without condition.

    >>> distil = ProperGuidanceDistillation(nn.Identity(), nn.Identity(), lambda x, sigma: x, levels=None)
    >>> distil.turns(0)
    ('fake', 'generator')
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        *,
        levels: Levels,
        scales: Levels | None = None,
        drop: float = 0.1,
        fake_steps: int = 1,
    ) -> None:
        super().__init__(generator, fake, teacher, levels=levels, fake_steps=fake_steps)
        require.number("drop", drop, at_least=0.0, at_most=1.0)
        self.scales, self.drop = scales or random_guidance_scale(), drop

    def objective(self, player: str, batch: Any, *, step: int, generator: Randomness = None) -> Tensor:
        needed(batch, "condition")
        return super().objective(player, batch, step=step, generator=generator)

    def fake_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """The error of v, with the condition and, for some samples, without."""
        dropped = noise(sigma, generator, kind=torch.rand) < self.drop
        loss = super().fake_loss(x, x_t, sigma, batch, generator)
        if not self.drop:
            return loss
        null = {"condition": batch["null"]} if "null" in batch else {}
        return torch.where(dropped, super().fake_loss(x, x_t, sigma, null, generator), loss)

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """A surrogate with the gradient `push` of both guided predictions."""
        scale = over(self.scales(tuple(sigma.shape), generator).to(x), x)
        null, guided = batch.get("null"), []
        with torch.no_grad():
            for denoise, away in ((self.teacher, batch.get("negative", null)), (self.fake, null)):
                without = self._without(denoise, x_t, sigma, away)
                guided.append(without + scale * (denoise(x_t, sigma, batch["condition"]) - without))
            push = self.push(x, x_t, sigma, *guided, batch["condition"])
        return pushed(x, push).flatten(sigma.ndim).sum(-1)

    def _without(self, denoise: Denoise, x_t: Tensor, sigma: Tensor, null: Tensor | None) -> Tensor:
        return denoise(x_t, sigma) if null is None else denoise(x_t, sigma, null)


def negative_away_attention(
    query: Float[Tensor, "*batch queries d"],
    key: Float[Tensor, "*batch keys d"],
    value: Float[Tensor, "*batch keys v"],
    negative_key: Float[Tensor, "*batch negatives d"],
    negative_value: Float[Tensor, "*batch negatives v"],
    *,
    alpha: float = 0.2,
    mask: Tensor | None = None,
) -> Float[Tensor, "*batch queries v"]:
    """softmax(Q K^T / sqrt d) V - alpha softmax(Q K-^T / sqrt d) V-, not normalised again.

    Args:
        query, key, value: of the layer and of the prompt.
        negative_key, negative_value: of the negative prompt, by the same projections.
        alpha: 0.1 for Stable Diffusion 1.5, 0.2 for 2.1, 0.5 for PixArt-alpha; 0 is plain attention.
        mask: of prompt tokens, as `scaled_dot_product_attention` takes it.

    Raises:
        ValueError: an alpha that is not finite, tensors that are not floating, or shapes that do not fit each other.

    >>> one = torch.ones(1, 1)
    >>> negative_away_attention(one, one, 5 * one, one, 10 * one, alpha=0.5)
    tensor([[0.]])
    """
    given = {"key": key, "value": value, "negative_key": negative_key, "negative_value": negative_value}
    for name, tensor in {"query": query, **given}.items():
        require.floating(name, tensor, at_least_dims=2)
    for name, tensor in given.items():
        partner = negative_key if name.startswith("negative") else key
        width = query if name.endswith("key") else value
        require.same_shape(name, tensor, (*query.shape[:-2], partner.shape[-2], width.shape[-1]))
    require.number("alpha", alpha)
    toward = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return toward - alpha * F.scaled_dot_product_attention(query, negative_key, negative_value)


class NegativeAwaySteerAttention:
    """`negative_away_attention` as a `diffusers` attention processor, for cross-attention layers.

    Args:
        negative: embedded negative prompt, (1 or batch, tokens, features).
        alpha: see `negative_away_attention`.

    Raises:
        ValueError: a negative prompt of another shape; in use, a layer that attends to itself or has keys of its own
            for the text.

    >>> NegativeAwaySteerAttention(torch.zeros(1, 77, 768)).alpha
    0.2
    """

    def __init__(self, negative: Float[Tensor, "batch tokens features"], *, alpha: float = 0.2) -> None:
        require.floating("negative", negative, dims=3)
        require.number("alpha", alpha)
        self.negative, self.alpha = negative, alpha

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected a prompt, as only cross-attention is steered")
        query, key, value, mask = inputs(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        away = keys_and_values(attn, self.negative.to(encoder_hidden_states).expand(len(query), -1, -1))
        found = negative_away_attention(query, key, value, *away, alpha=self.alpha, mask=mask)
        return outputs(attn, found, hidden_states)


def steer_away(model: Any, negative: Float[Tensor, "batch tokens features"], *, alpha: float = 0.2) -> dict[str, Any]:
    """Give every cross-attention layer ("attn2") of a `diffusers` model the negative prompt.

    Args:
        model: with `attn_processors` and `set_attn_processor`, such as `UNet2DConditionModel`.
        negative, alpha: see `NegativeAwaySteerAttention`.

    Returns:
        The processors as they were, for `set_attn_processor`, which takes the prompt away again.

    Raises:
        ValueError: a model without such layers.

    >>> class Model:
    ...     attn_processors = {"down.attn1.processor": None, "down.attn2.processor": None}
    ...     def set_attn_processor(self, processors):
    ...         self.attn_processors = processors
    >>> model = Model()
    >>> before = steer_away(model, torch.zeros(1, 77, 768))
    >>> [type(p).__name__ for p in model.attn_processors.values()]
    ['NoneType', 'NegativeAwaySteerAttention']
    """
    before = dict(model.attn_processors)
    layers = [name for name in before if "attn2" in name]
    if not layers:
        raise ValueError("model: expected cross-attention layers, named attn2, got none")
    processor = NegativeAwaySteerAttention(negative, alpha=alpha)
    model.set_attn_processor({name: processor if name in layers else p for name, p in before.items()})
    return before
