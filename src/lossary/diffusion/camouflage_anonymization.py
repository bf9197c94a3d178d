"""CAMOUFLaGE: repaint the people in a photograph as someone else, scene and attributes kept.

What a picture shows but whom (depth, pose, outlines, ...) steers a frozen diffusion network by control branches; their
sum still gives the person away. A further branch, which alone would restore the original, is used with its sign
turned, so that every step moves away from it. A lighter form has no control branches: each person's attributes become
a few tokens, read by a cross-attention of their own beside the frozen one. For sharing pictures whose content must
stay useful; it is no guarantee of privacy, so measure re-identification by the strongest embedding at hand.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="Latent Diffusion Models for Attribute-Preserving Image Anonymization",
    year=2024,
    helps=("guidance", "inverse-problems"),
    departs=(
        "neither the paper's equations nor its code were at hand, only its abstract and reviews: the formula of the"
        " guidance, its defaults, the rescaling and the end by noise level are stand-ins",
        "the five control branches (depth, normals, segmentation, pose, outlines), their weights and the network are"
        " the caller's; so is the encoder of attributes",
        "claims: faces of 8x8 pixels drawn from five numbers, a perceptron whose control is the picture at half the"
        " resolution and whose further branch is those numbers; the lighter form is tested, not claimed",
    ),
    equation=(
        r"\hat\epsilon=\epsilon_u+g(\epsilon_c-\epsilon_u)-w(\epsilon_{\mathrm{id}}-\epsilon_c),\qquad "
        r"\hat\epsilon\leftarrow\hat\epsilon\,\frac{\lVert\epsilon_u+g(\epsilon_c-\epsilon_u)\rVert}"
        r"{\lVert\hat\epsilon\rVert}"
    ),
    url="https://arxiv.org/abs/2403.14790",
)


def anonymization_guidance(
    conditional: Float[Tensor, "batch *data"],
    unconditional: Float[Tensor, "batch *data"],
    identity: Float[Tensor, "batch *data"],
    *,
    scale: float = 7.5,
    repulsion: float = 1.0,
    rescale: bool = True,
) -> Float[Tensor, "batch *data"]:
    """Classifier-free guidance, pushed away from what the branch that knows the original adds; predictions of noise.

    u + scale (c - u) - repulsion (id - c), at the norm that it has without repulsion.

    Args:
        conditional: c, under the structural controls.
        unconditional: u, without.
        identity: id, under the same controls and the branch that would restore the original.
        scale: g, of classifier-free guidance.
        repulsion: w, at least 0.
        rescale: False leaves the norm alone.

    Raises:
        ValueError: shapes that differ, or a negative repulsion.

    >>> import torch
    >>> c, u, known = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 9.0]])
    >>> anonymization_guidance(c, u, known, scale=1.0)
    tensor([[ 4.7434, -1.5811]])
    """
    require.floating("conditional", conditional, at_least_dims=1)
    require.same_shape("unconditional", unconditional, tuple(conditional.shape))
    require.same_shape("identity", identity, tuple(conditional.shape))
    require.number("scale", scale)
    require.number("repulsion", repulsion, at_least=0.0)
    guided = unconditional + scale * (conditional - unconditional)
    pushed = guided - repulsion * (identity - conditional)
    if not rescale:
        return pushed
    before, after = (v.flatten(1).norm(dim=1) if v.ndim > 1 else v.abs() for v in (guided, pushed))
    return pushed * over(before / after.clamp(min=torch.finfo(after.dtype).tiny), pushed)


class AnonymizingDenoiser:
    """denoise(x, sigma) -> x_0 under `anonymization_guidance`, for any sampler; three evaluations, at low noise two.

    Args:
        conditional, unconditional, identity: denoisers; see there.
        scale, repulsion: see there.
        lowest: noise level below which nothing is pushed, so that the end is undisturbed; in the first 0.7 of a
            schedule's steps with the level at 0.7 of them. At a level of 0 nothing is, for noise is not defined there.

    Raises:
        ValueError: a number out of range; when called, several noise levels.

    >>> import torch
    >>> denoise = AnonymizingDenoiser(lambda x, sigma: 0 * x, lambda x, sigma: 0 * x, lambda x, sigma: x, lowest=1.0)
    >>> denoise(torch.ones(1, 2), 0.5), denoise(torch.ones(1, 2), 2.0)
    (tensor([[0., 0.]]), tensor([[0., 0.]]))
    """

    def __init__(
        self,
        conditional: Denoise,
        unconditional: Denoise,
        identity: Denoise,
        *,
        scale: float = 7.5,
        repulsion: float = 1.0,
        lowest: float = 0.0,
    ) -> None:
        require.number("scale", scale)
        require.number("repulsion", repulsion, at_least=0.0)
        require.number("lowest", lowest, at_least=0.0)
        self.conditional, self.unconditional, self.identity = conditional, unconditional, identity
        self.scale, self.repulsion, self.lowest = scale, repulsion, lowest

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x_0, of the shape of x (batch, ...), at one level for the whole batch."""
        if isinstance(sigma, Tensor) and sigma.numel() != 1:
            raise ValueError(f"sigma: expected one noise level for all, got shape {tuple(sigma.shape)}")
        sigma = float(sigma)
        conditional, unconditional = self.conditional(x, sigma), self.unconditional(x, sigma)
        if not self.repulsion or sigma == 0 or sigma < self.lowest:
            return unconditional + self.scale * (conditional - unconditional)
        known = self.identity(x, sigma)
        noises = ((x - clean) / sigma for clean in (conditional, unconditional, known))
        return x - sigma * anonymization_guidance(*noises, scale=self.scale, repulsion=self.repulsion)


