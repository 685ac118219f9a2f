"""A second device for tests: its tensors compute on the CPU, and everything else about it is an accelerator.

A tensor of the device ``twin`` holds a CPU tensor that nobody else sees. Every operation runs on these CPU
tensors, so its values are real: ranks follow from energies, decompositions converge, losses fall. But torch
treats the device as it treats CUDA. An operation on tensors of two devices is refused in CUDA's words, a
random generator must belong to the device, only main memory is pinned, and whatever makes a host wait for a
GPU, such as ``.item()``, is recorded and can be refused.

It is a PrivateUse1 backend in Python: ``torch.utils.backend_registration`` and a dispatch mode.
FakeTensorMode would be shorter, but it has no values, and ranks and decompositions need values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten

# What makes the host wait for the device, on CUDA: the size or the value of the result must be known.
_WAITS = {
    aten._local_scalar_dense.default: "fetches a number",
    aten.is_nonzero.default: "fetches a truth value",
    aten.equal.default: "fetches the outcome of a comparison",
    aten.nonzero.default: "fetches the number of entries that are not zero",
    aten.masked_select.default: "fetches the number of selected entries",
    aten._unique2.default: "fetches the number of unique values",
    aten.unique_consecutive.default: "fetches the number of unique values",
    aten.unique_dim.default: "fetches the number of unique values",
    aten.repeat_interleave.Tensor: "fetches the number of repeats",
    aten._linalg_eigh.default: "waits for a decomposition",
    aten._linalg_svd.default: "waits for a decomposition",
    aten.linalg_qr.default: "waits for a decomposition",
    aten.linalg_eig.default: "waits for a decomposition",
}


class _Module(_DummyBackendModule):
    """What torch asks of the module of a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        """Return at once: every operation is done when it returns."""


_setup_privateuseone_for_python_backend("twin", backend_module=_Module())
TWIN = torch.device("twin", 0)


class Wait(RuntimeError):
    """A step makes the host wait for the device."""


