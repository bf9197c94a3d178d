"""Distribution Transformer: prior and data in, posterior out, in one pass and for any prior of a family.

A prior that is a Gaussian mixture becomes a set of tokens, one a component; they attend to one another and to tokens
of the data, and come out as the components of the posterior. Trained once, on priors and data drawn for the purpose,
it takes a new prior without training again, and its posterior may be the prior of the next update. Use it where the
same kind of inference is asked for again and again and a simulator draws as many examples as you like. It knows no
more than its training: a prior or data far from what was drawn get a confident wrong answer.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Distribution Transformers: Fast Approximate Bayesian Inference With On-The-Fly Prior Adaptation",
    year=2025,
    helps=("uncertainty", "train-test-shift"),
    url="https://arxiv.org/abs/2502.02463",
    departs=(
        "weights are kept 1e-6 away from 0 and 1 on their way in, so that a single component has a finite logit; in the"
        " official code that is a setting",
        "a source may give many observations, a token each; the official code has one token a source",
    ),
    equation=(
        r"\ell=-\log q_\theta(x\mid\varphi)-\log q_\theta(x\mid z,\varphi),\qquad "
        r"q_\theta=\sum_{k=1}^K w_k\,\mathcal N(\mu_k,\,L_kL_k^\top),\quad x\sim\varphi,\ z\sim p(z\mid x)"
    ),
)


class GMMTokens(nn.Module):
    """Gaussian mixtures to tokens and back, a token a component, without any order among them.

    A token is a perceptron of (logit of the weight, mean, logarithm of the Cholesky factor's diagonal, what is below
    it); another perceptron leads back, where weights are sigmoids divided by their sum and the diagonal is an
    exponential plus a jitter.

    Args:
        state_size: D, dimensions of the mixture's variable.
        d_model: width of a token.
        hidden: widths of the perceptrons' hidden layers, in the order of the way in.
        jitter: added to the Cholesky factor's diagonal, at least 0.

    Raises:
        ValueError: numbers out of range, mixtures of other than D dimensions.

    >>> tokens = GMMTokens(2, d_model=8)
    >>> components = MultivariateNormal(torch.zeros(5, 3, 2), torch.eye(2))
    >>> mixture = MixtureSameFamily(Categorical(torch.ones(5, 3)), components)  # five mixtures of three
    >>> tokens(mixture).shape, tokens.decode(tokens(mixture)).sample().shape
    (torch.Size([5, 3, 8]), torch.Size([5, 2]))
    """

    def __init__(
        self, state_size: int, *, d_model: int = 32, hidden: Sequence[int] = (32,), jitter: float = 1e-6
    ) -> None:
        super().__init__()
        require.whole("state_size", state_size, at_least=1)
        require.whole("d_model", d_model, at_least=1)
        require.number("jitter", jitter, at_least=0.0)
        self.state_size, self.jitter = state_size, jitter
        sizes = (1 + state_size + state_size * (state_size + 1) // 2, *hidden, d_model)
        self.embedding, self.de_embedding = _perceptron(sizes), _perceptron(sizes[::-1])

    def forward(self, mixture: MixtureSameFamily) -> Float[Tensor, "*batch components d_model"]:
        """Tokens of mixtures of multivariate normals."""
        normal = mixture.component_distribution
        if not isinstance(normal, MultivariateNormal) or normal.event_shape != (self.state_size,):
            raise ValueError(
                f"mixture: expected multivariate normals in {self.state_size} dimensions,"
                f" got {type(normal).__name__} with events {tuple(normal.event_shape)}"
            )
        factor = normal.scale_tril
        below = torch.tril_indices(self.state_size, self.state_size, -1)
        logit = torch.logit(mixture.mixture_distribution.probs, eps=1e-6).unsqueeze(-1)
        diagonal = factor.diagonal(dim1=-2, dim2=-1).log()
        return self.embedding(torch.cat([logit, normal.loc, diagonal, factor[..., below[0], below[1]]], -1))

    def decode(self, tokens: Float[Tensor, "*batch components d_model"]) -> MixtureSameFamily:
        """The mixtures that tokens stand for."""
        d = self.state_size
        logit, mean, diagonal, rest = self.de_embedding(tokens).split([1, d, d, d * (d - 1) // 2], -1)
        below = torch.tril_indices(d, d, -1, device=tokens.device)
        places = nn.functional.one_hot(below[0] * d + below[1], d * d).to(rest)  # writing in place would bar vmap
        factor = torch.diag_embed(diagonal.exp() + self.jitter) + (rest @ places).unflatten(-1, (d, d))
        weights = nn.functional.logsigmoid(logit.squeeze(-1))  # in logarithms: all may be small
        return MixtureSameFamily(
            Categorical(logits=weights, validate_args=False),
            MultivariateNormal(mean, scale_tril=factor, validate_args=False),
            validate_args=False,
        )


class DistributionTransformer(nn.Module):
    """Maps priors and observations to posteriors; both come back as mixtures of normals.

    The body is torch's transformer decoder: self-attention among the K tokens of the prior, cross-attention to those
    of the observations, no positions and no dropout. What leads out of self-attention and out of the feed-forward
    part starts at 0, so that an untrained body only reads the observations. Train with `prior_posterior_nll` on
    fresh draws of prior, variable and observations, by AdamW with warm-up and a cosine.

    Args:
        state_size: D, dimensions of the variable.
        observations: by name of the source, how many numbers an observation of it has.
        prior_parameters: None where priors are mixtures. Otherwise priors are other distributions, given by so many
            parameters, and `components` perceptrons make the tokens of them; take logarithms of positive ones.
        components: K, how many, with `prior_parameters`.
        d_model: width of a token, a multiple of `heads`.
        heads: of attention.
        layers: of the decoder.
        feedforward: width of its feed-forward parts.
        hidden: widths of the hidden layers of all perceptrons around it.

    Raises:
        ValueError: numbers out of range; in a call, priors or observations of other shapes or names.

    >>> model = DistributionTransformer(1, {"sensor": 2}, heads=4, layers=1)
    >>> prior = MixtureSameFamily(Categorical(torch.ones(7, 3)), MultivariateNormal(torch.zeros(7, 3, 1), torch.eye(1)))
    >>> _, posterior = model(prior, sensor=torch.zeros(7, 2))
    >>> _, after = model(posterior, sensor=torch.zeros(7, 4, 2))  # four observations more
    >>> after.log_prob(torch.zeros(7, 1)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        state_size: int,
        observations: Mapping[str, int],
        *,
        prior_parameters: int | None = None,
        components: int | None = None,
        d_model: int = 32,
        heads: int = 8,
        layers: int = 6,
        feedforward: int = 2048,
        hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("layers", layers), ("feedforward", feedforward)):
            require.whole(name, value, at_least=1)
        if d_model % heads:
            raise ValueError(f"d_model: expected a multiple of heads, {heads}, got {d_model}")
        if not observations:
            raise ValueError("observations: expected at least one source, got none")
        if (prior_parameters is None) != (components is None):
            raise ValueError(f"components: expected with prior_parameters and only then, got {components}")
        self.tokens = GMMTokens(state_size, d_model=d_model, hidden=hidden)
        self.sources = nn.ModuleDict(
            {name: _perceptron((size, *hidden, d_model)) for name, size in observations.items()}
        )
        self.prior_parameters = prior_parameters
        if prior_parameters is not None and components is not None:
            self.parameters_in = _perceptron((prior_parameters, *hidden, d_model))
            self.heads_in = nn.ModuleList(_perceptron((d_model, *hidden, d_model)) for _ in range(components))
        layer = nn.TransformerDecoderLayer(
            d_model, heads, feedforward, dropout=0.0, activation="gelu", batch_first=True
        )
        self.body = nn.TransformerDecoder(layer, layers)
        for block in self.body.layers:
            for linear in (block.self_attn.out_proj, block.linear2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(
        self, prior: MixtureSameFamily | Tensor, **observations: Tensor
    ) -> tuple[MixtureSameFamily, MixtureSameFamily]:
        """The prior as the model reads it, and the posterior.

        Args:
            prior: mixtures (B,) of K normals, or their parameters (B, P).
            **observations: of every source, one (B, size) or T (B, T, size).
        """
        if observations.keys() != self.sources.keys():
            raise ValueError(f"observations: expected {sorted(self.sources)}, got {sorted(observations)}")
        if self.prior_parameters is None:
            if not isinstance(prior, MixtureSameFamily):
                raise ValueError(f"prior: expected a MixtureSameFamily, got {type(prior).__name__}")
            tokens = self.tokens(prior)
        else:
            require.floating("prior", prior, dims=2)
            require.same_shape("prior", prior, (len(prior), self.prior_parameters))
            shared = self.parameters_in(prior)
            tokens = torch.stack([head(shared) for head in self.heads_in], 1)
        context = []
        for name, source in self.sources.items():
            value = observations[name]
            require.floating(name, value, at_least_dims=2)
            value = value.unsqueeze(1) if value.ndim == 2 else value
            require.same_shape(name, value, (len(tokens), value.shape[1], source[0].in_features))
            context.append(source(value))
        return self.tokens.decode(tokens), self.tokens.decode(self.body(tokens, torch.cat(context, 1)))


def prior_posterior_nll(
    prior: MixtureSameFamily, posterior: MixtureSameFamily, x: Float[Tensor, "*batch state"]
) -> Float[Tensor, " *batch"]:
    """-log q(x | phi) - log q(x | z, phi), per sample, in nats: what a `DistributionTransformer` is trained on.

    The first term holds what the model reads as the prior to the prior, so that both have one code and a posterior
    can serve as the next prior.

    Args:
        prior, posterior: what the model returned.
        x: the variable that was drawn from the prior; mapped to all real numbers before, such as by a logarithm,
            where its support is less. Densities then are the mapped variable's.

    Raises:
        ValueError: shape or dtype of x that does not fit.

    >>> normal = MultivariateNormal(torch.zeros(1, 1, 1), torch.eye(1))
    >>> standard = MixtureSameFamily(Categorical(torch.ones(1, 1)), normal)
    >>> prior_posterior_nll(standard, standard, torch.zeros(1, 1))  # twice half the logarithm of 2 pi
    tensor([1.8379])
    """
    require.same_shape("x", x, (*prior.batch_shape, *prior.event_shape))
    return -prior.log_prob(x) - posterior.log_prob(x)


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.GELU()]
    return nn.Sequential(*layers[:-1])