@layer(
    shape=(2, 3, 5),
    examples=({"features": 5, "width": 8}, {"features": 5, "width": 4, "tokens": 1}),
)
class AttributeTokens(nn.Module):
    """Each person's attributes as a few tokens, people behind each other: (batch, people, features) to
    (batch, people * tokens, width).

    Args:
        features: of a person's attributes, or of an embedding without identity.
        width: of a token, that of the text's.
        tokens: M, for each person.

    Raises:
        ValueError: a number below 1; an input that is not floating, or of another shape.

    >>> import torch
    >>> AttributeTokens(6, 16)(torch.zeros(2, 3, 6)).shape
    torch.Size([2, 12, 16])
    """

    def __init__(self, features: int, width: int, *, tokens: int = 4) -> None:
        super().__init__()
        for name, value in (("features", features), ("width", width), ("tokens", tokens)):
            require.whole(name, value, at_least=1)
        self.features, self.tokens = features, tokens
        self.project = nn.Linear(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, attributes: Tensor) -> Tensor:
        require.floating("attributes", attributes, at_least_dims=2)
        if attributes.shape[-1] != self.features:
            raise ValueError(f"attributes: expected to end in {self.features}, got shape {tuple(attributes.shape)}")
        split = self.project(attributes).unflatten(-1, (self.tokens, -1))
        return self.norm(split).flatten(-3, -2)  # type: ignore[no-any-return]


