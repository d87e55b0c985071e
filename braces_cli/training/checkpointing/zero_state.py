"""The optimizer's state under DeepSpeed ZeRO-1 and 2, whole, as a plain optimizer keeps it.

DeepSpeed spreads moments and float32 parameters over the processes, and its own checkpoints are pickles. Here its
functions for single parameters gather and set them instead, so that a checkpoint is the same under every launcher, and
a run can go on under another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from braces_cli.core.utils.errors import ConfigError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """What `training_state` reads and sets of an optimizer, for one that DeepSpeed has wrapped.

    Args:
        optimizer: DeepSpeed's, around AdamW.
        groups: parameters of each group, as they were before it was wrapped.

    Raises:
        ConfigError: this optimizer of DeepSpeed's is not that of ZeRO-1 and 2, as with mixed precision.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Sequence[Any]]) -> None:
        if not hasattr(optimizer, "single_partition_of_fp32_groups"):
            what = f"no checkpoint can be written of its {type(optimizer).__name__}"
            raise ConfigError(what, where="DeepSpeed", hint="Start from recipes/launch/zero2.yaml.")
        self._zero, self._groups = optimizer, groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings and parameters of each group."""
        groups = zip(self._zero.param_groups, self._groups, strict=True)
        return [{**settings, "params": list(parameters)} for settings, parameters in groups]

    def state_dict(self) -> dict[str, Any]:
        """As AdamW gives it once it has made a step; every process must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, flat in zip(self.param_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            first = len(state)
            for parameter in group["params"]:
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
                state[len(state)] = {"step": self._zero.optimizer.state[flat]["step"], **moments}
            groups.append({**group, "params": list(range(first, len(state)))})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Take over `stored`, and what the parameters hold now as their float32 values."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero, index = self._zero, 0
        for flat in zero.single_partition_of_fp32_groups:
            # AdamW makes its state in its first step, which is behind this run.
            zero.optimizer.state[flat] = {
                "step": torch.as_tensor(stored["state"][0]["step"]).clone(),
                **{name: torch.zeros_like(flat) for name in _MOMENTS},
            }
        self._link()
        for parameters in self._groups:
            for parameter in parameters:
                safe_set_full_fp32_param(parameter, parameter.detach().float())
                for name in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, stored["state"][index][name], name)
                index += 1
        for group, settings in zip(zero.param_groups, stored["param_groups"], strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})

    def _link(self) -> None:
        """Tell DeepSpeed where the moments of each parameter lie.

        It does so itself after the first step of the first group, when the other groups have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self._zero
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)
