"""`oom="micro"`: a training step that runs out of memory is made again in parts of its batch.

`join` puts a `Micro` in the place of each training step. It makes forward *and* backward in one go, part by part, and
returns a loss whose own backward does nothing but hand over the gradients that are ready. The loop, its events, the
windows of accumulation, closures and updates therefore know nothing of parts, and a failed try can be undone: the true
graph never leaves this module, and the gradients that were there before wait beside the new ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from .branch import Branch
from .data import batch_size_of, cut_batch
from .errors import DataError, SettingsError, StepError, add_note, warn
from .gathering import Gathered, Merge
from .memory import is_out_of_memory
from .seeds import repeater
from .session import Session


def join(s: Session) -> None:
    """Make every training step of the run one that goes on in parts where memory does not suffice.

    Raises:
        SettingsError: there are several processes, which would have to run out of memory together.
    """
    if s.run.world_size > 1:
        raise SettingsError(
            "oom='micro' cuts the batch of one process, and with several the others would wait for it forever; "
            "allowed with several processes: 'raise'"
        )
    for branch in s.branches:
        why = ""
        if branch.optim is None:
            why = f"the manual step {branch.hook.where} makes its gradients itself"
        elif "split_batch" in s.call:
            why = f"{s.where('split_batch')}, marked @split_batch, hands a carry on, and nobody knows how to cut that"
        if why:
            warn(f"oom='micro' has no effect: {why}")
            branch.step, branch.backward = _noted(branch.step, why), _noted(branch.backward, why)
        else:
            branch.step = Micro(s, branch)


def _noted(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """The function, with a note on its errors that says why nothing is done about them."""

    def noted(*given: Any) -> Any:
        try:
            return function(*given)
        except RuntimeError as error:
            if is_out_of_memory(error):
                _note(error, why)
            raise

    return noted


def _note(error: BaseException, why: str) -> None:
    text = f"oom='micro' cannot make this step in smaller parts: {why}"
    if not add_note(error, text):
        warn(text)


class Micro:
    """A training step with its backward, in as many parts as memory asks for; called like `Branch.step`."""

    def __init__(self, session: Session, branch: Branch) -> None:
        self._s, self._branch, self._step = session, branch, branch.step

    def __call__(self, key: str, batch: Any, batch_idx: int, dataloader_idx: int, carry: Any) -> Any:
        """What the step returns; its loss hands over the gradients when it goes into backward."""
        from accelerate.utils.memory import clear_device_cache

        run, failed, part = self._s.run, 0, None
        while True:
            parts, before = self._parts(batch), _Before(self._s)
            gathered = Gathered(self._branch, len(parts))
            try:
                for part in parts:
                    run.batch = part
                    gathered.add(self._step(key, part, batch_idx, dataloader_idx, carry), run.size_of_batch)
                outputs = gathered.joined(before.merge())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                before.undo()
                size = self._halve(batch, parts, error)
                failed = failed or size
            else:
                if failed:
                    self._tell(failed)
                return outputs
            finally:
                run.batch = batch
            # Only now, since the exception held the frames of the failed try, and they its tensors.
            part = None
            del parts, before, gathered
            clear_device_cache(garbage_collection=True)

    def _parts(self, batch: Any) -> list[Any]:
        most, size = self._s.run.progress.part_sizes.get(self._branch.name), None
        if most is not None:
            size = batch_size_of(batch)
        if most is None or size is None or size <= most:
            return [batch]
        try:
            return cut_batch(batch, _even(size, -(-size // most)))
        except DataError:
            return [batch]

    def _halve(self, batch: Any, parts: Sequence[Any], error: RuntimeError) -> int:
        """Halve the parts from now on, or raise the error with a note where that cannot be done.

        Returns the number of samples that were too many.
        """
        size, largest = batch_size_of(batch), batch_size_of(parts[0])
        why = ""
        if size is None or largest is None:
            why = "the batch holds no tensor, so its number of samples is unknown"
        elif largest < 2:
            why = f"{'a part of the' if size > 1 else 'the'} batch has one sample"
        else:
            try:
                cut_batch(batch, _even(size, 2))
            except DataError as reason:
                why = str(reason)
        if why or largest is None:
            _note(error, why)
            raise error
        self._s.run.progress.part_sizes[self._branch.name] = -(-largest // 2)
        return largest

    def _tell(self, failed: int) -> None:
        run, which = self._s.run, f" of {self._branch.name!r}" if self._branch.name else ""
        norms = any(isinstance(module, _BatchNorm) and module.training for module in run.model.modules())
        most = self._s.run.progress.part_sizes[self._branch.name]
        warn(
            f"the training step{which} ran out of memory with {failed} samples, at batch {run.batch_idx} of epoch "
            f"{run.epoch}, global_step {run.global_step}; from now on it gets at most {most} at once (oom='micro'); "
            f"the gradients stay those of the whole batch{', but that BatchNorm sees each part alone' if norms else ''}"
        )


def _even(size: int, count: int) -> list[int]:
    """`count` numbers that differ by at most 1, the largest first."""
    return [size // count + (i < size % count) for i in range(count)]


class _Before:
    """What a try changes, as it was before: gradients, buffers, torchmetrics, logged values, torch's random state.

    Gradients are moved away, not copied: those of the try are new tensors. Buffers and states of torchmetrics are
    copied for each step.
    """

    def __init__(self, s: Session) -> None:
        model = s.run.model
        self._again = repeater(s.run.device)
        self._buffers = [_Buffer(m, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._counters = [_Counter(m) for m in model.modules() if _counts(m)]
        self._means = s.run.means
        self._logged = {name: len(series.weights) for name, series in self._means.series.items()}
        self._grads = [(p, p.grad) for p in s.parameters() if p.requires_grad]
        for p, _ in self._grads:
            p.grad = None

    def merge(self) -> Merge:
        """Put the gradients of before back, and return what adds the new ones, times a factor, to them."""
        fresh = [(p, p.grad) for p, _ in self._grads if p.grad is not None]
        self._put_back()

        def merge(factor: Tensor) -> None:
            if not fresh:
                raise StepError("oom='micro': backward was called a second time for one loss; call it once")
            while fresh:
                _add(*fresh.pop(), factor)

        return merge if fresh else lambda factor: None

    def undo(self) -> None:
        """Put everything back."""
        self._put_back()
        self._again()
        with torch.no_grad():
            for buffer in self._buffers:
                buffer.put_back()
        for counter in self._counters:
            counter.put_back()
        for name, series in self._means.series.items():
            series.rewind(self._logged.get(name, 0))

    def _put_back(self) -> None:
        for p, grad in self._grads:
            p.grad = grad


def _add(p: Parameter, grad: Tensor, factor: Tensor) -> None:
    grad.mul_(factor.to(grad))  # by 1 without accumulation, which changes no bit
    p.grad = grad if p.grad is None else p.grad.add_(grad)


class _Buffer:
    """One buffer of a module, such as a running mean."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        tensor: Any = module._buffers[name]
        self._tensor, self._copy = tensor, tensor.detach().clone()

    def put_back(self) -> None:
        """The same tensor as before, with the same values."""
        if not torch.equal(self._tensor, self._copy):  # no version tells: batch_norm writes past it
            self._tensor.copy_(self._copy)
        self._module._buffers[self._name] = self._tensor


def _counts(module: nn.Module) -> bool:
    return hasattr(module, "_defaults") and hasattr(module, "_update_count")


class _Counter:
    """What a torchmetrics object has counted."""

    _NAMES: Final = ("_update_count", "_computed")

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._kept = {name: _copied(getattr(metric, name)) for name in (*metric._defaults, *self._NAMES)}

    def put_back(self) -> None:
        """The counts of before."""
        for name, value in self._kept.items():
            setattr(self._metric, name, value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
