"""The function `main` of an ejected script: the loop of one run, in the order of time."""

from lightdeco.limits import cut, val_interval

from .evaluate import early_begins, early_stopping, held_off, validation
from .script import Script, kind_of, wishes, words
from .step import schedule, several, train_part, transfer


def main(script: Script) -> None:
    """Put down `main(model, data)`."""
    given = "model, data" if script.plan.data is not None or script.session.given else "model"
    given += ", callbacks" if script.callbacks else ""
    with script.block(f"def main({given}):"):
        script.say('"""Train the model, and return it."""')
        _beginning(script)
        with script.block(_epochs(script)):
            _epoch(script)
        stopped = "stop or 'max_epochs'" if _stops(script) else "'max_epochs'"
        if _stops(script):
            script.say(f'print(f"stopped by {{{stopped}}}")')
        if script.has_run:
            script.say(f"run.stop_reason = {stopped.replace(chr(39), chr(34))}")
        script.hear("on_train_end")
        script.hear("on_fit_end")
        _teardown(script)
        script.say("return model")


# ---- before the first epoch ------------------------------------------------------------------------------------------


def _beginning(script: Script) -> None:
    settings = script.settings
    if len(script.callbacks) > 1:
        script.say(f"{', '.join(script.names[id(c)] for c in script.callbacks)} = callbacks")
    elif script.callbacks:
        script.say(f"({script.names[id(script.callbacks[0])]},) = callbacks")
    script.say("seed_all(SEED)")
    for name, line in (
        ("deterministic", "torch.use_deterministic_algorithms(True, warn_only={})"),
        ("benchmark", "torch.backends.cudnn.benchmark = {}"),
        ("detect_anomaly", "torch.autograd.set_detect_anomaly({})"),
    ):
        value = getattr(settings, name)
        if value not in (None, False):
            script.say(line.format(value == "warn" if name == "deterministic" else value))
    if script.has_run:
        script.say(f"run = {script.namespace()}")
    for role in ("prepare_data", "setup", "configure_model"):
        for hook in script.all(role):
            script.say(script.call(hook, {"stage": '"fit"'}))
    if script.device != "cpu":
        script.say("model.to(DEVICE)")
    loaders(script)
    _optimizers(script)
    if any(hook.mark.every > 1 for hook in script.hooks if hook.role.kind == "event"):
        script.say("calls = Counter()  # how often the events have happened that are not heard every time")
    if not script.has_run:
        script.say("global_step = 0  # batches so far after which weights were updated", "metrics = {}")
    if script.counts_apart:
        script.say("micro_batch = 0  # batches so far")
    if _stops(script):
        script.say("stop = None  # the reason to stop, once there is one")
    early_begins(script)
    if settings.max_seconds is not None:
        script.say(f"deadline = time.monotonic() + {settings.max_seconds:g}")
    script.hear("on_fit_start")
    if all(module.training for module in script.plan.model.modules()):
        script.say("model.train()")
    script.hear("on_train_start")


def loaders(script: Script) -> None:
    """The variables `train_loader` and `val_loader`, from what was given or from the methods that make them."""
    given, role = script.session.given, "{}_dataloader".format
    marked = [stage for stage in ("train", "val") if stage in script.session.loaders and stage not in given]
    for stage in marked:
        hook = script.one(role(stage))
        assert hook is not None
        script.say(f"{_loader_name(script, stage)} = {script.call(hook)}")
    if set(given) >= {"train", "val"} and script.validates:
        script.say(f"train_loader, {_loader_name(script, 'val')} = data")
    elif "train" in given:
        script.say("train_loader = data")
    if script.validates and script.session.loaders["val"][0].name is not None:
        script.say("if not isinstance(val_loaders, dict):")
        script.say("    val_loaders = {str(i): loader for i, loader in enumerate(val_loaders)}")


def _loader_name(script: Script, stage: str) -> str:
    several = stage == "val" and script.session.loaders["val"][0].name is not None
    return f"{stage}_loaders" if several else f"{stage}_loader"


