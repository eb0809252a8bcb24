"""Loss scaling for `precision="16-mixed"`: a `Scaler` for each optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optim import gradients_of


def wanted(precision: str) -> bool:
    """Whether gradients would vanish in this precision."""
    return precision == "16-mixed"


class Scaler:
    """Multiplies losses, so that gradients do not vanish in fp16, and leaves out updates in which they overflow.

    The factor halves with each such update and doubles after 2000 good ones (`torch.amp.GradScaler`). Each optimizer
    has one of its own, since its gradients overflow without those of the others.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._scaler = torch.amp.GradScaler(device.type)
        self._seen = False
        # The first updates are often left out; a scheduler by epoch then steps first, of which torch would warn.
        vars(optimizer)["_opt_called"] = True

    @property
    def factor(self) -> float:
        """What losses are multiplied by. Waits for the device."""
        return float(self._scaler.get_scale())

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the factor."""
        return self._scaler.scale(loss)

    def unscale(self) -> None:
        """Divide the optimizer's gradients by the factor, and note whether all of them are finite."""
        self._seen = bool(gradients_of(self._optimizer))
        if self._seen:
            self._scaler.unscale_(self._optimizer)

    def adapt(self) -> bool:
        """Adapt the factor to what `unscale` saw; whether all gradients were finite. Waits for the device."""
        before = self.factor
        if self._seen:
            self._scaler.update()
        return self.factor >= before

    def state_dict(self) -> dict[str, Any]:
        """The factor and how many good updates there were since it changed."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._scaler.load_state_dict(dict(state))
