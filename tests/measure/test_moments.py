from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_bench.measure.moments import SecondMoments, TokenAverages, second_moments
from cl_bench.measure.passes import measure
from cl_bench.network.adapters import inject

Making = Callable[..., Any]


def test_second_moments_equal_the_product_of_all_tokens_with_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, 6, dtype=torch.float64, generator=generator)  # images, tokens, features
    first, second = nn.Linear(6, 6).double(), nn.Linear(6, 2).double()
    found = second_moments(
        lambda x: second(first(x)), [first, second], [(part, torch.zeros(len(part))) for part in x.split(3)]
    )
    tokens = x.reshape(40, 6)
    inner = tokens @ first.weight.detach().T + first.bias.detach()
    expected = torch.stack([tokens.T @ tokens, inner.T @ inner]) / 40
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_second_moments_do_not_depend_on_how_images_are_split(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    whole, parts = (second_moments(backbone, layers, batches(size)) for size in (12, 5))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)


def test_queries_keys_and_values_share_the_statistic_of_their_block(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted(("q", "k", "v"))
    assert second_moments(backbone, layers, batches(6)).shape == (2, 32, 32)
    # Their shared input is the output of the first norm of the block.
    normed: list[Tensor] = []
    backbone.blocks[1].get_submodule("norm1").register_forward_hook(
        lambda *call: normed.append(call[2].flatten(0, 1))
    )
    found = second_moments(backbone, layers, batches(6))
    tokens = torch.cat(normed)
    assert len(tokens) == 12 * 5
    torch.testing.assert_close(found[1], tokens.T @ tokens / len(tokens), rtol=0, atol=1e-10)


def test_products_in_float64_keep_directions_that_float32_loses() -> None:
    # Ten million times weaker in energy than the strongest; the oracle is the SVD of the tokens.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator) * torch.tensor([1e4, 1.0, 1.0, 1.0, 1.0, 1.0])
    x = x @ torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    weakest = torch.linalg.svdvals(x.double())[-1].square() / 4000
    layer, errors = nn.Linear(6, 1), []
    for dtype in (torch.float64, torch.float32):
        moments = SecondMoments([layer], dtype=dtype)
        measure(layer, [(part, torch.zeros(500)) for part in x.split(500)], moments)
        assert moments.mean().dtype == torch.float64
        errors.append(float((torch.linalg.eigvalsh(moments.mean()[0])[0] / weakest - 1).abs()))
    assert errors[0] < 1e-6
    assert errors[1] > 1e-2


def test_float64_records_tokens_as_they_are_and_float32_as_they_are_multiplied() -> None:
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    layer, before = nn.Linear(40, 3), torch.get_float32_matmul_precision()
    doubles, singles = SecondMoments([layer]), SecondMoments([layer], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), doubles.recording(), singles.recording():
        assert layer(x).dtype == torch.bfloat16
    whole, rounded = x.double(), x.bfloat16().double()
    torch.testing.assert_close(doubles.mean()[0], whole.T @ whole / 500, rtol=0, atol=1e-12)
    # Sums of 500 products in float32; another rounding of the tokens would show at 1e-3.
    torch.testing.assert_close(singles.mean()[0], rounded.T @ rounded / 500, rtol=0, atol=5e-6)
    product = x.T @ x
    assert (product - whole.T @ whole).abs().max() < 1e-3, "the statistic does not restore the setting"
    assert torch.get_float32_matmul_precision() == before


def test_recording_while_training_leaves_the_gradients_as_they_are(
    adapted: Making, batches: Making, loss_of: Making
) -> None:
    backbone, layers = adapted()
    (images, labels), *_ = batches(12)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss_of(backbone)(images, labels), trained)
    moments = SecondMoments(layers)
    with moments.recording():
        found = torch.autograd.grad(loss_of(backbone)(images, labels), trained)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert not moments.sums.requires_grad
    torch.testing.assert_close(moments.mean(), second_moments(backbone, layers, batches(12)))


@pytest.mark.parametrize("compiler", (None, "eager"))
@pytest.mark.parametrize("rounded", (False, True))
def test_recording_after_a_step_finds_what_hooks_find(
    tiny_backbone: Making, batches: Making, compiler: str | None, rounded: bool
) -> None:
    backbone = tiny_backbone(compiler=compiler)
    layers = inject(backbone, ("k", "v", "proj"), rank=2)
    by_hooks, after = (SecondMoments(layers, every=2, dtype=torch.float32) for _ in range(2))
    for images, _ in batches(4, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            with by_hooks.recording():
                expected = backbone(images)
            with after.recording_after():
                found = backbone(images)
            assert torch.equal(found, expected)
            backbone(images)  # not recorded
    assert after.tokens.tolist() == [2 * 4 * 5] * len(layers)
    assert torch.equal(after.mean(), by_hooks.mean())
    assert all(layer.inputs is None for layer in layers)


def test_sums_continue_from_a_saved_state_and_are_freed_by_clear() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole, interrupted, resumed = (SecondMoments([layer], every=2) for _ in range(3))
    with whole.recording():
        layer(x[:3]), layer(x[3:5]), layer(x[5:])
    with interrupted.recording():
        layer(x[:3])
    resumed.sums, resumed.tokens = interrupted.sums.clone(), interrupted.tokens.clone()
    resumed.set_extra_state(interrupted.get_extra_state())
    with resumed.recording():
        layer(x[3:5]), layer(x[5:])
    assert torch.equal(resumed.mean(), whole.mean())
    assert whole.tokens.tolist() == [6]
    resumed.clear()
    assert resumed.sums.numel() == 0 and not resumed.tokens.any()


def test_second_moments_of_no_token_are_refused() -> None:
    with pytest.raises(ValueError, match="seen no token: run images"):
        SecondMoments([nn.Linear(4, 1)]).mean()


# Averages of tokens


def test_token_averages_take_the_mean_over_batches_at_each_place(adapted: Making, batches: Making) -> None:
    backbone, layers = adapted()
    averages = TokenAverages(layers)
    measure(backbone, batches(5), averages)  # 5, 5 and 2: the last has another size, and is left out
    inputs: list[Tensor] = []
    handle = layers[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    for images, _ in batches(5)[:2]:
        backbone(images)
    handle.remove()
    mean = (inputs[0] + inputs[1]) / 2
    torch.testing.assert_close(averages.second_moments()[0], mean.mT @ mean / len(mean))


def test_token_averages_of_no_token_are_refused(adapted: Making) -> None:
    with pytest.raises(ValueError, match="seen no token"):
        TokenAverages(adapted()[1]).second_moments()
