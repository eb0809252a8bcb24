"""A training step in an ejected script: the way of a batch to the device, the step, backward, the update, schedules."""

from lightdeco.optim import is_plateau, needs_closure

from .script import Part, Script, holds_all


def transfer(script: Script, seed: str, index: str) -> None:
    """The way of a batch to the device, with the hooks on it."""
    names = {"dataloader_idx": index}
    hooks = [*script.all("on_before_batch_transfer"), *script.all("on_after_batch_transfer")]
    own = script.one("transfer_batch_to_device")
    if hooks or own is not None:
        script.say(f"torch.manual_seed({seed})")
    for hook in script.all("on_before_batch_transfer"):
        _change(script, script.call(hook, names))
    if own is not None:
        _change(script, script.call(own, names))
    elif script.device != "cpu":
        script.say("batch = to_device(batch)")
    for hook in script.all("on_after_batch_transfer"):
        _change(script, script.call(hook, names))


def _change(script: Script, call: str) -> None:
    script.say(f"changed = {call}", "batch = batch if changed is None else changed")


def train_part(script: Script, part: Part, seed: str | None) -> None:
    """A training step with its backward and update. `seed` is None where the random numbers of the batch go on."""
    names = {"dataloader_idx": "0", "optimizer": part.optimizer}
    if script.by_size:
        with script.block("if done == 0:"):
            _clear(script, part, names)
    else:
        _clear(script, part, names)
    if seed is not None:
        script.say(f"torch.manual_seed({seed})  # decides dropout and the like")
    _step(script, part, names)
    script.say('loss = outputs["loss"] if isinstance(outputs, dict) else outputs')
    if script.settings.precision == "bf16-mixed":
        script.say("loss = loss.float()")
    weight = "weight_of(outputs, batch)"
    if script.by_size:
        script.say(f"weight = {weight}", "alone = size == 1 or (is_last and done == 0)")
        script.say("scaled = loss if alone else loss * weight")
        weight = "weight"
    scaled = "scaled" if script.by_size else "loss"
    script.hear("on_before_backward", names | {"loss": scaled})
    own = script.one("backward")
    script.say(script.call(own, names | {"loss": scaled}) if own is not None else f"{scaled}.backward()")
    script.hear("on_after_backward", names)
    script.say(f'means.add(outputs, {weight}, "{part.prefix}")')
    if not script.by_size:
        _update(script, part, names)
        return
    script.say("done, total = done + 1, total + weight")
    with script.block("if done == size or is_last:"):
        every = f"for p in {_parameters(script, part)}:"
        with script.block("if not alone:  # the gradient of the mean over all samples of the window"):
            script.say(every, "    if p.grad is not None:", "        p.grad /= total")
        _update(script, part, names)
        script.say("done = total = 0")


def _clear(script: Script, part: Part, names: dict[str, str]) -> None:
    script.hear("on_before_zero_grad", names)
    own = script.one("optimizer_zero_grad")
    script.say(script.call(own, names) if own is not None else f"{part.optimizer}.zero_grad()")


def _step(script: Script, part: Part, names: dict[str, str]) -> None:
    call = f"outputs = {script.call(part.hook, names)}"
    if script.settings.precision != "bf16-mixed":
        script.say(call)
        return
    with script.block(f'with torch.autocast("{script.device}", torch.bfloat16):'):
        script.say(call)


def _parameters(script: Script, part: Part) -> str:
    if holds_all(script, part):
        return "model.parameters()"
    return f'[p for group in {part.optimizer}.param_groups for p in group["params"]]'


def _update(script: Script, part: Part, names: dict[str, str]) -> None:
    settings = script.settings
    if settings.on_nan != "skip":
        _apply(script, part, names)
        return
    script.say(f"grads = [p.grad for p in {_parameters(script, part)} if p.grad is not None]")
    norm = "torch.nn.utils.get_total_norm(grads)"
    script.say("# An update that is not finite is left out.")
    with script.block(f"if torch.isfinite(loss) and torch.isfinite({norm}):"):
        _apply(script, part, names)


