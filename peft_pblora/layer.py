# SPDX-License-Identifier: Apache-2.0
"""PEFT's side of a preference-conditioned linear layer: several adapters, merging, disabling, rows of a batch."""

import warnings
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from .adapter import LowRankAdapter, check_rows, check_single, expand_rows
from .condition import Condition, staying_aside
from .config import PreferenceConfig
from .rows import RowPlan, current_plan, is_through_tuner


class PreferenceLinear(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, `Conv1D` or quantized) with preference-conditioned adapters beside it.

    All that belongs to an adapter lives in one [`LowRankAdapter`] under `<prefix>adapter.<name>`. [`register`]
    derives a class for each method, since PEFT needs a `prefix` of its own for each.

    Attributes:
        conditions (`dict[str, Condition]`): Conditions of adapters by name, one `dict` for all layers of a method.
    """

    prefix: ClassVar[str]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PreferenceConfig,
        condition: Condition,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.adapter_layer_names = (f"{self.prefix}adapter",)
        self.other_param_names = ("merged_preference", "conditions")
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_preference: dict[str, torch.Tensor] = {}
        self.conditions: dict[str, Condition] = {}
        self.bias_was_added = False
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.fan_in_fan_out = config.fan_in_fan_out
        self.in_features, self.out_features = cast(tuple[int, int], _get_in_out_features(base))
        if self.in_features is None or self.out_features is None:
            raise TypeError(f"Unsupported layer type {type(base)}")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, condition)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The [`LowRankAdapter`] of each adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    def adapter(self, name: str) -> LowRankAdapter:
        """The adapter of this name. Raises `KeyError` if the layer has none."""
        return cast(LowRankAdapter, self.adapters[name])

    def update_layer(self, adapter_name: str, config: PreferenceConfig, condition: Condition) -> None:
        """Adds an adapter, or replaces the one of this name, at the condition that all of its layers share."""
        self.adapters[adapter_name] = LowRankAdapter(
            self.in_features,
            self.out_features,
            core=config.build_core(),
            scaling=config.scaling,
            condition=condition,
            dropout=config.lora_dropout,
            identity=config.init_weights,
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's. The adapters act in the model itself again, see [`Condition`]."""
        super().set_adapter(adapter_names, *args, **kwargs)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                self.adapter(name).condition.aside = False

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's. Those that stepped aside stay so."""
        with staying_aside(self.conditions.values()):
            super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Others that stepped aside stay so."""
        with staying_aside(self.conditions.values()):
            super().delete_adapter(adapter_name)

    def get_delta_weight(self, adapter: str, preference: torch.Tensor | None = None) -> torch.Tensor:
        """The dense ΔW(α) in the base layer's orientation, at the adapter's own preference unless one is given."""
        down, up, _ = self.adapter(adapter).factors(preference)
        delta = up @ down
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds ΔW(α) of the active or named adapters to the base weight, and a shift to its bias, and remembers α.

        Raises:
            ValueError: a preference for each row is set, or `safe_merge` found NaN or infinity in what it would write.
        """
        names = check_adapters_to_merge(self, adapter_names)
        for name in self.conditions.keys() & set(names):  # other layers', too: all of them are merged, or none
            check_single(self.conditions[name].preference)
        preferences = {name: self.adapter(name).condition.preference for name in names if name in self.adapters}
        self._add(preferences, sign=1, safe=safe_merge)
        self.merged_preference |= preferences
        self.merged_adapters += preferences
        for name in preferences:
            self.adapter(name).condition.merged += 1

    def unmerge(self) -> None:
        """Subtracts what `merge` added, at the preference it was merged with."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add({name: self.merged_preference.pop(name)}, sign=-1)
            self.adapter(name).condition.merged -= 1

    def _add(self, preferences: dict[str, torch.Tensor], sign: int, safe: bool = False) -> None:
        """Adds ±ΔW(α) of each adapter to the base weight, and shifts to its bias, which it gets for the time if it has
        none."""
        if not preferences:
            return
        base: Any = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # bitsandbytes packs 4 bits for the CPU at the first forward, and undoes it for saving
        changed = weight = self.get_base_weight()
        shifts = []
        for name, preference in preferences.items():
            *_, shift = self.adapter(name).factors(preference)
            changed = changed + sign * self.get_delta_weight(name, preference)
            shifts += [] if shift is None else [shift]
            if safe and not all(torch.isfinite(part).all() for part in (changed.to(weight.dtype), *shifts)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.set_base_weight(changed.to(weight.dtype))
        if not shifts:
            return
        shift = torch.stack(shifts).sum(0)
        base = self.get_base_layer()
        if base.bias is None:
            base.bias = nn.Parameter(torch.zeros_like(shift, dtype=base.weight.dtype), requires_grad=False)
            self.bias_was_added = True
            warnings.warn(
                "The adapter's shift was merged into a bias that the layer did not have. The model is right as it is, "
                "but saving it would lose the bias unless its architecture has one.",
                stacklevel=3,
            )
        base.bias.data = base.bias.data + sign * shift.to(base.bias.dtype)
        if sign < 0 and self.bias_was_added and not self.merged_adapters:
            base.bias, self.bias_was_added = None, False

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        plan = current_plan()
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if plan is None and self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if plan is None and (self._disable_adapters or self.merged_adapters):
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if self.base_layer._forward_hooks:  # who gave or has kept it may want it as it is
            result = result.clone()
        if plan is not None:
            return self._act_on_rows(x, result, plan)
        if adapter_names is not None:
            return self._mixed_batch(x, result, adapter_names)
        container: Any = self._modules[self.adapter_layer_names[0]]
        adapters = container._modules
        for name in self.active_adapters:
            if name in adapters and (self.training or is_through_tuner() or not adapters[name].condition.aside):
                result = adapters[name](x, result)
        return result

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Each row through its own adapter, or through none where its name is `__base__`."""
        for name in set(adapter_names) & set(self.adapters):
            adapter, rows = self.adapter(name), [row for row, own in enumerate(adapter_names) if own == name]
            preference = adapter.condition.preference
            if preference.ndim == 2:
                preference = expand_rows(preference, len(adapter_names))[rows]
            result[rows] = adapter(x[rows], result[rows], preference)
        return result

    def _act_on_rows(self, x: torch.Tensor, result: torch.Tensor, plan: RowPlan) -> torch.Tensor:
        """Each adapter on its own rows, which stand together: they are views, not copies as in a mixed batch."""
        if self.merged_adapters:
            raise ValueError(f"{self.merged_adapters} are merged and act on all rows. Call `unmerge_adapter()`.")
        adapters: Any = self.adapters._modules
        for (name, rows, condition), (_, part, _) in zip(plan.slices(x), plan.entries):
            if name not in adapters:
                continue
            condition = adapters[name].condition if condition is None else condition
            if condition.rows > 1:
                plan.check(x)
                check_rows(condition.rows, plan.count(part))
            own = result[rows]
            changed = adapters[name].forward(x[rows], own, condition=condition, folded=plan.folded)
            if changed is not own:
                own.copy_(changed)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter has no shift: PEFT converts [`get_delta_weight`] alone, [`save_as_lora`] the shift too.

        PEFT's models ask without a name; it is said of all adapters of the layer then, unless one has that name.
        """
        names = [adapter_name] if adapter_name in self.adapters else self.adapters
        return not any(self.adapter(name).has_shift() for name in names)

    def __repr__(self) -> str:
        return self.prefix.rstrip("_") + "." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def preference_layers(model: nn.Module) -> list[PreferenceLinear]:
    """All layers of a model that have, or had, preference-conditioned adapters."""
    return [module for module in model.modules() if isinstance(module, PreferenceLinear)]
