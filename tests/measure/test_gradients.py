from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.measure.gradients import full_weight_gradients, squared_weight_gradients

Making = Callable[..., Any]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_gradients_of_factors_come_from_the_gradient_of_the_whole_weight(
    dtype: torch.dtype, bound: float, adapted: Making, batches: Making, loss_of: Making
) -> None:
    backbone, layers = adapted(("k", "v", "proj"))
    backbone.to(dtype)
    (batch,) = batches(12, dtype)
    loss_of(backbone)(*batch).backward()
    full = full_weight_gradients(loss_of(backbone), layers, [batch])
    for layer, gradient in zip(layers, full, strict=True):
        assert gradient.shape == layer.weight.shape
        for target, rows in layer.rows.items():
            adapter = layer.adapter(target)
            assert adapter.A.grad is not None and adapter.B.grad is not None
            of_down, of_up = 0.5 * adapter.B.T @ gradient[rows], 0.5 * gradient[rows] @ adapter.A.T
            assert (adapter.A.grad - of_down).norm() < bound * of_down.norm()
            assert (adapter.B.grad - of_up).norm() < bound * of_up.norm()


def test_they_are_the_slopes_of_the_mean_loss(adapted: Making, batches: Making, loss_of: Making) -> None:
    backbone, layers = adapted(("k", "v"))
    loss, (whole,) = loss_of(backbone), batches(12)
    gradients = full_weight_gradients(loss, layers, batches(5))
    generator = torch.Generator().manual_seed(1)
    for layer, gradient in zip(layers, gradients, strict=True):
        step = 1e-5 * torch.randn(layer.weight.shape, dtype=torch.float64, generator=generator)
        values = []
        for sign in (1, -1):
            layer.weight += sign * step
            values.append(float(loss(*whole).detach()))
            layer.weight -= sign * step
        assert values[0] - values[1] == pytest.approx(2 * float((gradient * step).sum()), rel=1e-6)


def test_they_do_not_depend_on_how_images_are_split(
    adapted: Making, batches: Making, loss_of: Making
) -> None:
    backbone, layers = adapted()
    whole, parts = (full_weight_gradients(loss_of(backbone), layers, batches(size)) for size in (12, 5))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_they_are_taken_with_gradients_off_and_change_nothing(
    adapted: Making, batches: Making, loss_of: Making
) -> None:
    backbone, layers = adapted()
    before = {name: (value.clone(), value.requires_grad) for name, value in backbone.named_parameters()}
    with torch.no_grad():
        gradients = full_weight_gradients(loss_of(backbone), layers, batches(6))
        assert not torch.is_grad_enabled()
    assert all(gradient.any() and not gradient.requires_grad for gradient in gradients)
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_weights_are_frozen_again_after_a_pass_that_fails(adapted: Making, loss_of: Making) -> None:
    backbone, layers = adapted()
    with pytest.raises(ValueError, match="do not fit"):
        full_weight_gradients(loss_of(backbone), layers, [(torch.zeros(1, 3, 4, 4), torch.zeros(1))])
    assert not any(layer.weight.requires_grad for layer in layers)


def test_a_second_pass_in_one_autocast_context_sees_the_current_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).requires_grad_(False)
    data = [(torch.randn(5, 4), torch.zeros(5))]

    def gradient() -> Tensor:
        return full_weight_gradients(lambda images, _: layer(images).tanh().mean(), [layer], data)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = gradient()
        layer.weight *= 3
        second = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [1, 5])
def test_squares_are_those_of_the_gradients_that_torch_func_takes_of_each_image(
    size: int, adapted: Making, tiny_backbone: Making, batches: Making, loss_of: Making
) -> None:
    backbone, layers = adapted(("k", "v"))
    plain = tiny_backbone().double()  # without adapters, but for what they add to the weights
    state = {key: value for key, value in backbone.state_dict().items() if key in plain.state_dict()}
    names = [f"vit.blocks.{index}.attn.qkv.weight" for index in range(len(layers))]
    state |= {name: layer.effective_weight() for name, layer in zip(names, layers, strict=True)}

    def loss(weights: list[Tensor], image: Tensor, label: Tensor) -> Tensor:
        features = functional_call(plain, state | dict(zip(names, weights, strict=True)), (image[None],))
        return nn.functional.cross_entropy(features[:, :3], label[None])

    ((images, labels),) = batches(12)
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be batched
        of_images = vmap(grad(loss), (None, 0, 0))([state[name] for name in names], images, labels)
    found = squared_weight_gradients(loss_of(backbone), layers, batches(size))
    for squares, gradients in zip(found, of_images, strict=True):
        of_batches = [len(part) * part.mean(dim=0).square() for part in gradients.split(size)]
        torch.testing.assert_close(squares, sum(of_batches) / 12, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gradients", [full_weight_gradients, squared_weight_gradients])
def test_a_gradient_without_a_batch_is_refused(gradients: Making) -> None:
    with pytest.raises(ValueError, match="no batch to take a gradient of"):
        gradients(lambda images, _: images.sum(), [nn.Linear(2, 1)], [])
