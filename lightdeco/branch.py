"""`Branch`: one training step with the optimizer that it is for, and which parameters require grad meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .optim import Optim, parameters_of
from .plan import Hook
from .windows import Window

if TYPE_CHECKING:
    from .scaling import Scaler


#: torch's, before anybody could replace it.
_ZERO_GRAD: Final = Optimizer.zero_grad


class Toggle:
    """Parameters that require no grad for a time: from now on until `end`, or the end of a `with` block.

    Those that required none before are left alone, so that what the user froze stays frozen.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._frozen = [p for p in parameters if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)

    def end(self) -> None:
        """Put `requires_grad` back; more than once does no harm."""
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


def others(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those of the parameters that the optimizer does not update."""
    own = {id(p) for p in parameters_of(optimizer)}
    return [p for p in parameters if id(p) not in own]


def clearing(optimizer: Optimizer) -> Callable[[], object]:
    """What clears the gradients: the `zero_grad` of the optimizer, or the same without notes for torch's profiler."""
    if type(optimizer).zero_grad is not _ZERO_GRAD:
        return optimizer.zero_grad  # somebody's own
    own = vars(optimizer)

    def clear() -> None:
        if "zero_grad" in own:
            optimizer.zero_grad()
            return
        for group in optimizer.param_groups:  # another list after load_state_dict
            for p in group["params"]:
                p.grad = None

    return clear


@dataclass
class Branch:
    """One training step, and what it updates. Most runs have one; several optimizers have one each."""

    hook: Hook
    """The marked method."""
    key: str
    """What `step` gets as its first argument: the name of this step in `Steps`."""
    step: Callable[..., Any]
    """(key, batch, batch_idx, dataloader_idx, carry) to what the method returns."""
    name: str
    """Of the optimizer; empty with a single one, and for a manual step."""
    optim: Optim | None
    """None for a manual step, which drives all optimizers itself."""
    prefix: str
    """Before the names of its metrics: `train/`, or `train/<name>/`."""
    zero_grad: Callable[[], object] = lambda: None
    backward: Callable[[Any], object] = Tensor.backward
    """How gradients are cleared, and made from a loss: torch's own functions, or the overrides."""
    apply: Callable[[], bool] | None = None
    """Makes an update where DeepSpeed does it; whether it was made. None: `optimizer.step`."""
    scaler: "Scaler | None" = None
    """Scales losses and leaves out updates that overflow; None but with fp16."""
    closure: bool = False
    """Whether the optimizer's step gets a closure."""
    window: Window = field(default_factory=lambda: Window(1))
    """The micro-batches of the present update."""
    others: list[Parameter] = field(default_factory=list)
    """What requires no grad during this step."""
    loss: Tensor | None = None
    """The last loss, as it went into backward, detached."""
    rows: list[tuple[int, int]] = field(default_factory=list)
    """Batch and `global_step` of each loss since losses were last checked."""

    @property
    def every(self) -> int:
        """It runs for batches 0, every, 2·every, … of each epoch."""
        return self.hook.mark.every

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of a step that is not manual."""
        assert self.optim is not None
        return self.optim.optimizer
