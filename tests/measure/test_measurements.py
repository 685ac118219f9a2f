from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cl_bench.maths.memory import GPM
from cl_bench.measure.gradients import full_weight_gradients
from cl_bench.measure.means import ClassMeans, class_means
from cl_bench.measure.moments import SecondMoments, TokenAverages, second_moments
from cl_bench.measure.passes import measure
from cl_bench.measure.sketch import InputSketch, _spread
from cl_bench.network.adapters import AdaptedLinear, inject
from cl_bench.network.backbones import Backbone

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
Batches = list[tuple[Tensor, Tensor]]


def adapted(targets: tuple[str, ...] = ("q", "k", "v")) -> tuple[Backbone, list[AdaptedLinear]]:
    torch.manual_seed(0)
    backbone = Backbone("vision_transformer", "random", TINY).double()
    layers = inject(backbone, targets, rank=2, scale=0.5)
    for layer in layers:
        for target in layer.rows:
            nn.init.normal_(layer.adapter(target).B, std=0.3)
    return backbone, layers


def batches(size: int, images: int = 12, dtype: torch.dtype = torch.float64) -> Batches:
    drawn = torch.rand(images, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % 3
    return list(zip(drawn.split(size), labels.split(size), strict=True))


def loss_of(backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, labels: nn.functional.cross_entropy(backbone(images)[:, :3], labels)


# Class means


def test_class_means_equal_the_mean_over_all_images_of_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, generator=generator)
    labels = torch.arange(50) % 4 + 6
    batches = zip(images.split(7), labels.split(7), strict=True)
    means = class_means(lambda x: x @ torch.eye(3), batches, range(6, 10))
    expected = torch.stack([images[labels == position].mean(dim=0) for position in range(6, 10)])
    torch.testing.assert_close(means, expected)


def test_a_class_without_images_has_no_mean() -> None:
    batches = [(torch.ones(2, 3), torch.tensor([0, 0]))]
    with pytest.raises(ValueError, match="has no training image"):
        class_means(lambda x: x, batches, range(2))


# Second moments


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


def test_second_moments_do_not_depend_on_how_images_are_split() -> None:
    backbone, layers = adapted()
    whole, parts = (second_moments(backbone, layers, batches(size)) for size in (12, 5))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)


def test_queries_keys_and_values_share_the_statistic_of_their_block() -> None:
    backbone, layers = adapted(("q", "k", "v"))
    assert second_moments(backbone, layers, batches(6)).shape == (2, 32, 32)
    # Their one input is what the first norm of the block gives out.
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


def test_float64_takes_in_tokens_as_they_come_and_float32_as_they_are_multiplied() -> None:
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
    assert (product - whole.T @ whole).abs().max() < 1e-3, "the setting outlives the statistic"
    assert torch.get_float32_matmul_precision() == before


def test_one_pass_serves_every_statistic() -> None:
    backbone, layers = adapted()
    passes = 0

    def features(images: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return backbone(images)  # type: ignore[no-any-return]

    means, moments = ClassMeans(range(3)), SecondMoments(layers)
    measure(features, batches(5), means, moments)
    assert passes == 3
    assert torch.equal(means.mean(), class_means(backbone, batches(5), range(3)))
    assert torch.equal(moments.mean(), second_moments(backbone, layers, batches(5)))


def test_a_pass_for_inputs_alone_goes_no_further_than_the_last_of_them() -> None:
    backbone, layers = adapted()
    reached: list[str] = []
    for name, place in (("first", 0), ("last", 1)):
        layer = backbone.vit.get_submodule(f"blocks.{place}.attn.qkv")
        layer.register_forward_hook(lambda *_, name=name: reached.append(name))
    whole = SecondMoments(layers)
    with whole.recording():
        for images, _ in batches(5):
            backbone(images)
    assert reached == ["first", "last"] * 3
    reached.clear()
    assert torch.equal(second_moments(backbone, layers, batches(5)), whole.mean())
    assert reached == ["first", "last", "first", "first"]
    reached.clear()
    one, other = SecondMoments(layers[1:]), SecondMoments(layers[:1])
    measure(backbone, batches(5), one, other)
    assert torch.equal(torch.cat([other.mean(), one.mean()]), whole.mean())
    assert reached == ["first", "last", "first", "first"]


class Counting(SecondMoments):
    images = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.images += len(features)


def test_a_pass_is_whole_for_who_needs_features_and_for_layers_that_are_called_again() -> None:
    backbone, layers = adapted()
    both = Counting(layers)
    measure(backbone, batches(5), both)
    assert both.images == 12
    layer = nn.Linear(2, 2, bias=False)
    moments = SecondMoments([layer])
    ones = [(torch.ones(1, 2), torch.zeros(1))] * 3
    measure(lambda images: layer(images) + layer(2 * images), ones, moments)
    assert moments.tokens.tolist() == [6]
    assert torch.equal(moments.mean()[0], torch.full((2, 2), 2.5, dtype=torch.float64))


def test_no_layer_is_listened_to_after_a_pass_even_a_broken_one() -> None:
    backbone, layers = adapted()
    measure(backbone, batches(6), SecondMoments(layers))
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(ValueError, match="do not fit"):
        measure(backbone, [(torch.zeros(1, 3, 4, 4), torch.zeros(1))], SecondMoments(layers))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_listening_while_training_leaves_the_gradients_as_they_are() -> None:
    backbone, layers = adapted()
    (images, labels), *_ = batches(12)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss_of(backbone)(images, labels), trained)
    moments = SecondMoments(layers)
    with moments.recording():
        heard = torch.autograd.grad(loss_of(backbone)(images, labels), trained)
    assert all(torch.equal(one, other) for one, other in zip(expected, heard, strict=True))
    assert not moments.sums.requires_grad
    torch.testing.assert_close(moments.mean(), second_moments(backbone, layers, batches(12)))


