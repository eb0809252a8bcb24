"""`Script`: what is known of the run that is ejected, and the lines of its loop as they are put down one by one."""

import inspect
import keyword
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightdeco.callbacks import EarlyStopping
from lightdeco.data.loader import Loader, _Listed
from lightdeco.data.rebuilt import IndexedSource, _draws_once, _only_tensors
from lightdeco.hooks import Hook
from lightdeco.optim import Optim, is_scheduler, parameters_of
from lightdeco.plan import Plan
from lightdeco.session import Session
from lightdeco.settings import Settings

from .objects import arguments, attached, method_name

#: What the plain namespace `run` has besides what the loop keeps up to date.
_RUN_KEPT = ("epoch", "global_step", "metrics", "should_stop", "stop_reason")
_RUN_MORE = {
    "model": "model",
    "device": "DEVICE",
    "rank": "0",
    "world_size": "1",
    "is_main": "True",
    "print": "print",
    "verb": '"fit"',
    "stage": '"train"',
    "seed": "SEED",
}


@dataclass
class Part:
    """One training step with its optimizer: the variables in which the script has it and its scheduler."""

    hook: Hook
    optim: Optim
    prefix: str
    optimizer: str
    scheduler: str
    got: str
    """The expression that takes the optimizer out of what `configure_optimizers` returned; `got_scheduler` likewise."""
    got_scheduler: str | None


