"""Strategies that promise what they need not, each refused by the claim about that promise."""

import torch
from torch import nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience


class StartsElsewhereInVain(LowRankStrategy):
    """Changes nothing at the start of an experience."""

    promises = Promises(start_within=None)


class JumpsLessThanItSays(LowRankStrategy):
    """Changes features by some 1e-6 at the start of an experience."""

    promises = Promises(start_within=0.5)

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        for _, adapter in self.adapters():
            nn.init.normal_(adapter.B, std=1e-6)


class DrawsNothing(Strategy):
    """Draws nothing in the first experience."""

    promises = Promises(drawn_once=True)


class MergesExactly(LowRankStrategy):
    """Changes nothing when it merges."""

    promises = Promises(merge_within=None)


class LeavesItsHead(Strategy):
    """Changes nothing of old classes."""

    promises = Promises(keeps_old_head=False)


class KeepsNoVectors(Strategy):
    """Keeps no prototype of any class."""

    promises = Promises(vectors_per_class=1)


class GrowsWithClassesInVain(Strategy):
    """Keeps as much for each experience as for any other."""

    promises = Promises(state_grows_with=("classes",))


class StepsAlike(Strategy):
    """Takes as many operations in every step."""

    promises = Promises(step_grows_with=("classes",))


class KeepsNoFeatures(Strategy):
    """Keeps nothing of an image."""

    promises = Promises(training_data="features")


# What has a word


class Covariances(Strategy):
    """Keeps a mean and a covariance (d, d) of every class."""

    promises = Promises(vectors_per_class=33)

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.register_buffer(f"moments_{experience.index}", torch.zeros(experience.num_classes, 33, 32))


class ASpaceForEveryExperience(Strategy):
    """Keeps a vector of every class seen in the space of every experience."""

    promises = Promises(state_grows_with=("classes",))

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.register_buffer(f"vectors_{experience.index}", torch.zeros(self.head.num_classes, 32))


class KeepsLessAndLess(LowRankStrategy):
    """Keeps a part of every update, smaller for later experiences."""

    promises = Promises(state_grows_with=("experiences",))

    def after_training(self, data: TrainingData) -> None:
        self.get_buffer(f"update_{self.experience.index}").fill_(1)
        super().after_training(data)

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        self.register_buffer(f"update_{experience.index}", torch.zeros(8 - experience.index // 4, 32))