def test_every_second_pass_is_heard_from_the_first_on() -> None:
    layer = nn.Linear(1, 1)
    moments = SecondMoments([layer], every=2)
    with moments.recording():
        for value in (1.0, 2.0, 3.0, 4.0, 5.0):
            layer(torch.tensor([[value]]))
    assert moments.tokens.tolist() == [3]
    assert moments.mean().item() == pytest.approx((1 + 9 + 25) / 3)


def test_sums_survive_a_checkpoint_in_the_middle_of_training() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole, interrupted, resumed = SecondMoments([layer]), SecondMoments([layer]), SecondMoments([layer])
    with whole.recording():
        layer(x[:5]), layer(x[5:])
    with interrupted.recording():
        layer(x[:5])
    resumed.load_state_dict(interrupted.state_dict())
    with resumed.recording():
        layer(x[5:])
    assert torch.equal(resumed.mean(), whole.mean())
    resumed.clear()
    assert resumed.sums.numel() == 0
    resumed.load_state_dict(SecondMoments([layer]).state_dict())


def test_a_statistic_does_not_adopt_the_layers_it_listens_to() -> None:
    assert set(SecondMoments([nn.Linear(3, 1)]).state_dict()) == {"sums", "tokens", "_extra_state"}


def test_layers_of_two_widths_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Layers of 3 and 4 inputs share no statistic: give layers of one width"
    ):
        SecondMoments([nn.Linear(4, 1), nn.Linear(3, 1)])


def test_second_moments_of_no_token_are_refused() -> None:
    with pytest.raises(ValueError, match="seen no token: run images"):
        SecondMoments([nn.Linear(4, 1)]).mean()


# Full-weight gradients


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_factor_gradients_come_from_the_full_weight_gradient(dtype: torch.dtype, bound: float) -> None:
    backbone, layers = adapted(("k", "v", "proj"))
    backbone.to(dtype)
    (batch,) = batches(12, dtype=dtype)
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


def test_full_weight_gradients_are_the_slopes_of_the_mean_loss() -> None:
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


def test_full_weight_gradients_do_not_depend_on_how_images_are_split() -> None:
    backbone, layers = adapted()
    whole, parts = (full_weight_gradients(loss_of(backbone), layers, batches(size)) for size in (12, 5))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_full_weight_gradients_are_taken_where_gradients_are_off_and_leave_no_trace() -> None:
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


def test_weights_are_frozen_again_after_a_broken_pass() -> None:
    backbone, layers = adapted()
    with pytest.raises(ValueError, match="do not fit"):
        full_weight_gradients(loss_of(backbone), layers, [(torch.zeros(1, 3, 4, 4), torch.zeros(1))])
    assert not any(layer.weight.requires_grad for layer in layers)


def test_a_second_gradient_pass_in_one_mixed_precision_context_sees_the_weights_as_they_are_now() -> None:
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


def test_a_gradient_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch to take a gradient of"):
        full_weight_gradients(lambda images, _: images.sum(), [nn.Linear(2, 1)], [])


# Several processes


def test_processes_that_share_the_images_measure_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(part: Batches) -> list[Tensor]:
        backbone, layers = adapted()
        means, moments = ClassMeans(range(3)), SecondMoments(layers)
        measure(backbone, part, means, moments)
        return [means.mean(), moments.mean(), *full_weight_gradients(loss_of(backbone), layers, part)]

    (everything, labels), *_ = batches(12)
    unequal = [[(everything[:4], labels[:4])], [(everything[4:], labels[4:])]]
    sent: list[Tensor] = []
    expected = measured(batches(12))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sent.append(sums.clone()))
    measured(unequal[0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(sent.pop(0)))
    found = measured(unequal[1])
    assert not sent
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if one.dtype == torch.float32 else 1e-10)