def _optimizers(script: Script) -> None:
    hook = script.one("configure_optimizers")
    assert hook is not None
    call, parts = script.call(hook), script.parts
    first = parts[0]
    if len(parts) == 1 and first.got == "configured":
        script.say(f"{first.optimizer} = {call}")
    elif len(parts) == 1 and first.got_scheduler == "configured[1]":
        script.say(f"{first.optimizer}, {first.scheduler} = {call}")
    else:
        script.say(f"configured = {call}")
        for part in parts:
            if part.got_scheduler is None:
                script.say(f"{part.optimizer} = {part.got}")
            else:
                script.say(f"{part.optimizer}, {part.scheduler} = {part.got}, {part.got_scheduler}")


def _epochs(script: Script) -> str:
    limit = 1 if script.settings.fast_dev_run else script.settings.max_epochs
    return "for epoch in count():" if limit is None else f"for epoch in range({limit}):"


# ---- when the run ends -----------------------------------------------------------------------------------------------


def _stops(script: Script) -> bool:
    """Whether anything but `max_epochs` can end the run."""
    s = script.settings
    return bool(s.max_steps is not None or s.max_seconds is not None or script.can_stop or script.early)


def _check(script: Script, finished: str, steps: bool) -> list[tuple[str, str]]:
    """Conditions to stop with their reasons; `finished`: how many epochs are; `steps`: whether to look at max_steps."""
    s = script.settings
    least = [f"{finished} >= {s.min_epochs}"] if s.min_epochs else []
    least += [f"{script.step} >= {s.min_steps}"] if s.min_steps else []
    found = [(f"{script.step} >= {s.max_steps}", '"max_steps"')] if s.max_steps is not None and steps else []
    found += [("time.monotonic() >= deadline", '"max_time"')] if s.max_seconds is not None else []
    if script.can_stop:
        found.append((" and ".join(["run.should_stop", *least]), 'run.stop_reason or "should_stop"'))
    if script.early and held_off(script):
        found.append((" and ".join(["stalled", *least]), "stalled"))
    return found


def _look(script: Script, conditions: list[tuple[str, str]], batches: int | None = None) -> None:
    """Whether to stop here; `batches`: how many the epoch has, where one that is cut short must be told apart."""
    for i, (condition, reason) in enumerate(conditions):
        script.say(f"{'elif' if i else 'if'} {condition}:", f"    stop = {reason}")
    with script.block("if stop:"):
        if batches is not None:
            script.say(f"cut_short = batch_idx + 1 < {batches}  # such an epoch has no end")
        script.say("break")


# ---- an epoch --------------------------------------------------------------------------------------------------------


def _epoch(script: Script) -> None:
    settings, session = script.settings, script.session
    every = settings.reload_dataloaders_every_n_epochs
    if every and any(stage not in session.given for stage in session.loaders):
        with script.block(f"if epoch and epoch % {every} == 0:"):
            loaders(script)
    script.hear("on_train_epoch_start")
    if script.by_size:
        size = settings.accumulate_grad_batches
        if isinstance(size, dict):
            sizes = {0: 1} | size
            script.say(f"sizes = {sizes!r}", "size = sizes[max(first for first in sizes if first <= epoch)]")
        else:
            script.say(f"size = {size}  # batches of one update")
        script.say("done = total = 0  # batches in the window, and the sum of their weights")
    script.say("means = Means()")
    interval = val_interval(settings, script.validates, session.run.num_train_batches)
    if interval and script.by_size:
        script.say("validated = 0  # batches, when the last validation was")
    _read(script)
    with script.block(_batches(script)):
        _batch(script, interval)
    if _stops(script) and _breaks(script, interval):
        known = session.run.num_train_batches
        script.say("if stop and cut_short:" if known else "if stop:", "    break")
    _end_epoch(script, interval)


