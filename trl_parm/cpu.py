# SPDX-License-Identifier: Apache-2.0
"""Linear layers that multiply as fast as a CPU can: by oneDNN, with weights that are packed once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


Model = TypeVar("Model", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16)
FEWEST_ROWS = 4
"""With AVX512 products with fewer rows take as long, and on some CPUs longer: they are filled up."""
FEW = range(2, 128)
"""The rows with which products in float32 from packed weights are, on the whole, faster on a CPU without AVX512. One
row, and more rows, are PyTorch's own kernels' there (`benchmarks/linear_layers.py`, on one such CPU)."""


def optimize_for_cpu(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Makes the linear layers of a model on a CPU multiply by oneDNN with packed weights, in training too.

    A product with a few rows, as in decoding, then costs one reading of the weights; PyTorch's default kernels take
    longer. Without AVX512 products in float32 are made so with 2 to 127 rows alone. Each plain
    `nn.Linear` is replaced, in place, by a [`PackedLinear`] with the same parameters, so that adapters, saving,
    merging and training go on as before, and weights that change are packed anew. It costs the memory of one packed
    copy of the weights. [`undo_optimize_for_cpu`] takes it back.

    Call it before models are wrapped for distribution, and before you keep hold of single layers. Compiled forwards,
    autocast and weights that were made in inference mode use PyTorch's own kernels.

    Args:
        model (`nn.Module`): Any model on a CPU, with adapters or without.
        dtype (`torch.dtype`, *optional*):
            Of the products, float32 or bfloat16; inputs, outputs and parameters keep theirs. If not given, bfloat16
            for a CPU with units for it (AVX512-BF16 or AMX), and otherwise float32. In bfloat16 log-probabilities are
            as coarse as on a GPU.

    Returns:
        The model.

    Raises:
        ValueError: no linear layer that could be packed (quantized or on another device), weights on `meta`, a model
            that is packed already, another dtype, bfloat16 on a CPU on which oneDNN has no products in it (without
            AVX512), or a PyTorch without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("This PyTorch has no oneDNN, by which linear layers are packed. Use the model as it is.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` is {dtype}, but products can be made in float32 or bfloat16.")
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        raise ValueError(
            "oneDNN makes no products in bfloat16 on this CPU, which has no AVX512. Leave `dtype` out, for float32."
        )
    if dtype == torch.bfloat16 and not has_bfloat16_units():
        warnings.warn(
            "This CPU has no units for bfloat16, so that its products are slower than in float32. Leave `dtype` out.",
            stacklevel=2,
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("The model's linear layers are packed already. Call `undo_optimize_for_cpu` first.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model has weights on `meta`, which are not there. Load it whole into memory first.")
    dtype = dtype or getattr(torch, cast(str, products_of()))
    small = _of_adapters(model)
    packed = {m: PackedLinear.of(cast(nn.Linear, m), dtype) for m in model.modules() if _can_be_packed(m, small)}
    if not packed:
        raise ValueError(
            f"No linear layer of the {type(model).__name__} could be packed: it needs a plain `nn.Linear` in float32 "
            "or bfloat16 on a CPU, which is not quantized. Use the model as it is."
        )
    _replace(model, packed)
    return cast(Model, packed.get(cast(Any, model), model))


def optimize_loaded(model: Model, dtype: str = "auto") -> Model:
    """As [`optimize_for_cpu`], of a model that was just loaded with a `dtype`, by its name: one that can't be packed,
    or is on another device, stays as it is. Products are in bfloat16 on a CPU with units, unless it is `float32`; with
    `bfloat16` on a CPU on which oneDNN has none the model stays as it is too.
    """
    products = products_of(dtype)
    if products is None:
        return model
    try:
        return optimize_for_cpu(model, getattr(torch, products))
    except ValueError:
        return model


def products_of(dtype: str = "auto") -> str | None:
    """The dtype of products of a model loaded with a `dtype`, by its name; `None` if it is not packed."""
    if dtype == "auto":
        return "bfloat16" if has_bfloat16_units() else "float32"
    return dtype if dtype == "float32" or dtype == "bfloat16" and multiplies_bfloat16() else None


def undo_optimize_for_cpu(model: Model) -> Model:
    """Puts plain linear layers back, with the parameters as they are now, and returns the model."""
    plain = {module: module.plain() for module in model.modules() if isinstance(module, PackedLinear)}
    _replace(model, plain)
    return cast(Model, plain.get(cast(Any, model), model))


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has products in bfloat16 on this CPU, fast or slow."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_avx512() -> bool:
    """Whether PyTorch uses this CPU's AVX512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weight, made when it is first needed.

    Its parameters are those of the layer that it replaces. The copy is made anew after the weight was replaced, was
    changed in place, or was asked for as `layer.weight`, since who has it may change its `data` without a trace. A
    weight that trains has no copy: PyTorch's fused optimizers leave no trace either. Nor has one that was made in
    inference mode, of which PyTorch counts no changes.

    Attributes:
        dtype (`torch.dtype` or `None`): Of products; the weight's own if `None`.
        few (`bool`): Whether products in float32 are made so with [`FEW`] rows alone.
    """

    dtype: torch.dtype | None
    few: bool
    _trains = False  # whether the weight has had a forward with gradients in this mode
    _packed: torch.Tensor | None
    _of: tuple[int, int]

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype | None = None) -> PackedLinear:
        """One with the parameters and all else of a layer."""
        few = dtype in (None, torch.float32) and not has_avx512()
        return cast(PackedLinear, _like(linear, cls, dtype=dtype, few=few, _packed=None, _of=(0, 0)))

    def plain(self) -> nn.Linear:
        """A plain layer with the same parameters."""
        return _like(self, nn.Linear)

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._packed = None
        return self._parameters["weight"]

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight", value)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = cast(torch.Tensor, self._parameters["weight"]), self._parameters["bias"]
        if (
            torch.compiler.is_compiling()
            or type(input) is not torch.Tensor  # such as a fake one
            or input.dtype not in DTYPES
            or weight.dtype not in DTYPES
            or weight.is_inference()
            or not (weight.is_cpu and input.is_cpu)
            or torch.is_autocast_enabled("cpu")
            or not input.numel()
            or self._is_for_pytorch(input, weight)
        ):
            return F.linear(input, weight, bias)
        gradients = torch.is_grad_enabled()
        if weight.requires_grad and (gradients or self.training or self._trains):
            self._packed, self._trains = None, self._trains or gradients
            return F.linear(input, weight, bias)
        if not gradients:
            return self._product(input)
        if bias is not None and bias.requires_grad:
            return F.linear(input, weight, bias)
        return cast(torch.Tensor, _Product.apply(input, self))

    def _is_for_pytorch(self, input: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether PyTorch's own kernels are faster."""
        in_float32 = self.few and input.dtype == weight.dtype == torch.float32
        return in_float32 and input.numel() // input.shape[-1] not in FEW

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        packed, bias = self.packed(), self._parameters["bias"]
        rows = x.numel() // x.shape[-1]
        given, filled = x.to(packed.dtype), rows < FEWEST_ROWS and not self.few
        if filled:
            given = F.pad(given.reshape(rows, -1), (0, 0, 0, FEWEST_ROWS - rows))
        bias = None if bias is None else bias.to(packed.dtype)
        found = torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")
        if filled:
            found = found[:rows].view(*x.shape[:-1], -1)
        return found.to(x.dtype)

    def packed(self) -> torch.Tensor:
        """The packed copy of the weight as it is now."""
        weight = cast(torch.Tensor, self._parameters["weight"])
        now = weight.data_ptr(), weight._version
        if self._packed is None or self._of != now:
            source = weight.detach().to(self.dtype or weight.dtype)
            self._packed, self._of = torch.ops.mkldnn._reorder_linear_weight(source, 2 * FEWEST_ROWS), now
        return cast(torch.Tensor, self._packed)

    def train(self, mode: bool = True) -> PackedLinear:
        self._trains = False
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, products in {self.dtype or 'the dtype of the weight'}"


class _Product(torch.autograd.Function):
    """The product of a [`PackedLinear`] whose input alone gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.dtype = layer.packed().dtype
        ctx.save_for_backward(layer._parameters["weight"])
        return layer._product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return (gradient.to(ctx.dtype) @ weight.to(ctx.dtype)).to(gradient.dtype), None


def _can_be_packed(module: nn.Module, small: set[nn.Module]) -> bool:
    # Where another forward was put in its place, as by accelerate's offloading, weights come and go.
    if type(module) is not nn.Linear or module in small or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.is_cpu and weight.dtype in DTYPES


def _of_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules of PEFT's adapters, which are small, and some of which are asked for their kind."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    containers = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {module for container in containers if isinstance(container, nn.Module) for module in container.modules()}


def _like(linear: nn.Linear, kind: type[nn.Linear], **attributes: Any) -> nn.Linear:
    """A layer of another class that shares all that a layer has, hooks with their handles too."""
    new = kind.__new__(kind)
    own = ("dtype", "few", "_packed", "_of", "_trains")
    new.__dict__.update({name: value for name, value in linear.__dict__.items() if name not in own})
    new.__dict__.update(attributes)
    return new


def _replace(model: nn.Module, new: Mapping[Any, nn.Linear]) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
