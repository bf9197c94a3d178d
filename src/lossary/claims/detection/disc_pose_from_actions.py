"""Poses from actions: with one pose in twenty annotated, do action labels help, and do distributions help them?

Figures of five joints, a root and two limbs, whose angles depend on one of four actions, drawn as noisy dots: the limbs
differ in brightness alone, so that a picture often leaves two poses open. All networks have one hidden layer.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import DiscoNet, DissimilarityLearner, pose_distance
from lossary.roles import Procedure, advance
from lossary.tasks import stacked_mlp

SIZE, JOINTS, NOISE, ACTIONS = 12, 5, 8, 4
TRAIN, TEST, ANNOTATED, STEPS, WARMUP = 600, 200, 30, 240, 80
KNOWN, OTHERS = 6, 18  # of a batch
RATES = (0.0003, 0.001, 0.003, 0.01)
LIMB = 0.9
ANGLES = np.array([[-1.2, -0.3, 1.2, 0.3], [1.2, 0.3, -1.2, -0.3], [0.6, 1.4, -0.6, -1.4], [-0.6, -1.4, 0.6, 1.4]])


@cache
def _figures(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (S, N, 144), actions (S, N) and joints (S, N, 5, 2), x and y in -1 to 1."""
    count = seeds.few(TRAIN, smoke=60) + seeds.few(TEST)
    grid = 2 * (np.arange(SIZE) + 0.5) / SIZE - 1
    pictures, actions, poses = [], [], []
    for rng in seeds.numpy("figures"):
        action = rng.integers(0, ACTIONS, count)
        upper_a, lower_a, upper_b, lower_b = (ANGLES[action] + 0.3 * rng.standard_normal((count, 4))).T
        joints = [[-0.5, 0.0] + 0.1 * rng.standard_normal((count, 2))]
        for upper, lower in ((upper_a, lower_a), (upper_b, lower_b)):
            joints.append(joints[0] + LIMB / 2 * np.stack([np.cos(upper), np.sin(upper)], -1))
            joints.append(joints[-1] + LIMB / 2 * np.stack([np.cos(upper + lower), np.sin(upper + lower)], -1))
        pose = np.stack(joints, 1)
        across, down = (np.exp(-((grid - pose[..., i, None]) ** 2) / (2 * 0.15**2)) for i in (0, 1))
        shade = np.array([1.0, 1.0, 1.0, 0.6, 0.6])
        picture = np.einsum("j,njh,njw->nhw", shade, down, across) + 0.2 * rng.standard_normal((count, SIZE, SIZE))
        pictures.append(torch.from_numpy(picture).float().flatten(1))
        actions.append(torch.from_numpy(action))
        poses.append(torch.from_numpy(pose).float())
    return torch.stack(pictures), torch.stack(actions), torch.stack(poses)


class _Pointwise(Procedure):
    """The same with one pose from each network instead of a distribution."""

    def __init__(self, prediction: nn.Module, conditional: nn.Module) -> None:
        super().__init__()
        self.prediction, self.conditional = prediction, conditional

    def players(self) -> Mapping[str, nn.Module]:
        return {"conditional": self.conditional, "prediction": self.prediction}

    def objective(self, player: str, batch: tuple[Tensor, ...], *, step: int, generator: object = None) -> Tensor:
        x, action, pose, annotated = batch
        poses = {
            "conditional": self.conditional(torch.cat([x, F.one_hot(action, ACTIONS)], -1)).unflatten(-1, (JOINTS, 2)),
            "prediction": self(x),
        }
        own = poses.pop(player)
        (other,) = poses.values()
        values = pose_distance(own, pose) * annotated
        return values if step < WARMUP else values + pose_distance(own, other.detach())

    def forward(self, x: Tensor, *, generator: object = None) -> Tensor:
        return self.prediction(x).unflatten(-1, (JOINTS, 2))


def _procedure(seeds: Seeds, method: str, steps: int) -> Procedure:
    seen, told = SIZE * SIZE, SIZE * SIZE + ACTIONS
    if method == "pointwise":
        return _Pointwise(*(stacked_mlp((n, 64, 2 * JOINTS), seeds) for n in (seen, told)))
    nets = (
        DiscoNet(stacked_mlp((n + NOISE, 64, 2 * JOINTS), seeds), joints=JOINTS, noise_size=NOISE) for n in (seen, told)
    )
    warmup = steps if method == "supervised" else WARMUP
    return DissimilarityLearner(*nets, num_actions=ACTIONS, samples=5, warmup=warmup)


