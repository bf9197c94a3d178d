"""DiffEnc: does a learned encoder tighten the bound on the likelihood of digits, and what does a free variance buy?

Perceptrons model 8x8 digits of 17 grey levels. The bound is in nats per pixel on test digits, over four draws of time
and noise for each, the same for both arms. The learned encoder is one more network in training, and none in sampling.
"""

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DiffEnc, LearnedMeanEncoder, best_variance_ratio, reverse_variance_kl
from lossary.tasks import digit_images, digits, minimise, split, stacked_denoiser

RATES = (0.001, 0.003, 0.006)


def _trained(seeds: Seeds, *, encoder: str, lr: float) -> tuple[DiffEnc, Tensor]:
    """The model, and the test digits (S, m, 64). The encoder is "learned", "fixed" or "none"."""
    parts, pixels = split(digits(), seeds), digit_images(8)[0].flatten(1)
    moving = {"none": None, "fixed": LearnedMeanEncoder()}.get(encoder)
    if encoder == "learned":
        inner = stacked_denoiser(64, seeds, hidden=(64,)).network
        torch.nn.init.zeros_(inner.mlp[-1].weight)
        torch.nn.init.zeros_(inner.mlp[-1].bias)
        moving = LearnedMeanEncoder(inner)
    model = DiffEnc(stacked_denoiser(64, seeds, hidden=(96, 96)).network, moving, levels=17)
    generators = seeds.torch("training")

    def objective() -> Tensor:
        rows = [r[torch.randint(len(r), (64,), generator=g)] for r, g in zip(parts.train, generators)]
        return (model(pixels[torch.stack(rows)], generator=generators) / 64).mean(-1).sum()

    minimise(objective, model.parameters(), steps=seeds.few(400, smoke=2), lr=lr)
    return model, pixels[parts.test]


def _bound(seeds: Seeds, **setting: object) -> list[float]:
    model, test = _trained(seeds, **setting)
    generators = seeds.torch("test")
    test = test[:, : seeds.few(test.shape[1], smoke=8)]
    with torch.no_grad():
        found = torch.stack([model(test, generator=generators) for _ in range(4)])
    return (found.mean((0, 2)) / 64).tolist()


def _grid(encoder: str) -> list[dict]:
    return [{"encoder": encoder, "lr": lr} for lr in RATES]


def _compare(seeds: Seeds, method: str, baseline: str) -> Arms:
    ours, theirs = (tune(_bound, _grid(encoder), seeds, better="lower") for encoder in (method, baseline))
    return Arms(_bound(seeds, **ours), _bound(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="A learned encoder tightens the bound on the likelihood",
    kind="superiority",
    metric="log-loss",
    scale="nats per pixel of 8x8 digits of 17 levels, v-hat MLP of 96, encoder of 64, 400 steps of 64; 3 rates each",
)
def learned_encoder_beats_none(seeds: Seeds) -> Arms:
    return _compare(seeds, "learned", "none")


@claim(
    says="It must be learned: the fixed encoder, alpha^2 x, gives a looser bound",
    kind="superiority",
    metric="log-loss",
    scale="nats per pixel of 8x8 digits of 17 levels, v-hat MLP of 96, encoder of 64, 400 steps of 64; 3 rates each",
)
def learned_encoder_beats_fixed(seeds: Seeds) -> Arms:
    return _compare(seeds, "learned", "fixed")


def _gaussian_loss(steps: int, variance: Tensor, *, free: bool) -> Tensor:
    """Diffusion loss per dimension of Gaussian data of that variance with the best x-hat, log SNR from 13.3 to -5."""
    snr = torch.linspace(-5, 13.3, steps + 1, dtype=torch.float64).exp()
    error = variance / (1 + variance * snr[:-1])  # at the noisier end
    gain = snr.diff()
    ratio = best_variance_ratio(error, gain, dimension=1) if free else 1.0
    return reverse_variance_kl(error, gain, dimension=1, ratio=ratio).sum()


@claim(
    says="With its best variance, a model of Gaussian data reaches the bound of infinitely many steps in 2, 5 or 20",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="nats per dimension; variances drawn from 0.1 to 10, the exact posterior mean",
)
def best_variance_makes_few_steps_exact(seeds: Seeds) -> Arms:
    gaps, plain = [], []
    for g in seeds.torch("variance"):
        variance = 0.1 * 100 ** torch.rand((), generator=g, dtype=torch.float64)
        ends = torch.tensor([13.3, -5.0], dtype=torch.float64).exp()
        limit = 0.5 * (1 + variance * ends).log().diff().neg()
        gaps.append([(_gaussian_loss(n, variance, free=True) - limit).item() for n in (2, 5, 20)])
        plain.append([(_gaussian_loss(n, variance, free=False) - limit).item() for n in (2, 5, 20)])
    return Arms(gaps, details={"with the forward variance": plain})


@claim(
    says="A ratio of variances other than 1 adds (w - 1 - log w) / 2 for each step and dimension: it diverges",
    kind="exact",
    metric="deviation",
    tolerance=0.01,
    scale="added loss over that, less 1, at 1000 and 10000 steps with w = 0.9; Gaussian data, the exact posterior mean",
)
def other_ratios_diverge(seeds: Seeds) -> Arms:
    rows = []
    for g in seeds.torch("variance"):
        variance = 0.1 * 100 ** torch.rand((), generator=g, dtype=torch.float64)
        row = []
        for steps in (1000, 10000):
            snr = torch.linspace(-5, 13.3, steps + 1, dtype=torch.float64).exp()
            error, gain = variance / (1 + variance * snr[:-1]), snr.diff()
            plain, other = (reverse_variance_kl(error, gain, dimension=1, ratio=w).sum() for w in (1.0, 0.9))
            saved = 0.1 * plain  # w weighs the error
            row.append(((other - plain + saved) / (steps * 0.5 * (0.9 - 1 - torch.tensor(0.9).log())) - 1).item())
        rows.append(row)
    return Arms(rows)


def draw(seeds: Seeds) -> list[Panel]:
    """A digit, what the learned encoder makes of it at rising noise, and samples."""
    one = seeds.one(0)
    model, test = _trained(one, encoder="learned", lr=0.003)
    x = test[:, :1]
    panels = [Panel("digit", image=(x[0, 0].view(8, 8).numpy() + 1) / 2)]
    with torch.no_grad():
        for t in (0.5, 0.75, 1.0):
            encoded = model.encode(x, torch.full((1, 1), t))
            panels.append(Panel(f"its mean at time {t:g}", image=(encoded[0, 0].view(8, 8).numpy() + 1) / 2))
    found = model.sample((1, 4, 64), steps=100, generator=one.torch("sample"))
    return panels + [Panel("sample", image=(f.view(8, 8).numpy() + 1) / 2) for f in found[0]]
