"""D3PM: does the matrix matter, near values for grey levels and the mask for text, and does cross-entropy help?

The bound on the negative log-likelihood of perceptrons on texts of random Markov chains and on shrunken digits.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    D3PM,
    absorbing_transition,
    cosine_rates,
    discretized_gaussian_transition,
    uniform_transition,
)
from lossary.tasks import digits
from lossary.tasks.tokens import chains, fit_tokens, noised_tokens, stacked_token_net, texts_of

STEPS, LENGTH = 16, 8
LEVELS, PIXELS = 8, 16
TOKENS = 8
RATES = (0.001, 0.003, 0.01)
MATRICES = {
    "uniform": lambda: uniform_transition(8, cosine_rates(STEPS)),
    "absorbing": lambda: absorbing_transition(8, 1 / torch.arange(STEPS, 0, -1).double()),
    "gaussian": lambda: discretized_gaussian_transition(8, torch.linspace(0.05, 1.0, STEPS)),
}


@cache
def _grey() -> tuple[Tensor, Tensor]:
    """Digits of 4x4 pixels in 8 grey levels, (N, 16), to train and to test on."""
    x = digits().x.view(-1, 1, 8, 8)
    x = torch.nn.functional.avg_pool2d((x - x.min()) / (x.max() - x.min()), 2)
    levels = (x * LEVELS).long().clamp(max=LEVELS - 1).flatten(1)
    return levels[:1300], levels[1300:]


def _data(seeds: Seeds, pictures: bool):
    """length, texts to train on, texts to test on."""
    if not pictures:
        texts = texts_of(chains(TOKENS, LENGTH, seeds))
        return LENGTH, texts, texts(seeds.few(200, smoke=8), seeds.torch("test"))
    train, test = _grey()

    def texts(n: int, generators: Sequence[Generator]) -> Tensor:
        return torch.stack([train[torch.randint(len(train), (n,), generator=g)] for g in generators])

    return PIXELS, texts, test[: seeds.few(200, smoke=8)].expand(len(seeds), -1, -1)


def _trained(seeds: Seeds, *, matrix: str, pictures: bool, lr: float, hybrid: float):
    length, texts, test = _data(seeds, pictures)
    model = D3PM(8, MATRICES[matrix](), hybrid=hybrid)
    network = stacked_token_net(length, model.process.states, 8, seeds, hidden=(64,))

    def loss(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
        step = (t * STEPS).long() + 1
        x = noised_tokens(model.process, clean, step, generators)
        return model.loss(network(x, step / STEPS), clean, x, step)

    fit_tokens(network, texts, loss=loss, seeds=seeds, steps=seeds.few(300, smoke=2), lr=lr)
    return model, lambda x, t: network(x, t / STEPS), test


def _bound(seeds: Seeds, **setting: object) -> list[float]:
    """Nats per token on texts or pictures not trained on."""
    model, predict, test = _trained(seeds, **setting)
    return model.bound(predict, test, generator=seeds.torch("bound")[0]).mean(-1).tolist()


def _compare(method: dict, baseline: dict, seeds: Seeds) -> Arms:
    ours, theirs = (
        tune(_bound, [{**arm, "lr": lr} for lr in RATES], seeds, better="lower") for arm in (method, baseline)
    )
    return Arms(_bound(seeds, **ours), _bound(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="On grey levels, noise that moves to near values gives a lower bound than noise that forgets",
    kind="superiority",
    metric="log-loss",
    scale="bound per pixel; digits 4x4 in 8 levels, T = 16, MLP of 64, 300 steps of 64; 3 learning rates each",
)
def near_values_beat_uniform_on_pictures(seeds: Seeds) -> Arms:
    gaussian, uniform = ({"matrix": m, "pictures": True, "hybrid": 0.001} for m in ("gaussian", "uniform"))
    return _compare(gaussian, uniform, seeds)


@claim(
    says="On text, a mask gives a lower bound than random tokens",
    kind="superiority",
    metric="log-loss",
    scale="bound per token; Markov chains of 8 tokens, length 8, T = 16, MLP of 64, 300 steps; 3 learning rates each",
)
def mask_beats_uniform_on_text(seeds: Seeds) -> Arms:
    mask, uniform = ({"matrix": m, "pictures": False, "hybrid": 0.01} for m in ("absorbing", "uniform"))
    return _compare(mask, uniform, seeds)


@claim(
    says="A little cross-entropy beside the bound lowers the bound itself",
    kind="superiority",
    metric="log-loss",
    scale="bound per pixel; near values, hybrid 0.01 against 0; digits 4x4 in 8 levels, T = 16; 3 learning rates each",
)
def cross_entropy_helps(seeds: Seeds) -> Arms:
    helped, plain = ({"matrix": "gaussian", "pictures": True, "hybrid": h} for h in (0.01, 0.0))
    return _compare(helped, plain, seeds)


@claim(
    says="With a mask and rates 1 / (T - t + 1) step t costs the masked tokens' cross-entropy over t, the first all",
    kind="exact",
    metric="deviation",
    tolerance=1e-12,
    scale="random logits, 8 tokens, length 8, T = 16; absolute difference in nats",
)
def mask_is_masked_language_modelling(seeds: Seeds) -> Arms:
    model = D3PM(TOKENS, MATRICES["absorbing"](), hybrid=0.0)
    texts = texts_of(chains(TOKENS, LENGTH, seeds))
    gaps = []
    for clean, g in zip(texts(seeds.few(32), seeds.torch("text")), seeds.torch("noise")):
        t = torch.randint(1, STEPS + 1, (len(clean),), generator=g)
        x = model.noised(clean, t, generator=g)
        logits = torch.randn(*clean.shape, TOKENS, generator=g, dtype=torch.float64)
        missed = -logits.log_softmax(-1).gather(-1, clean[..., None])[..., 0]
        charged = (x == TOKENS) | (t == 1)[:, None]  # where the guess itself is the model, kept tokens cost, too
        gaps.append((model.loss(logits, clean, x, t) - (missed * charged).mean(-1) / t).abs().max().item())
    return Arms(gaps)


def draw(seeds: Seeds) -> list[Panel]:
    """Digits by each matrix."""
    one = seeds.one(0)
    train, _ = _grey()
    rows = {"data": train[:36]}
    for matrix in ("uniform", "absorbing", "gaussian"):
        model, predict, _ = _trained(one, matrix=matrix, pictures=True, lr=0.003, hybrid=0.001)
        rows[matrix] = model.sample(predict, (1, 36, PIXELS), generator=one.torch("draw")[0])[0]
    sheets = {name: x.view(6, 6, 4, 4) / (LEVELS - 1) for name, x in rows.items()}
    sheets = {name: torch.nn.functional.pad(x, (0, 1, 0, 1)) for name, x in sheets.items()}
    return [Panel(name, image=x.permute(0, 2, 1, 3).reshape(30, 30).numpy()) for name, x in sheets.items()]
