"""One faulty procedure per check of the procedure battery."""

import time

import torch
from torch import nn

from lossary.roles import Procedure, procedure


class _Twins(Procedure):
    """A sound one, to be spoiled below: two networks that learn the same, in turn."""

    def __init__(self, first, second, loss):
        super().__init__()
        self.first, self.second, self.loss = first, second, loss

    @classmethod
    def build(cls, model, loss, profile, **hyper):
        return cls(model("first"), model("second"), loss, **hyper)

    def players(self):
        return {"first": self.first, "second": self.second}

    def objective(self, player, batch, *, step, generator=None):
        x, y = batch
        return self.loss(self.players()[player](x), y)

    def forward(self, x):
        return self.first(x) + self.second(x)


@procedure(on="classes")
class Reduces(_Twins):
    def objective(self, player, batch, **options):
        return super().objective(player, batch, **options).mean()


@procedure(on="classes")
class MixesReplicas(_Twins):
    def objective(self, player, batch, **options):
        values = super().objective(player, batch, **options)
        return values / values.detach().mean()


@procedure(on="classes")
class SharesParameters(_Twins):
    def players(self):
        return {"first": self.first, "both": nn.ModuleList([self.first, self.second])}


@procedure(on="classes")
class AveragesTooEarly(_Twins):
    def objective(self, player, batch, **options):
        with torch.no_grad():
            for mine, other in zip(self.first.parameters(), self.second.parameters()):
                other.lerp_(mine, 0.1)
        return super().objective(player, batch, **options)


@procedure(on="classes")
class NeverCallsTheSecond(_Twins):
    def turns(self, step):
        return ("first",)


@procedure(on="classes")
class CountsInAnAttribute(_Twins):
    calls = 0

    def objective(self, player, batch, **options):
        self.calls += 1
        return super().objective(player, batch, **options) / self.calls


@procedure(on="classes")
class DeploysWithNoise(_Twins):
    def forward(self, x):
        return super().forward(x) + torch.randn(())


@procedure(on="classes")
class Sleeps(_Twins):
    def objective(self, player, batch, **options):
        time.sleep(0.6)
        return super().objective(player, batch, **options)


@procedure(on="classes")
class Overwrites(_Twins):
    def objective(self, player, batch, **options):
        batch[0].mul_(2)
        return super().objective(player, batch, **options)


@procedure(on="classes")
class DrawsGlobally(_Twins):
    def objective(self, player, batch, **options):
        x, y = batch
        return super().objective(player, (x + 0.1 * torch.randn_like(x), y), **options)


@procedure(on="classes")
class RoundsInSingle(_Twins):
    def objective(self, player, batch, **options):
        values = super().objective(player, batch, **options)
        return values * (1.0 if values.dtype == torch.float64 else 1.001)


@procedure(on="classes")
class OverflowsInBfloat16(_Twins):
    def objective(self, player, batch, **options):
        values = super().objective(player, batch, **options)
        return values + (float("nan") if values.dtype == torch.bfloat16 else 0.0)


@procedure(on="classes")
class AlwaysSingle(_Twins):
    def objective(self, player, batch, **options):
        return super().objective(player, batch, **options).float()


@procedure(on="classes", examples=({"share": 0.5},))
class AcceptsAnyShare(_Twins):
    def __init__(self, first, second, loss, *, share: float = 0.5):
        super().__init__(first, second, loss)


@procedure(on="classes")
class SaysNothing(_Twins):
    def __init__(self, first, second, loss):
        super().__init__(first, second, loss)


FAULTS = {
    "per_sample": Reduces,
    "stacks": MixesReplicas,
    "disjoint": SharesParameters,
    "only_looks": AveragesTooEarly,
    "moves_its_players": NeverCallsTheSecond,
    "resumes": CountsInAnAttribute,
    "deploys": DeploysWithNoise,
    "quick": Sleeps,
    "unmutated": Overwrites,
    "repeatable": DrawsGlobally,
    "dtypes_agree": RoundsInSingle,
    "bfloat16_finite": OverflowsInBfloat16,
    "dtype_follows": AlwaysSingle,
    "refuses_hyper": AcceptsAnyShare,
    "documented": SaysNothing,
}