def _trained(seeds: Seeds, *, method: str, lr: float) -> tuple[Procedure, Tensor, Tensor]:
    """A trained procedure, and the test part: pictures and poses."""
    x, action, pose = _figures(seeds)
    train, steps = x.shape[1] - seeds.few(TEST), seeds.few(STEPS)
    if method == "shuffled":
        action = torch.stack([a[torch.randperm(len(a), generator=g)] for a, g in zip(action, seeds.torch("shuffle"))])
        method = "disc"
    made = _procedure(seeds, method, steps)
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=lr) for name, net in made.players().items()}
    order, noise = seeds.torch("order"), seeds.torch("noise")
    annotated = (torch.arange(KNOWN + OTHERS) < KNOWN).expand(len(seeds), -1)
    made.train()
    for step in range(steps):
        known = torch.stack([torch.randint(ANNOTATED, (KNOWN,), generator=g) for g in order])
        others = torch.stack([torch.randint(ANNOTATED, train, (OTHERS,), generator=g) for g in order])
        rows = torch.cat([known, others], 1)
        batch = [torch.stack([part[r] for part, r in zip(tensor, rows)]) for tensor in (x, action, pose)]
        advance(made, (*batch, annotated), optimizers, step=step, generator=noise)
    return made.eval(), x[:, train:], pose[:, train:]


def _error(seeds: Seeds, **setting: object) -> list[float]:
    """Mean distance of joints on the test pictures, in percent of a limb's length."""
    made, x, pose = _trained(seeds, **setting)
    with torch.no_grad():
        found = made(x, generator=seeds.torch("test"))
    return (100 / LIMB * pose_distance(found, pose).mean(1)).tolist()


def _compare(seeds: Seeds, other: str) -> Arms:
    method, baseline = (
        tune(_error, [{"method": name, "lr": lr} for lr in RATES], seeds, better="lower") for name in ("disc", other)
    )
    return Arms(_error(seeds, **method), _error(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="Action labels, learned from by the dissimilarity coefficient, give better poses than the few annotated poses",
    kind="ratio",
    metric="landmark error",
    margin=0.95,
    scale="600 synthetic figures of 5 joints, 12x12 px, 4 actions, 30 annotated, MLPs, 240 steps of 24; 4 settings",
)
def actions_beat_annotated_poses_alone(seeds: Seeds) -> Arms:
    return _compare(seeds, "supervised")


@claim(
    says="Distributions of poses learn better from action labels than single poses do",
    kind="ratio",
    metric="landmark error",
    margin=0.95,
    scale="600 synthetic figures of 5 joints, 12x12 px, 4 actions, 30 annotated, MLPs, 240 steps of 24; 4 settings",
)
def distributions_beat_single_poses(seeds: Seeds) -> Arms:
    return _compare(seeds, "pointwise")


@claim(
    says="It is the actions that help: they do better than the same labels dealt out at random",
    kind="ratio",
    metric="landmark error",
    margin=0.95,
    scale="600 synthetic figures of 5 joints, 12x12 px, 4 actions, 30 annotated, MLPs, 240 steps of 24; 4 settings",
)
def actions_beat_shuffled_actions(seeds: Seeds) -> Arms:
    return _compare(seeds, "shuffled")


def draw(seeds: Seeds) -> list[Panel]:
    """Two test figures: twenty samples from either way of training, and the poses predicted beside the true joints."""
    seed = seeds.one(0)
    trained = {name: _trained(seed, method=name, lr=0.003) for name in ("supervised", "disc")}
    panels = []
    for i in range(2):
        for name, (made, x, pose) in trained.items():
            image = 0.5 + x[0, i].view(SIZE, SIZE).numpy() / 3
            with torch.no_grad():
                drawn = made.prediction(x, samples=20, generator=seed.torch("test"))[:, 0, i].flatten(0, 1)
                best = made(x, generator=seed.torch("test"))[0, i]
            places = [((points + 1) * SIZE / 2).numpy() for points in (drawn, best, pose[0, i])]
            there_and_back = places[1][[2, 1, 0, 3, 4, 3, 0, 1]]
            panels.append(Panel(f"{name}: samples", image, points=places[0]))
            panels.append(Panel(f"{name}: prediction", image, polygons=[there_and_back], points=places[2]))
    return panels
