"""InfoBatch: does it see 30% fewer samples, and is the result as good as from all of them?

Both arms run for 16 epochs with a cosine schedule over epochs, as the paper does; a ratio of 0 is full data. The
paper saves 40% on image classification and 20 to 27% on other tasks; 30% lies between.
"""

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import Data, accuracy, mnist5k, split, stacked_mlp
from lossary.weighting import InfoBatch


def _train(seeds: Seeds, data: Data, *, ratio: float, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Test accuracy in percent and share of the samples that were seen, per seed."""
    each = [_train_one(seeds.one(s), data, ratio, lr) for s in range(len(seeds))]
    return torch.tensor([right for right, _ in each]), torch.tensor([seen for _, seen in each])


def _train_one(seed: Seeds, data: Data, ratio: float, lr: float) -> tuple[float, float]:
    parts, epochs = split(data, seed), seed.few(16, smoke=2)
    train, test = parts.train[0], parts.test[0]
    model = stacked_mlp((784, 64, 10), seed).replica(0)
    sampler = InfoBatch(len(train), epochs=epochs, ratio=ratio, generator=seed.torch("order")[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule, seen = CosineAnnealingLR(optimizer, epochs), 0
    for _ in range(epochs):
        for batch in BatchSampler(sampler, batch_size=128, drop_last=False):
            index = torch.tensor(batch)
            rows = train[index]
            losses = F.cross_entropy(model(data.x[rows]), data.y[rows], reduction="none")
            optimizer.zero_grad()
            (sampler(losses, index=index) * losses).mean().backward()
            optimizer.step()
            seen += len(batch)
        schedule.step()
    return accuracy(model(data.x[test]), data.y[test]).item(), seen / (epochs * len(train))


def _tuned(seeds: Seeds, data: Data, ratio: float) -> dict[str, float]:
    """The best of four learning rates."""
    grid = [{"ratio": ratio, "lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)]
    return tune(lambda seeds, **setting: _train(seeds, data, **setting)[0], grid, seeds)


@claim(
    says="InfoBatch sees at most 0.7 of the samples",
    kind="ratio",
    metric="samples seen",
    margin=0.7,
    scale="5000 MNIST images, MLP 784-64-10, 16 epochs of 128, ratio 0.5, delta 0.875; 4 learning rates",
)
def infobatch_sees_fewer_samples(seeds: Seeds) -> Arms:
    data = mnist5k()
    chosen = _tuned(seeds, data, 0.5)
    _, seen = _train(seeds, data, **chosen)
    return Arms(seen, torch.ones_like(seen), {"method": chosen})


@claim(
    says="InfoBatch classifies as well as training on all samples for as many epochs",
    kind="noninferiority",
    metric="accuracy",
    scale="5000 MNIST images, MLP 784-64-10, 16 epochs of 128, ratio 0.5, delta 0.875; 4 learning rates each",
)
def infobatch_is_lossless(seeds: Seeds) -> Arms:
    data = mnist5k()
    pruned, full = _tuned(seeds, data, 0.5), _tuned(seeds, data, 0.0)
    right, seen = _train(seeds, data, **pruned)
    baseline, _ = _train(seeds, data, **full)
    return Arms(right, baseline, {"method": pruned, "baseline": full, "seen": seen.mean().item()})


@claim(
    says="Control: InfoBatch with ratio 0 is training on all samples, so it cannot classify better",
    kind="superiority",
    metric="accuracy",
    scale="5000 MNIST images, MLP 784-64-10, 16 epochs of 128, learning rate 0.1; baseline under fresh seeds",
    control="A/A",
)
def ratio_zero_beats_all_samples(seeds: Seeds) -> Arms:
    data, fresh = mnist5k(), Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_train(seeds, data, ratio=0.0, lr=0.1)[0], _train(fresh, data, ratio=0.0, lr=0.1)[0])