# Sketches and averages of inputs


def protecting(columns: int) -> GPM:
    """Return a memory of two layers, 32 wide, in which random directions are protected."""
    memory = GPM(2, 32)
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        basis = torch.linalg.qr(torch.randn(32, columns, generator=generator, dtype=torch.float64)).Q
        memory._buffers[f"basis_{layer}"] = basis
    return memory


@pytest.mark.parametrize("columns", (0, 5))
def test_a_sketch_as_wide_as_the_inputs_is_exact_outside_of_what_is_protected(columns: int) -> None:
    backbone, layers = adapted()
    memory = protecting(columns)
    sketch = InputSketch(layers, memory, rows=32)
    measure(backbone, batches(4), sketch)
    moments = second_moments(backbone, layers, batches(12))
    for layer, (ours, exact) in enumerate(zip(sketch.mean(), moments, strict=True)):
        outside = memory.right_residual(memory.residual(exact, layer), layer)
        ours_outside = memory.right_residual(memory.residual(ours, layer), layer)
        torch.testing.assert_close(ours_outside, outside, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", (2, 8))
def test_energies_of_a_sketch_are_exact_however_small_it_is(rows: int) -> None:
    backbone, layers = adapted()
    memory = protecting(5)
    sketch = InputSketch(layers, memory, rows=rows)
    measure(backbone, batches(4), sketch)
    moments = second_moments(backbone, layers, batches(12))
    found = sketch.mean()
    traces = [m.diagonal(dim1=1, dim2=2).sum(1) for m in (found, moments)]
    torch.testing.assert_close(*traces, atol=0, rtol=1e-5)
    torch.testing.assert_close(memory.held_energy(found), memory.held_energy(moments), atol=1e-5, rtol=0)


def test_a_sketch_errs_by_no_more_than_what_frequent_directions_guarantee() -> None:
    """No direction gains, and none loses more than the whole divided by the number of rows."""
    backbone, layers = adapted()
    sketch = InputSketch(layers, GPM(2, 32), rows=8)
    measure(backbone, batches(4), sketch)
    moments = second_moments(backbone, layers, batches(12))
    tokens = sketch.tokens[:, None, None]
    kept = sketch.sketch.double().mT @ sketch.sketch.double() / tokens
    lost = torch.linalg.eigvalsh(moments - kept)
    assert lost.min() > -1e-5
    assert bool((lost.max(dim=1).values <= moments.diagonal(dim1=1, dim2=2).sum(1) / 8).all())


@pytest.mark.parametrize(("images", "places"), ((256, 5), (512, 17), (256, 65), (12, 5)))
def test_a_sketch_takes_tokens_from_every_place_of_an_image(images: int, places: int) -> None:
    """A stride that divides the number of places would hear the same ones of every image."""
    layer = nn.Linear(8, 8)
    sketch = InputSketch([layer], GPM(1, 8), rows=4, most_tokens=256)
    heard: list[Tensor] = []
    sketch.take = lambda index, tokens: heard.append(tokens)  # type: ignore[method-assign]
    marked = torch.arange(places).float()[None, :, None].expand(images, places, 8)
    with sketch.recording():
        layer(marked)
    drawn = heard[0][_spread(images * places, 256)][:, 0]
    assert len(drawn) == min(256, images * places)
    counts = torch.bincount(drawn.long(), minlength=places)
    assert counts.min() >= 1
    assert counts.max() <= 2 * len(drawn) / places


def test_a_sketch_counts_the_tokens_that_it_takes() -> None:
    backbone, layers = adapted()
    sketch = InputSketch(layers, GPM(2, 32), rows=4, most_tokens=20)
    measure(backbone, batches(12), sketch)
    assert sketch.tokens.tolist() == [20, 20]


def test_what_a_sketch_cannot_do_is_refused() -> None:
    _, layers = adapted()
    with pytest.raises(ValueError, match="set energy to features"):
        InputSketch(layers, GPM(2, 32, "covariance"))
    with pytest.raises(ValueError, match="give it at least one"):
        InputSketch(layers, GPM(2, 32), rows=0)
    with pytest.raises(ValueError, match="seen no token"):
        InputSketch(layers, GPM(2, 32)).mean()


def test_token_averages_take_the_mean_over_batches_at_each_place() -> None:
    backbone, layers = adapted()
    averages = TokenAverages(layers)
    measure(backbone, batches(5), averages)  # 5, 5 and 2: the last is another size, and left out
    inputs: list[Tensor] = []
    handle = layers[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    for images, _ in batches(5)[:2]:
        backbone(images)
    handle.remove()
    mean = (inputs[0] + inputs[1]) / 2
    torch.testing.assert_close(averages.second_moments()[0], mean.mT @ mean / len(mean))


def test_token_averages_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="seen no token"):
        TokenAverages(adapted()[1]).second_moments()
