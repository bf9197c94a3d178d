"""DiffusionRet: does the diffusion of relevances rank better than cosines, and than the same network without noise?

Pairs are two noisy views of six latent numbers, 16 numbers each; a contrastive dual encoder is trained on 400 pairs and
frozen, its in-batch lists train the rerankers, and other 200 pairs are ranked. Out of domain the queries' latents are
turned, 0.3 radians in each of three planes, and noisier.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.diffusion import RetrievalDiffusion, diffusion_rerank, relevance_diffusion_loss
from lossary.tasks import minimise, stacked_mlp

WIDTH, LATENT = 16, 6
TOP = 32
BATCH = 40
STEPS = 50  # evaluations of a reranking; the blind one takes one, cosines none


def _pairs(seeds: Seeds, n: int, stream: str, *, turn: float = 0.0, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Queries and items (S, n, 16)."""
    queries, items = [], []
    angle = torch.tensor(turn)
    plane = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    turned = torch.block_diag(plane, plane, plane)
    for g, h in zip(seeds.torch("world"), seeds.torch(stream)):
        maps = torch.randn(2, LATENT, WIDTH, generator=g)
        z = torch.randn(n, LATENT, generator=h)
        queries.append(z @ turned @ maps[0] / 2 + spread * torch.randn(n, WIDTH, generator=h))
        items.append((z @ maps[1] / 2).tanh() + spread * torch.randn(n, WIDTH, generator=h))
    return torch.stack(queries), torch.stack(items)


class _Encoders(nn.Module):
    """Query and item to unit vectors (S, n, 16)."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.query = stacked_mlp((WIDTH, 64, WIDTH), seeds)
        self.item = stacked_mlp((WIDTH, 64, WIDTH), seeds)

    def forward(self, query: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.query(query), dim=-1), F.normalize(self.item(item), dim=-1)


def _rows(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randperm(400, generator=g)[:n] for g in generators])


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([one[r] for one, r in zip(x, rows)])


@cache
def _encoded(seeds: Seeds) -> _Encoders:
    encoders, generators = _Encoders(seeds), seeds.torch("encoders")
    pairs = _pairs(seeds, 400, "train")

    def objective() -> Tensor:
        rows = _rows(128, generators)
        query, item = encoders(*(_taken(x, rows) for x in pairs))
        logits = query @ item.mT / 0.07
        each = -sum(z.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(-1) for z in (logits, logits.mT)) / 2
        return each.sum()

    minimise(objective, encoders.parameters(), steps=seeds.few(300, smoke=2), lr=0.003)
    return encoders.requires_grad_(False)


def _stacked(seeds: Seeds):
    """A reranker for each seed: its call on stacked inputs, and its parameters."""
    models = []
    for g in seeds.torch("reranker"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(g.initial_seed())
            models.append(RetrievalDiffusion(WIDTH))
    weights, buffers = torch.func.stack_module_state(models)

    def one(given: dict, fixed: dict, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (given, fixed), inputs)

    return lambda *inputs: torch.vmap(one)(weights, buffers, *inputs), list(weights.values())


def _blind(model):
    """The same network with neither noisy relevances nor time: a discriminative reranker of one evaluation."""
    return lambda x, t, query, candidates: model(0 * x, 0 * t, query, candidates)


@torch.no_grad()
def _reranked(model, table: Tensor, query: Tensor, item: Tensor, *, alpha: float) -> Tensor:
    """By the blind one's own probabilities, at the temperature 100 of its training; nothing that it says is cut."""
    chosen = table.topk(TOP, dim=-1).indices
    found = model(torch.zeros(chosen.shape), torch.zeros(chosen.shape[:2]), query, _taken(item, chosen))
    return table.scatter_add(-1, chosen, alpha * (100 * found).softmax(-1))


@cache
def _trained(seeds: Seeds, *, diffusion: bool, lr: float):
    (model, weights), generators, noise = _stacked(seeds), seeds.torch("lists"), seeds.torch("diffusion")
    model = model if diffusion else _blind(model)
    pairs = _encoded(seeds)(*_pairs(seeds, 400, "train"))

    def objective() -> Tensor:
        rows = _rows(BATCH, generators)
        queries, items = (_taken(x, rows) for x in pairs)
        near = (queries @ items.mT - 3 * torch.eye(BATCH)).topk(TOP - 1, dim=-1).indices
        order = torch.cat([torch.arange(BATCH).view(1, BATCH, 1).expand(len(seeds), -1, -1), near], dim=-1)
        lists = _taken(items, order)
        return relevance_diffusion_loss(model, queries, lists, batch=2, generator=noise).mean(-1).sum()

    minimise(objective, weights, steps=seeds.few(300, smoke=2), lr=lr)
    return model


def _recall(
    seeds: Seeds, *, diffusion: bool | None, lr: float = 0.0, alpha: float = 1.0, moved: bool = False
) -> list[float]:
    """R@1 in percent of cosines alone (None), with the diffusion, or with the blind reranker."""
    shift = {"turn": 0.3, "spread": 0.4} if moved else {}
    query, item = _encoded(seeds)(*_pairs(seeds, 200, "moved" if moved else "test", **shift))
    table = query @ item.mT
    if diffusion:
        steps, generators = seeds.few(STEPS, smoke=2), seeds.torch("rerank")
        model = _trained(seeds, diffusion=True, lr=lr)
        table = diffusion_rerank(model, table, query, item, top=TOP, alpha=alpha, steps=steps, generator=generators)
    elif diffusion is not None:
        table = _reranked(_trained(seeds, diffusion=False, lr=lr), table, query, item, alpha=alpha)
    return (100 * (table.argmax(-1) == torch.arange(200)).double().mean(-1)).tolist()


GRIDS = {
    name: [{"diffusion": name, "lr": lr, "alpha": alpha} for lr in (0.001, 0.003) for alpha in (1.0, 10.0)]
    for name in (True, False)
}


@claim(
    says="Reranking by diffusion finds the right item first more often than cosines",
    kind="superiority",
    metric="recall",
    scale="R@1 of 200 among 200; 400 training pairs, width 16, lists of 32, 300 steps of 40, DDIM 50; 4 settings",
)
def diffusion_beats_cosines(seeds: Seeds) -> Arms:
    ours = tune(_recall, GRIDS[True], seeds)
    return Arms(_recall(seeds, **ours), _recall(seeds, diffusion=None), {"evaluations": [STEPS, 0], "method": ours})


@claim(
    says="Reranking by diffusion finds the right item first more often than the same network without noisy relevances",
    kind="superiority",
    metric="recall",
    scale="R@1 of 200 among 200; 400 training pairs, width 16, lists of 32, 300 steps of 40, DDIM 50; 4 settings each",
)
def diffusion_beats_the_blind_reranker(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_recall, GRIDS[name], seeds) for name in (True, False))
    details = {"evaluations": [STEPS, 1], "method": ours, "baseline": theirs}
    return Arms(_recall(seeds, **ours), _recall(seeds, **theirs), details)


@claim(
    says="Out of domain, too, reranking by diffusion finds the right item first more often than cosines",
    kind="superiority",
    metric="recall",
    scale="R@1 of 200 among 200, latents turned by 0.3, noise 0.4 for 0.3; tuned in domain, 400 pairs; 4 settings",
)
def diffusion_beats_cosines_out_of_domain(seeds: Seeds) -> Arms:
    ours = tune(_recall, GRIDS[True], seeds)
    details = {"evaluations": [STEPS, 0], "method": ours}
    return Arms(_recall(seeds, moved=True, **ours), _recall(seeds, diffusion=None, moved=True), details)