class TwinTensor(Tensor):
    """A tensor of the second device.

    Attributes:
        held: The CPU tensor with its values.
    """

    held: Tensor

    @staticmethod
    def __new__(cls: type[TwinTensor], held: Tensor) -> TwinTensor:
        made: TwinTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=TWIN,
            dispatch_device=True,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on {TWIN}"

    def tolist(self) -> Any:
        """Return the values, for which a host waits."""
        return self.cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        """Refuse, as on CUDA."""
        raise TypeError(
            "can't convert twin:0 device type tensor to numpy. Use Tensor.cpu() to copy it first."
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.prim.device.default:
            return TWIN
        return _computed(function, args, kwargs or {}, None)


def _computed(function: Any, args: Sequence[Any], kwargs: dict[str, Any], waits: list[str] | None) -> Any:
    """Run an operation on CPU tensors; its result is of the device that the operation would give it."""
    values, form = pytree.tree_flatten((tuple(args), kwargs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    twins = [tensor for tensor in tensors if isinstance(tensor, TwinTensor)]
    name = function._schema.name
    target = kwargs.get("device")
    if name == "aten::copy_":
        on_twin = isinstance(args[0], TwinTensor)
    elif name == "aten::_to_copy" or not tensors or target is not None:
        on_twin = bool(twins) if target is None else torch.device(target).type == "twin"
    else:
        on_twin = bool(twins)
        _require_one_device(function, args, tensors, twins)
    _require_own_generator(function, kwargs, target)
    if waits is not None and twins and (reason := _wait(function, args, kwargs, on_twin)):
        waits.append(f"{name.removeprefix('aten::')} {reason}")
    cpu = [_on_cpu(value) for value in values]
    cpu_args, cpu_kwargs = pytree.tree_unflatten(cpu, form)
    found = function(*cpu_args, **cpu_kwargs)
    if not on_twin or name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
        return found
    wrapped = pytree.tree_map_only(Tensor, TwinTensor, found)
    return return_and_correct_aliasing(function, tuple(args), kwargs, wrapped)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, TwinTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "twin" else value


def _require_one_device(
    function: Any, args: Sequence[Any], tensors: Sequence[Tensor], twins: Sequence[Tensor]
) -> None:
    """Refuse tensors of two devices; as on CUDA, a CPU scalar may meet them, and CPU indices may index."""
    if not twins:
        return
    name = function._schema.name
    strangers = [tensor for tensor in tensors if not isinstance(tensor, TwinTensor)]
    if name in ("aten::index.Tensor", "aten::index", "aten::index_put_", "aten::index_put"):
        if isinstance(args[0], TwinTensor):
            strangers = strangers if name.startswith("aten::index_put") and not _is_twin(args[2]) else []
    if any(tensor.ndim > 0 for tensor in strangers):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {TWIN} and cpu! "
            f"(in {function})"
        )


def _is_twin(value: Any) -> bool:
    return isinstance(value, TwinTensor) or (isinstance(value, Tensor) and value.ndim == 0)


def _require_own_generator(function: Any, kwargs: dict[str, Any], target: Any) -> None:
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and target is not None:
        if generator.device.type != torch.device(target).type:
            raise RuntimeError(
                f"Expected a '{torch.device(target).type}' device type for generator but found "
                f"'{generator.device.type}' (in {function})"
            )


def _wait(function: Any, args: Sequence[Any], kwargs: dict[str, Any], on_twin: bool) -> str | None:
    """Return how an operation makes the host wait for the device, None if it does not."""
    if function in _WAITS:
        return _WAITS[function]
    name = function._schema.name
    if name in ("aten::_to_copy", "aten::copy_") and not on_twin:
        return "copies to main memory"
    if name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        value_is_scalar = name != "aten::index" and args[2].numel() == 1
        if masks and not value_is_scalar:
            return "fetches the number of entries that a mask selects"
    return None


class SecondDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on and moved to the device ``twin``.

    Attributes:
        waits: What made the host wait while :meth:`watching`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.prim.device.default:
            return TWIN
        return _computed(function, args, kwargs or {}, self.waits)

    def __enter__(self) -> SecondDevice:
        # torch.tensor(…, device=…) then makes a CPU tensor and moves it, which a dispatch mode sees.
        self._lifts_only_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts_only_cpu)
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Refuse whatever makes the host wait.

        Raises:
            Wait: At the end, if something did.
        """
        before, self.waits = self.waits, []
        try:
            yield
            if self.waits:
                raise Wait("; ".join(dict.fromkeys(self.waits)))
        finally:
            self.waits = before


class TwinAccelerator(Accelerator):
    """The device for Lightning: one, always there."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing: the device needs no set-up."""

    def teardown(self) -> None:
        """Do nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Return nothing: there is no memory to measure."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """Return the number of devices."""
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the device."""
        return [TWIN]

    @staticmethod
    def auto_device_count() -> int:
        """Return one."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return that it is there."""
        return True

    @staticmethod
    def name() -> str:
        """Return its name."""
        return "twin"


# Autocast on CUDA casts these to the lower type, and keeps these in float32; torch has no table for a
# PrivateUse1 backend, so the ones that a transformer and its training use are registered here.
_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
_FLOAT32 = (
    "cross_entropy_loss",
    "mse_loss",
    "linalg_vector_norm",
    "log_softmax.int",
    "softmax.int",
    "layer_norm",
)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]
_library = torch.library.Library("aten", "IMPL")
_all = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_all.fallback(torch.library.fallthrough_kernel)


def _cast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def cast(*args: Any, **kwargs: Any) -> Any:
        def to(value: Tensor) -> Tensor:
            lower = value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype()) if lower and value.device.type == "twin" else value

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(
                *pytree.tree_map_only(Tensor, to, args), **pytree.tree_map_only(Tensor, to, kwargs)
            )

    return cast


for _name in _LOWER:
    _library.impl(_name, _cast(_name, lambda: torch.get_autocast_dtype("twin")), "AutocastPrivateUse1")
for _name in _FLOAT32:
    _library.impl(_name, _cast(_name, lambda: torch.float32), "AutocastPrivateUse1")