def _read(script: Script) -> None:
    """What comes right before the loop over the batches: the seed of their order."""
    (loader,) = script.session.loaders["train"]
    epoch = "0" if script.settings.overfit_batches else "epoch"
    script.say(*wishes(loader, "train_loader", epoch))
    if kind_of(loader) == "tensors":
        script.say(f"seed_all(order_seed({epoch}))  # decides how the loader shuffles")


def _batches(script: Script) -> str:
    (loader,) = script.session.loaders["train"]
    epoch = "0" if script.settings.overfit_batches else "epoch"
    wrap = {"indexed": "batches_of", "other": "read_in_turn"}.get(kind_of(loader))
    text = "train_loader" if wrap is None else f"{wrap}(train_loader, {epoch})"
    limit = cut(script.settings, loader, "train")
    text = text if limit is None else f"islice({text}, {limit})"
    if script.by_size:
        return f"for batch_idx, (batch, is_last) in enumerate(with_last({text})):"
    return f"for batch_idx, batch in enumerate({text}):"


def _batch(script: Script, interval: int | None) -> None:
    names = {"dataloader_idx": "0"}
    seed = f"step_seed({script.batches})"
    transfer(script, seed, "0")
    if any("SKIP_EPOCH" in words(hook) for hook in script.all("on_train_batch_start")):
        for hook in script.all("on_train_batch_start"):
            script.say(f"if {script.call(hook, names)} is not None:  # SKIP_EPOCH", "    break")
    else:
        script.hear("on_train_batch_start", names)
    if len(script.parts) == 1 and script.parts[0].hook.mark.every == 1:
        train_part(script, script.parts[0], seed)
    else:
        several(script, seed)
    script.hear("on_train_batch_end", names)
    if script.counts_apart:
        script.say("micro_batch += 1")
    if interval:
        _validate_inside(script, interval)
    if _stops(script) and _breaks(script, interval):
        _look(script, _check(script, "epoch", steps=True), script.session.run.num_train_batches)


def _breaks(script: Script, interval: int | None) -> bool:
    """Whether the run can end after a batch, and not only after an epoch."""
    s = script.settings
    early = bool(script.early) and interval is not None
    return s.max_steps is not None or s.max_seconds is not None or script.can_stop or early


# ---- validation, and the end of an epoch -----------------------------------------------------------------------------


def _validate_inside(script: Script, interval: int) -> None:
    due = f"(batch_idx + 1) % {interval} == 0"
    if script.by_size:
        due = f"done == 0 and (batch_idx + 1) // {interval} > validated // {interval}"
    every = script.settings.check_val_every_n_epoch
    if every > 1:
        due += f" and (epoch + 1) % {every} == 0"
    with script.block(f"if {due}:"):
        validation(script)
        if script.by_size:
            script.say("validated = batch_idx + 1")


def _end_epoch(script: Script, interval: int | None) -> None:
    settings = script.settings
    if script.validates and interval is None:
        every = settings.check_val_every_n_epoch
        if every == 1:
            validation(script)
        else:
            with script.block(f"if (epoch + 1) % {every} == 0:"):
                validation(script)
    script.say(f"{script.metrics} |= means.read()")
    if settings.on_nan == "raise":
        losses = [f'{script.metrics}["{part.prefix}loss"]' for part in script.parts]
        with script.block("if not " + " or not ".join(f"math.isfinite({loss})" for loss in losses) + ":"):
            script.say('raise ValueError(f"the training loss of epoch {epoch} is not finite")')
    shown = f'", ".join(f"{{name}} {{value:.4f}}" for name, value in {script.metrics}.items())'
    script.say(f'print(f"epoch {{epoch}}:", {shown})')
    script.hear("on_train_epoch_end")
    early_stopping(script, "train/")
    for part in script.parts:
        if part.optim.scheduler is not None and part.optim.interval == "epoch":
            schedule(script, part, "(epoch + 1)")
    if script.has_run:
        script.say("run.epoch += 1")
    if _stops(script):
        _look(script, _check(script, "epoch + 1", steps=False))


def _teardown(script: Script) -> None:
    for hook in script.all("teardown"):
        script.say(script.call(hook, {"stage": '"fit"'}))
