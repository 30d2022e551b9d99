"""AdamW for weights in bfloat16: torchao's, which rounds them stochastically, with states in float32. Of a
second moment in bfloat16, 0.999 is mostly rounded back to it: it hardly falls, and steps stay small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

try:
    from torchao.optim import _AdamW
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{__name__} needs torchao: pip install torchao", name=error.name) from error


class AdamW(_AdamW):  # type: ignore[misc]
    """For a trainer that takes an optimizer by its name. 8 bytes of states a parameter."""

    def __init__(self, params: Any, *given: Any, bf16_stochastic_round: bool = True, **options: Any) -> None:
        super().__init__(params, *given, bf16_stochastic_round=bf16_stochastic_round, **options)

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """A moment of the parameter ``p``; torchao's are of its dtype."""
        return torch.zeros_like(p, dtype=torch.float32)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, which rounds all states but the step to the parameters' dtype."""
        super().load_state_dict(dict(state_dict))
        for group, before in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], before["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if name != "step":
                        self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)
