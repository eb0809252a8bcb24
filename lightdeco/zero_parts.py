"""What DeepSpeed holds of a run: whole tensors for checkpoints, back into its parts, and a plain model at the end.

ZeRO keeps the trained parameters of a process in long vectors of float32, which the optimizer updates and whose state
it has. `InZeroParts._slice` says where in them a parameter lies; all else follows from that.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import State
from .checkpoint.dealt import Dealer
from .errors import CheckpointError
from .group import Group
from .held import Held

#: What DeepSpeed sets in a module while it runs, besides what it sets when it begins.
_LATER: Final = ("ds_", "applied_pre_backward_ref_cnt")


class Slice(NamedTuple):
    """The part of a parameter that this process updates."""

    vector: Tensor
    """The long vector in which it lies."""
    start: int
    """Where in the vector."""
    offset: int
    """Where in the parameter, as one row."""
    size: int


class Traces:
    """What modules and parameters were before DeepSpeed wrote into them."""

    def __init__(self, steps: nn.Module) -> None:
        self._modules = [(module, set(vars(module))) for module in steps.modules()]
        self._parameters = [(p, set(vars(p))) for p in steps.parameters()]
        self.devices = [(tensor, tensor.device) for tensor in (*steps.parameters(), *steps.buffers())]

    def remove(self) -> None:
        """Leave plain parameters, and modules as they were, but for what the user set meanwhile."""
        from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

        for module, before in self._modules:
            if isinstance(own := module._parameters, ZeROOrderedDict):
                module._parameters = dict(own)
                for name in [name for name in vars(module) if name not in before and _is_deepspeeds(name)]:
                    delattr(module, name)
        for parameter, attributes in self._parameters:
            parameter.grad = None
            for name in [name for name in vars(parameter) if name not in attributes]:
                del vars(parameter)[name]


_SET: Final = ("_external_params", "_original_parameters", "all_parameters", "post_bwd_fn", "pre_bwd_fn")


def _is_deepspeeds(name: str) -> bool:
    return name in _SET or name.startswith(_LATER)


class InZeroParts(Held):
    """DeepSpeed's engine holds the optimizer's state, and at stage 3 the parameters, from `begin` to `gather`."""

    cut = True

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group = model, group
        self._engine: Any = None
        self._optimizer: Optimizer | None = None
        self._groups: list[list[nn.Parameter]] = []

    def begin(self, engine: Any, optimizer: Optimizer, groups: list[list[nn.Parameter]], traces: Traces) -> None:
        """The engine is there; `groups`: the parameters of the optimizer before it."""
        self._engine, self._optimizer, self._groups, self._traces = engine, optimizer, groups, traces

    # ---- for checkpoints ---------------------------------------------------------------------------------------------

    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        """The parameters of the model that are in each group of the optimizer."""
        return self._groups

    def state_of(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's `state_dict`, without the states, which come with `deal`."""
        numbers = iter(range(sum(map(len, self._groups))))
        options = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        groups = [
            {**each, "params": [next(numbers) for _ in own]} for each, own in zip(options, self._groups, strict=True)
        ]
        return {"state": {}, "param_groups": groups}

    def deal(self, state: State, optimizers: Mapping[str, Optimizer]) -> None:
        """Give each tensor that is cut to one process, whole; one or two messages for each."""
        dealer = Dealer(self._group)
        for name, value in self._model.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                state.model[name] = dealer.give(self._weights(value))
        for name, optimizer in optimizers.items():
            for index, parameter in enumerate(self._flat()):
                found = dict(self._states(optimizer, parameter))
                if found:
                    state.optimizers[name]["state"][index] = {
                        key: dealer.give(value) if key != "step" and isinstance(value, Tensor) else value
                        for key, value in found.items()
                    }

    def load(self, optimizer: Optimizer, state: Mapping[str, Any], name: str) -> None:
        """Put whole states, which every process has read, into the parts of this one.

        Raises:
            CheckpointError: the state is of other parameters.
        """
        for group, saved, own in zip(optimizer.param_groups, state["param_groups"], self._groups, strict=True):
            if len(saved["params"]) != len(own):
                raise CheckpointError(
                    f"{name!r} has a group of {len(own)} parameters; its state in the checkpoint is for "
                    f"{len(saved['params'])}"
                )
            group.update({key: value for key, value in saved.items() if key != "params"})
        keys = [key for saved in state["param_groups"] for key in saved["params"]]
        for key, parameter in zip(keys, self._flat(), strict=True):
            found = self._slice(parameter)
            for part, value in state["state"].get(key, {}).items():
                if found is None:
                    continue
                live = optimizer.state[found.vector]
                if part == "step" or not isinstance(value, Tensor):
                    live[part] = value.clone() if isinstance(value, Tensor) else value
                    continue
                if value.shape != self._shape(parameter):
                    shapes = f"{tuple(value.shape)} for a parameter of {tuple(self._shape(parameter))}"
                    raise CheckpointError(
                        f"{part!r} of {name!r} in the checkpoint has the shape {shapes}; strategy='deepspeed' cannot "
                        "cut it"
                    )
                if part not in live:
                    live[part] = torch.zeros_like(found.vector, dtype=value.dtype)
                row = value.reshape(-1)[found.offset : found.offset + found.size]
                live[part][found.start : found.start + found.size].copy_(row)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Give every process the whole model, where it was before the engine; then the engine is gone.

        At stage 3 that is where `fit` found it: all of it may be too large for the device of the run.
        """
        if self._engine is None:
            return
        for tensor, device in self._traces.devices:
            tensor.data = self._weights(tensor).to(device, copy=True)
        self.end()

    def end(self) -> None:
        """Leave nothing of the engine in model and optimizer.

        After an error at stage 3 the weights of the other processes cannot be had: NaN stands for all of them.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        lost = [(p, shape) for p in self._model.parameters() if (shape := self._shape(p)) != p.shape]
        engine.destroy()
        self._traces.remove()
        for parameter, shape in lost:
            parameter.data = torch.full(shape, float("nan"), dtype=parameter.dtype, device=parameter.device)
        if self._optimizer is not None:
            self._optimizer.state.clear()
            for group, own in zip(self._optimizer.param_groups, self._groups, strict=True):
                group["params"] = own

    # ---- one parameter -----------------------------------------------------------------------------------------------

    def _flat(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self._groups for parameter in group)

    def _shape(self, parameter: Any) -> torch.Size:
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape

    def _weights(self, parameter: Any) -> Tensor:
        """The whole parameter; every process calls it."""
        if self._engine is None or not hasattr(parameter, "ds_tensor"):
            return parameter.detach()  # type: ignore[no-any-return]
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()  # type: ignore[no-any-return]

    def _states(self, optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Any]]:
        """The optimizer's state of a parameter, each tensor whole; every process calls it."""
        if not parameter.requires_grad:
            return
        vector, own = self._vector(parameter), self._slice(parameter)
        for key, value in optimizer.state.get(vector, {}).items():
            if not isinstance(value, Tensor) or key == "step":
                yield key, value.clone() if isinstance(value, Tensor) else value
            elif value.shape == vector.shape:
                row = torch.zeros(self._shape(parameter).numel(), dtype=value.dtype, device=value.device)
                if own is not None:
                    row[own.offset : own.offset + own.size] = value[own.start : own.start + own.size]
                torch.distributed.all_reduce(row.view(torch.uint8))  # each byte is 0 but on one process: no rounding
                yield key, row.view(self._shape(parameter))
            else:
                raise CheckpointError(
                    f"{key!r} of {type(optimizer).__name__} has the shape {tuple(value.shape)}, and no place for each "
                    "number of a parameter, which a checkpoint cannot hold; use another optimizer, or checkpoint=False"
                )

    def _vector(self, parameter: Any) -> Tensor:
        """The long vector of this process in which the parameter would lie."""
        zero = self._engine.optimizer
        if hasattr(parameter, "ds_tensor"):
            vector: Tensor = zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(parameter)][0]]
        else:
            index = next(i for i, group in enumerate(self._groups) if any(p is parameter for p in group))
            vector = zero.single_partition_of_fp32_groups[index]
        return vector

    def _slice(self, parameter: Any) -> Slice | None:
        """The part of it that this process updates, if it does."""
        if not parameter.requires_grad:
            return None
        vector = self._vector(parameter)
        if hasattr(parameter, "ds_tensor"):
            zero = self._engine.optimizer
            _, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = size * self._group.rank  # the last parts are padded
            size = max(0, min(size, parameter.ds_numel - offset))
            return Slice(vector, start, offset, size) if size else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place, part = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Slice(vector, place.start, part.start, part.numel)
