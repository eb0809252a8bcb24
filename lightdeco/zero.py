"""`strategy="deepspeed"`: ZeRO, by an engine of DeepSpeed around the steps.

The optimizer's state lies in parts on the processes of a run (stage 1), and the gradients (2), and the parameters (3).
The engine makes forward, backward and update; what counts how much, and when an update is due, is decided here.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import strategies
from .errors import LaunchError, StepError, add_note, warn
from .optim import parameters_of
from .session import Session
from .steps import Steps
from .voting import Voting
from .zero_config import configuration
from .zero_parts import InZeroParts, Traces

#: Said with what goes wrong in a step at stage 3, which may be this.
_NOT_THERE: Final = (
    "At stage 3 of ZeRO the parameters of a module have the shape (0,) unless the module is being called; "
    "deepspeed.zero.GatheredParameters gathers them, see docs/devices.md."
)
#: torch's optimizers that treat each number by itself: ZeRO hands them slices of one long vector.
_BY_NUMBER = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "ASGD")


class Zero(Voting):
    """One process of several around which DeepSpeed's engine is built, once there is an optimizer."""

    def __init__(self, s: Session, stage: int) -> None:
        super().__init__(s.run, s.signals, s.group)
        self.stage = stage
        #: DeepSpeed's; there once `begin` was called.
        self.engine: Any = None
        self._divisor: Any = 1.0
        self._names: dict[Any, str] = {}

    def step(self, key: str, *inputs: object) -> Any:
        """A training step."""
        with self._explained():
            return self.engine(key, *inputs)

    def sync(self, on: bool) -> None:
        """Whether the next backward is the last one of an update."""
        self.engine.set_gradient_accumulation_boundary(on)

    def backward(self, loss: Tensor) -> None:
        """Make gradients, and reduce them as the stage says."""
        with self._explained():
            self.engine.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say with an error at stage 3 what may have led to it."""
        try:
            yield
        except Exception as error:
            if self.stage == 3:
                add_note(error, _NOT_THERE)
            raise

    def divide(self, optimizer: Optimizer, by: Any) -> None:
        """Remember by what the gradients, which lie in the engine, are divided in `apply`."""
        self._divisor = by

    def apply(self) -> bool:
        """Divide the gradients, clip them and update; False where they are not finite, and nothing was updated."""
        # The engine divides by its scale of losses, which is 1 while gradients are made.
        self.engine.optimizer.loss_scale, self._divisor = self._divisor, 1.0
        self.engine.step()
        self.engine.optimizer.loss_scale = 1.0
        return not self.engine.optimizer.overflow

    def refresh(self) -> None:
        """Look whether other parameters require grad than when the engine was built.

        Raises:
            StepError: so it is.
        """
        if self.engine is None:
            return
        trained = {p: name for name, p in self.run.model.named_parameters() if p.requires_grad}
        if changed := [*(trained.keys() - self._names.keys()), *(self._names.keys() - trained.keys())]:
            name = (trained | self._names)[changed[0]]
            raise StepError(
                f"requires_grad of {name!r} was changed after training had begun, which strategy='deepspeed' cannot "
                "follow; freeze before fit and thaw in a second fit, or use 'ddp' or 'fsdp'"
            )

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """Not reached: a step that leaves out batches is no single automatic one."""
        raise AssertionError

    def rounds(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """At stage 3 all processes make the same number of forwards, in which parameters are gathered."""
        return super().rounds(batches) if self.stage == 3 else ((batch, True) for batch in batches)

    def begin(self, s: Session) -> None:
        """Build the engine around steps and optimizer; every process calls it.

        Raises:
            LaunchError: ZeRO cannot run this optimizer, or a parameter has none.
        """
        branch = s.branches[0]
        optimizer = branch.optimizer
        _refuse_optimizer(optimizer)
        self._names = {p: name for name, p in s.plan.model.named_parameters() if p.requires_grad}
        _refuse_without_optimizer(self._names, optimizer)
        _refuse_dtypes(self._names)
        held = s.held
        assert isinstance(held, InZeroParts)
        traces = Traces(s.steps)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.engine = _engine(s, optimizer)
        if self.stage == 3:
            _gather_own(s)
        held.begin(self.engine, optimizer, groups, traces)
        branch.backward, branch.zero_grad, branch.apply = self.backward, _nothing, self._applied(s)
        s.call.pop("clip_gradients", None)  # the engine clips

    def _applied(self, s: Session) -> Callable[[], bool]:
        """`apply`; where gradients are not finite, an error: that of the loss, if it is the cause."""

        def apply() -> bool:
            if self.apply():
                return True
            s.refuse_nan()
            raise StepError(
                f"the gradients were not finite (NaN or infinite) after global_step {s.run.global_step}, with a finite "
                "loss; detect_anomaly=True finds the operation"
            )

        return apply


def _nothing() -> None:
    """The engine clears gradients itself."""


def wanted(s: Session) -> bool:
    """Whether this run trains with DeepSpeed; an evaluation by itself needs no optimizer, and holds the model whole."""
    return strategies.name_of(s.settings) == "deepspeed" and s.plan.verb == "fit"


def wrap(s: Session, calls: Any) -> None:
    """Make of the marked steps what training and evaluation call; the engine comes with `begin`."""
    assert s.run.accelerator is not None
    config = configuration(s.settings)
    s.peers = peers = Zero(s, config["zero_optimization"]["stage"])
    s.held = held = InZeroParts(s.plan.model, s.group)
    s.stack.callback(held.end)
    s.steps = Steps(s.plan.model, calls)
    if peers.stage < 3:
        s.plan.model.to(s.run.device)
    peers.align(s.plan.model, weights=True)
    # For autocast alone: DeepSpeed wraps the steps.
    s.run.accelerator.prepare_model(s.steps, device_placement=False, evaluation_mode=True)
    s.wrapped = peers.calling(peers.step)


def _engine(s: Session, optimizer: Optimizer) -> Any:
    if s.run.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
    config = configuration(s.settings)
    with _quiet():
        if config["zero_optimization"]["stage"] == 3:
            deepspeed.init_distributed()
            deepspeed.zero.Init(module=s.plan.model, config_dict_or_path=config)  # never all of it on the device
            for buffer in s.plan.model.buffers():
                buffer.data = buffer.data.to(s.run.device)
        return deepspeed.initialize(model=s.steps, optimizer=optimizer, config=config)[0]


#: An all-reduce of DeepSpeed for inference on CPUs. It would be compiled here, though nothing of ours uses it; that
#: needs a compiler, and waits for ever where another process was killed while it compiled.
_SHARED_MEMORY: Final = "deepspeed_shm_comm"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's warning of every optimizer but Adam; see `_refuse_optimizer`."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _gather_own(s: Session) -> None:
    """A step may use the model's own parameters, and not only its modules: they are gathered with each step."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for parameter in s.plan.model.parameters(recurse=False):
        register_external_parameter(s.steps, parameter)