def decoupled_attention(
    attended: Float[Tensor, "batch heads pixels width"],
    query: Float[Tensor, "batch heads pixels width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
    *,
    present: Bool[Tensor, "batch tokens"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "batch heads pixels width"]:
    """A frozen cross-attention's result, plus scale times attention of the same queries to further tokens.

    Only the projections that make `key` and `value` of the tokens need training; with values of 0 nothing changes.

    Args:
        attended: what the frozen attention to the text gave, before its last projection.
        query: its queries.
        key, value: of the further tokens, by projections of their own.
        present: which tokens there are; where there is none the result is `attended`. None is all.
        scale: of the addition.

    Raises:
        ValueError: shapes that do not fit.

    >>> import torch
    >>> x = torch.ones(1, 1, 2, 3)
    >>> decoupled_attention(x, x, x[:, :, :1], 5 * x[:, :, :1], scale=0.5)[0, 0, 0]
    tensor([3.5000, 3.5000, 3.5000])
    """
    require.floating("query", query, dims=4)
    require.same_shape("attended", attended, tuple(query.shape))
    require.floating("key", key, dims=4)
    batch, heads, _, width = query.shape
    if tuple(key.shape) != (batch, heads, key.shape[2], width):
        raise ValueError(f"key: expected shape {(batch, heads, 'tokens', width)}, got {tuple(key.shape)}")
    require.same_shape("value", value, tuple(key.shape))
    mask = None
    if present is not None:
        if present.dtype is not torch.bool or present.shape != (len(key), key.shape[2]):
            raise ValueError(f"present: expected bool of shape {(len(key), key.shape[2])}, got {tuple(present.shape)}")
        there = present.any(1)
        mask = (present | ~there[:, None])[:, None, None]  # a row without any would be all NaN
        value = torch.where(there[:, None, None, None], value, 0.0)
    return attended + scale * F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def reidentification_rate(
    embeddings: Float[Tensor, "probes width"],
    identity: Int[Tensor, " probes"],
    gallery: Float[Tensor, "photos width"],
    gallery_identity: Int[Tensor, " photos"],
    *,
    top: int = 1,
) -> Float[Tensor, ""]:
    """The share of anonymised people found among photographs: 0 is hidden, 1 is known to all.

    A person is found if one of the `top` photographs of highest cosine similarity is theirs.

    Args:
        embeddings: of anonymised people, by an identity network.
        identity: who they are.
        gallery, gallery_identity: of known photographs, other than those that were anonymised.
        top: k of top-k, at most the number of photographs.

    Raises:
        ValueError: shapes or dtypes that do not fit, nobody to find or no photographs.

    >>> import torch
    >>> photos, who = torch.eye(2), torch.tensor([0, 1])
    >>> reidentification_rate(torch.tensor([[3.0, 1.0], [2.0, 1.0]]), who, photos, who)
    tensor(0.5000)
    """
    require.floating("embeddings", embeddings, dims=2)
    require.floating("gallery", gallery, dims=2)
    require.integers("identity", identity, shape=(len(embeddings),))
    require.integers("gallery_identity", gallery_identity, shape=(len(gallery),))
    if not len(embeddings) or gallery.shape[1] != embeddings.shape[1]:
        raise ValueError(f"embeddings: expected (at least 1, {gallery.shape[1]}), got {tuple(embeddings.shape)}")
    require.whole("top", top, at_least=1, at_most=len(gallery))
    alike = embeddings @ F.normalize(gallery, dim=-1).T  # a person's own length moves no photograph past another
    nearest = gallery_identity[alike.topk(top, dim=-1).indices]
    return (nearest == identity[:, None]).any(-1).to(embeddings.dtype).mean()


def attribute_agreement(
    classify: Callable[[Tensor], Tensor], anonymised: Tensor, attributes: Int[Tensor, "people kinds"]
) -> Float[Tensor, " kinds"]:
    """The share of people whose attributes a classifier still reads as they were, for each kind of attribute.

    Args:
        classify: pictures to class numbers (people, kinds).
        anonymised: the pictures.
        attributes: the true classes.

    Raises:
        ValueError: shapes or dtypes that do not fit, or nobody.

    >>> import torch
    >>> attribute_agreement(lambda x: (x > 0).long(), torch.tensor([[1.0], [-1.0]]), torch.tensor([[1], [1]]))
    tensor([0.5000])
    """
    require.integers("attributes", attributes)
    if attributes.ndim != 2 or not len(attributes) or len(anonymised) != len(attributes):
        raise ValueError(f"attributes: expected ({len(anonymised)}, kinds), got {tuple(attributes.shape)}")
    found = classify(anonymised)
    require.integers("classify", found, shape=tuple(attributes.shape))
    return (found == attributes).float().mean(0)