@dataclass
class Script:
    """The facts of a run, and the lines so far."""

    plan: Plan
    settings: Settings
    session: Session
    returned: Any
    """What `configure_optimizers` returned, in the author's own form."""
    device: str
    lines: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    depth: int = 0

    def __post_init__(self) -> None:
        self.callbacks = self._callbacks()
        self.names = {id(self.plan.model): "model"}
        if self.plan.data is not None:
            self.names.setdefault(id(self.plan.data), "data")
        for callback in self.callbacks:
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(callback).__name__).lower().lstrip("_")
            taken = {*self.names.values(), "run", "means", "epoch", "batch", "optimizer", "scheduler", "stop"}
            self.names[id(callback)] = name if name not in taken else f"{name}_{len(self.names)}"
        self.hooks = [h for h in self.plan.hooks if id(h.owner) in self.names]
        self.early = [o for o in self.plan.owners if isinstance(o, EarlyStopping) and type(o) is EarlyStopping]
        self.has_run = any("run" in (*h.positional, *h.keywords) for h in self.hooks)
        self.can_stop = any("should_stop" in words(h) for h in self.hooks)
        self.parts = _parts(self)
        self.validates = "val" in self.session.loaders
        self.by_size = self.settings.accumulate_grad_batches != 1
        #: Whether batches and updates are counted apart.
        self.counts_apart = self.by_size or self.settings.on_nan == "skip" or self._may_rest()

    def _may_rest(self) -> bool:
        return all(part.hook.mark.every > 1 for part in self.parts)

    def _callbacks(self) -> list[object]:
        found = []
        for owner in self.plan.owners:
            if owner is self.plan.model or owner is self.plan.data or type(owner) is EarlyStopping:
                continue
            if type(owner).__module__.startswith("lightdeco."):
                self.left_out.append(type(owner).__name__)
            else:
                found.append(owner)
        return found

    # ---- putting lines down ------------------------------------------------------------------------------------------

    def say(self, *lines: str) -> None:
        """Lines at the present depth."""
        self.lines += ["    " * self.depth + line if line else "" for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines inside of a compound statement."""
        self.say(head)
        self.depth += 1
        yield
        self.depth -= 1

    def call(self, hook: Hook, names: dict[str, str] | None = None) -> str:
        """The call of a hook as the script writes it."""
        function, owner = attached(hook), self.names[id(hook.owner)]
        given = arguments(hook, {"device": f'torch.device("{self.device}")', **(names or {})})
        name = method_name(hook)
        if function is None and name not in getattr(hook.owner, "__dict__", {}):
            return f"{owner}.{name}({given})"
        name = f"type({owner}).{name}" if function is None else function.__name__  # an attribute hides the method
        return f"{name}({', '.join(filter(None, (owner, given)))})"

    def all(self, role: str) -> list[Hook]:
        """The hooks of a role that the script calls."""
        return [hook for hook in self.hooks if hook.role.name == role]

    def one(self, role: str) -> Hook | None:
        """The hook of a role that only one method can have."""
        found = self.all(role)
        return found[-1] if found else None

    def hear(self, event: str, names: dict[str, str] | None = None) -> None:
        """The calls of all who listen to an event."""
        for hook in self.all(event):
            line = self.call(hook, names)
            if hook.mark.every == 1:
                self.say(line)
                continue
            key = f'"{event} of {self.names[id(hook.owner)]}.{method_name(hook)}"'
            self.say(f"calls[{key}] += 1")
            with self.block(f"if calls[{key}] % {hook.mark.every} == 0:"):
                self.say(line)

    # ---- names of the script -----------------------------------------------------------------------------------------

    @property
    def step(self) -> str:
        """Where the script counts updates."""
        return "run.global_step" if self.has_run else "global_step"

    @property
    def batches(self) -> str:
        """Where the script counts training batches."""
        return "micro_batch" if self.counts_apart else self.step

    @property
    def metrics(self) -> str:
        """Where the script has the latest value of each metric."""
        return "run.metrics" if self.has_run else "metrics"

    @property
    def passed(self) -> list[str]:
        """The variables that `evaluate` gets for its events, besides the model."""
        hooks = [h for h in self.hooks if h.role.name.startswith("on_validation_") or h.role.name in _TRANSFERS]
        hooks += self.all("validation_step")
        found = {self.names[id(h.owner)] for h in hooks} - {"model"}
        asks = {name for h in hooks for name in (*h.positional, *h.keywords)}
        calls = ["calls"] if any(h.mark.every > 1 for h in hooks if h.role.kind == "event") else []
        return sorted(found) + (["run"] if "run" in asks else []) + calls

    def namespace(self) -> str:
        """The plain object that stands for the `run` that steps and events ask for."""
        used = {word for hook in self.hooks for word in words(hook)}
        kept = "epoch=0, global_step=0, metrics={}, should_stop=False, stop_reason=None"
        more = "".join(f", {name}={text}" for name, text in _RUN_MORE.items() if name in used)
        device = f'torch.device("{self.device}")'
        return f"SimpleNamespace({kept}{more.replace('DEVICE', device)})"

    def unknown_of_run(self) -> list[str]:
        """What the methods that ask for `run` seem to take from it, and the script's namespace does not have."""
        from lightdeco.run import Run

        public = {
            name for name in (*vars(Run), "history", "hparams", "settings", "loggers") if not name.startswith("_")
        }
        asking = [h for h in self.hooks if "run" in (*h.positional, *h.keywords)]
        used = {word for hook in asking for word in words(hook)}
        return sorted(used & (public - {*_RUN_KEPT, *_RUN_MORE}))


_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def words(hook: Hook) -> tuple[str, ...]:
    """The names of attributes and globals in the code of a method."""
    function = attached(hook) or getattr(hook.method, "__func__", hook.method)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else tuple(code.co_names)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _parts(script: Script) -> list[Part]:
    """The training steps in the order of calling, each with its optimizer."""
    optims, steps = script.session.run.optims, script.plan.all("training_step")
    expressions = list(_expressions(script.returned, "configured"))
    found = []
    for hook in steps:
        name = hook.mark.optimizer or next(iter(optims))
        at = list(optims).index(name)
        alone = len(optims) == 1
        word = f"{name}_" if name.isidentifier() and not keyword.iskeyword(name) else f"_{at}"
        variables = ("optimizer", "scheduler") if alone else (f"{word}optimizer", f"{word}scheduler")
        if not alone and not name.isidentifier():
            variables = (f"optimizer{word}", f"scheduler{word}")
        prefix = "train/" if alone else f"train/{name}/"
        found.append(Part(hook, optims[name], prefix, *variables, *expressions[at]))
    return found


def _expressions(returned: Any, of: str) -> Iterator[tuple[str, str | None]]:
    """What takes each optimizer, and its scheduler, out of what `configure_optimizers` returned, in its order."""
    if isinstance(returned, Mapping) and "optimizer" not in returned:
        for name, one in returned.items():
            yield _expression(one, f'{of}["{name}"]')
        return
    several = isinstance(returned, (list, tuple)) and not _is_pair(returned)
    if several and len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
        optimizers, schedulers = returned
        if not any(_is_pair(part) for part in returned):
            for i in range(len(optimizers)):
                at = f"{of}[1][{i}]"
                scheduler = schedulers[i] if i < len(schedulers) else None
                inner = isinstance(scheduler, Mapping)
                yield f"{of}[0][{i}]", None if scheduler is None else f'{at}["scheduler"]' if inner else at
            return
    if several:
        for i, one in enumerate(returned):
            yield _expression(one, f"{of}[{i}]")
        return
    yield _expression(returned, of)


def _is_pair(value: Any) -> bool:
    return len(value) == 2 and isinstance(value[0], Optimizer) and is_scheduler(value[1])


def _expression(one: Any, of: str) -> tuple[str, str | None]:
    if isinstance(one, Optimizer):
        return of, None
    if isinstance(one, Optim):
        return f"{of}.optimizer", None if one.scheduler is None else f"{of}.scheduler"
    if isinstance(one, Mapping):
        scheduler = one.get("lr_scheduler")
        inner = '["lr_scheduler"]["scheduler"]' if isinstance(scheduler, Mapping) else '["lr_scheduler"]'
        return f'{of}["optimizer"]', None if scheduler is None else of + inner
    return f"{of}[0]", f"{of}[1]"


def holds_all(script: Script, part: Part) -> bool:
    """Whether the optimizer holds the parameters of the model, all and in their order."""
    return list(map(id, parameters_of(part.optim.optimizer))) == list(map(id, script.plan.model.parameters()))


# ---- loaders ---------------------------------------------------------------------------------------------------------


def kind_of(loader: Loader) -> str:
    """How the script reads a loader: "list", "tensors" (nothing random but the order), "indexed" or "other"."""
    source: Any = loader._source
    if isinstance(source, _Listed):
        return "list"
    if not isinstance(source, IndexedSource):
        return "other"
    given = source._loader
    plain = _only_tensors(given) and _draws_once(given._index_sampler)
    return "tensors" if plain else "indexed"


def wishes(loader: Loader, name: str, epoch: str) -> list[str]:
    """Lines that tell the epoch to a loader's sampler or dataset, and seed generators of its own."""
    given: Any = getattr(loader._source, "_loader", None)
    found: list[str] = []
    for part in ("sampler", "batch_sampler", "dataset") if given is not None else ():
        if callable(getattr(getattr(given, part), "set_epoch", None)):
            found.append(f"{name}.{part}.set_epoch({epoch})")
    if given is not None and given.generator is not None:
        found.append(f"{name}.generator.manual_seed(order_seed({epoch}))")
    return found
