"""One faulty selector per check of the selector battery."""

import time

import torch
from torch import nn
from torch.utils.data import Sampler

from lossary.roles import selector


class _Shuffled(Sampler):
    """A sound one, to be spoiled below."""

    def __init__(self, num_samples, *, generator):
        self.num_samples, self.generator = num_samples, generator

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        yield from torch.randperm(self.num_samples, generator=self.generator).tolist()


@selector()
class AList(list):
    def __init__(self, num_samples):
        super().__init__(range(num_samples))


@selector()
class CountsFromOne(_Shuffled):
    def __iter__(self):
        return (1 + i for i in super().__iter__())


@selector()
class DropsTheLast(_Shuffled):
    def __iter__(self):
        return iter(list(super().__iter__())[:-1])


@selector()
class RunsDry(_Shuffled):
    def __init__(self, num_samples, *, generator):
        super().__init__(num_samples, generator=generator)
        self.once = super().__iter__()

    def __iter__(self):
        return self.once


@selector()
class DrawsGlobally(_Shuffled):
    def __iter__(self):
        yield from torch.randperm(self.num_samples).tolist()


@selector()
class ForgetsItsEpoch(_Shuffled, nn.Module):
    def __init__(self, num_samples, *, generator):
        nn.Module.__init__(self)
        super().__init__(num_samples, generator=generator)


@selector(weighs=True)
class WeighsBelowZero(_Shuffled):
    def __call__(self, losses, *, index):
        return losses.detach() - 1


@selector()
class Sleeps(_Shuffled):
    def __iter__(self):
        time.sleep(0.4)
        return super().__iter__()


@selector(examples=({"ratio": 0.5},))
class AcceptsAnyRatio(_Shuffled):
    def __init__(self, num_samples, *, generator, ratio: float = 0.5):
        super().__init__(num_samples, generator=generator)


@selector()
class SaysNothing(_Shuffled):
    def __init__(self, num_samples, *, generator):
        super().__init__(num_samples, generator=generator)


FAULTS = {
    "is_sampler": AList,
    "valid": CountsFromOne,
    "length": DropsTheLast,
    "iterates_anew": RunsDry,
    "generator_decides": DrawsGlobally,
    "resumes": ForgetsItsEpoch,
    "loads": CountsFromOne,
    "weighs": WeighsBelowZero,
    "quick": Sleeps,
    "repeatable": DrawsGlobally,
    "refuses_hyper": AcceptsAnyRatio,
    "documented": SaysNothing,
}