def _apply(script: Script, part: Part, names: dict[str, str]) -> None:
    settings = script.settings
    script.hear("on_before_optimizer_step", names)
    own, value = script.one("clip_gradients"), settings.gradient_clip_val
    if own is not None:
        script.say(script.call(own, names))
    elif value is not None:
        function = "clip_grad_norm_" if settings.gradient_clip_algorithm == "norm" else "clip_grad_value_"
        script.say(f"torch.nn.utils.{function}({_parameters(script, part)}, {value!r})")
    step = script.one("optimizer_step")
    if step is not None or needs_closure(part.optim.optimizer):
        _closure(script, part, names)
    else:
        script.say(f"{part.optimizer}.step()")
    if len(script.parts) == 1 and part.hook.mark.every == 1:
        script.say(f"{script.step} += 1")
    if part.optim.scheduler is not None and part.optim.interval == "step":
        schedule(script, part, script.step)


def _closure(script: Script, part: Part, names: dict[str, str]) -> None:
    """A closure that finds loss and gradients ready at its first call, and evaluates anew at every other."""
    script.say("ready, seed = [loss.detach()], " + f"step_seed({script.batches})", "")
    with script.block("def closure(batch=batch, batch_idx=batch_idx, ready=ready, seed=seed):"):
        script.say("if ready:", "    return ready.pop()")
        with script.block("with torch.enable_grad():"):
            _clear(script, part, names)
            script.say("torch.manual_seed(seed)")
            _step(script, part, names)
            script.say('loss = outputs["loss"] if isinstance(outputs, dict) else outputs')
            own = script.one("backward")
            script.say(script.call(own, names) if own is not None else "loss.backward()")
        value = script.settings.gradient_clip_val
        if value is not None:
            function = "clip_grad_norm_" if script.settings.gradient_clip_algorithm == "norm" else "clip_grad_value_"
            script.say(f"torch.nn.utils.{function}({_parameters(script, part)}, {value!r})")
        script.say("return loss.detach()")
    script.say("")
    step = script.one("optimizer_step")
    script.say(script.call(step, names) if step is not None else f"{part.optimizer}.step(closure)")


def schedule(script: Script, part: Part, count: str) -> None:
    """A step of a scheduler; `count`: what its `every` is counted in."""
    optim, metric = part.optim, None
    if optim.monitor is not None or is_plateau(optim.scheduler):
        single = script.validates and script.session.loaders["val"][0].name is None
        name = optim.monitor or ("val/loss" if single else f"{part.prefix}loss")
        metric = f'{script.metrics}["{name}"]'
        if optim.monitor is None and single and script.settings.check_val_every_n_epoch > 1:
            metric = f'{script.metrics}.get("val/loss", {script.metrics}["{part.prefix}loss"])'
    own = script.one("lr_scheduler_step")
    if own is not None:
        line = script.call(own, {"scheduler": part.scheduler, "metric": str(metric)})
    else:
        line = f"{part.scheduler}.step({metric})" if is_plateau(optim.scheduler) else f"{part.scheduler}.step()"
    if optim.every == 1:
        script.say(line)
    else:
        script.say(f"if {count} % {optim.every} == 0:", f"    {line}")


# ---- several optimizers ----------------------------------------------------------------------------------------------


def several(script: Script, seed: str) -> None:
    """One block for each optimizer; meanwhile only its parameters require gradients."""
    script.say(f"torch.manual_seed({seed})  # decides dropout and the like")
    if script.counts_apart:
        script.say("updated = False")
    if script.all("on_train_batch_end"):
        script.say("results = {}")
    for part in script.parts:
        every = part.hook.mark.every
        if every > 1:
            with script.block(f"if batch_idx % {every} == 0:"):
                _toggled(script, part)
        else:
            _toggled(script, part)
    script.say(f"{script.step} += {'updated' if script.counts_apart else '1'}")
    if script.all("on_train_batch_end"):
        script.say("outputs = results" if len(script.parts) > 1 else "outputs = next(iter(results.values()), None)")


def _toggled(script: Script, part: Part) -> None:
    """The block of one optimizer."""
    if len(script.parts) > 1:
        with script.block(f"with only({part.optimizer}, model):"):
            train_part(script, part, None)
    else:
        train_part(script, part, None)
    if script.all("on_train_batch_end"):
        script.say(f'results["{part.hook.mark.optimizer or ""}"] = outputs')
    if script.counts_apart:
        script.say("updated = True")