def _refuse_optimizer(optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        warn(
            f"strategy='deepspeed' hands {kind.__name__} slices of one long vector; where it treats a parameter as a "
            "whole (a norm, rows and columns), it does something else than with 'ddp'"
        )
    elif kind.__name__ not in _BY_NUMBER:
        raise LaunchError(
            f"strategy='deepspeed' cannot run {kind.__name__}: it gets slices of one long vector instead of "
            f"parameters; allowed: {', '.join(_BY_NUMBER)}, or another package's; 'ddp' can"
        )


def _refuse_without_optimizer(trained: dict[Any, str], optimizer: Optimizer) -> None:
    own = {id(p) for p in parameters_of(optimizer)}
    for parameter, name in trained.items():
        if id(parameter) not in own:
            raise LaunchError(
                f"strategy='deepspeed': {name!r} requires grad, and the optimizer does not have it; give it to the "
                "optimizer, or freeze it: requires_grad_(False)"
            )
    if foreign := [p for p in parameters_of(optimizer) if p.requires_grad and p not in trained]:
        raise LaunchError(
            f"strategy='deepspeed': the optimizer has {len(foreign)} parameters that are not the model's; make them "
            "attributes of the model, or leave them out"
        )


def _refuse_dtypes(trained: dict[Any, str]) -> None:
    for parameter, name in trained.items():
        if parameter.dtype != torch.float32:
            raise LaunchError(
                f"strategy='deepspeed' trains float32 parameters alone, and {name!r} is {parameter.dtype}; convert it, "
                "and give precision='bf16-mixed' for half the memory of activations"
            )
