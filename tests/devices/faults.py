"""Strategies with one fault each, which shows only on a device that is not the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.strategy import TrainingData
from strategies.lora import LoRA


class AddsFromTheCPU(LoRA):
    """Adds noise made in main memory to a weight."""

    def before_training(self, data: TrainingData) -> None:
        super().before_training(data)
        for _, adapter in self.adapters():
            adapter.A.add_(torch.randn(adapter.A.shape), alpha=0.01)


class KeepsMeansInMainMemory(LoRA):
    """Compares features with a matrix that never moved to the device."""

    def expand(self, experience: Any) -> None:
        super().expand(experience)
        self.means = torch.ones(self.backbone.feature_dim, 1)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        loss: Tensor = super().loss(features, labels) + (features @ self.means).mean()
        return loss


class DrawsWithTheGeneratorOfTheCPU(LoRA):
    """Draws on the device from a generator of the CPU."""

    def before_training(self, data: TrainingData) -> None:
        super().before_training(data)
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(3, generator=generator, device=self.device)


class ReadsTheLoss(LoRA):
    """Fetches the loss in every step."""

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        loss = super().loss(features, labels)
        self.last = loss.item()
        return loss


class SelectsByAMask(LoRA):
    """Selects images by a mask, whose length the host must know."""

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        kept = labels >= 0
        return super().loss(features[kept], labels[kept])


class CopiesAfterEveryStep(LoRA):
    """Copies a factor to main memory after every step."""

    def after_step(self) -> None:
        super().after_step()
        self.copies = [adapter.B.cpu() for _, adapter in self.adapters()]


class ConvertsToNumPy(LoRA):
    """Hands a tensor of the device to NumPy."""

    def after_training(self, data: TrainingData) -> None:
        super().after_training(data)
        self.norms = [float(abs(layer.weight.detach().numpy()).max()) for layer in self.layers]


class LooksUpInMainMemory(LoRA):
    """Indexes a table in main memory by labels on the device."""

    def expand(self, experience: Any) -> None:
        super().expand(experience)
        self.weights = torch.ones(experience.classes.stop)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return super().loss(features, labels) * self.weights[labels].mean()


class ComparesOnTheHost(LoRA):
    """Decides by a comparison on the device whether a step is taken."""

    def rectify_gradients(self) -> None:
        for _, adapter in self.adapters():
            if adapter.B.grad is not None and adapter.B.grad.norm() > 1e9:
                adapter.B.grad = None


FAULTS = {
    AddsFromTheCPU: "Expected all tensors to be on the same device",
    KeepsMeansInMainMemory: "Expected all tensors to be on the same device",
    DrawsWithTheGeneratorOfTheCPU: "Expected a 'twin' device type for generator but found 'cpu'",
    ReadsTheLoss: "_local_scalar_dense fetches a number",
    SelectsByAMask: "index fetches the number of entries that a mask selects",
    CopiesAfterEveryStep: "_to_copy copies to main memory",
    ConvertsToNumPy: "can't convert twin:0 device type tensor to numpy",
    LooksUpInMainMemory: "Expected all tensors to be on the same device",
    ComparesOnTheHost: "_local_scalar_dense fetches a number",
}
