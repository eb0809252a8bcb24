"""Validation and early stopping in an ejected script."""

from lightdeco.callbacks import EarlyStopping
from lightdeco.data.loader import Loader
from lightdeco.limits import cut

from .script import Script, kind_of, wishes
from .step import transfer


def evaluate(script: Script) -> None:
    """Put down `evaluate(model, loader, epoch)`."""
    several = script.session.loaders["val"][0].name is not None
    loader = "loaders" if several else "loader"
    given = ", ".join(["model", loader, "epoch", *script.passed])
    frozen = not all(module.training for module in script.plan.model.modules())
    with script.block(f"def evaluate({given}):"):
        script.say('"""The means over the validation data, by name."""')
        if frozen:
            script.say("modes = [(module, module.training) for module in model.modules()]")
        script.say("model.eval()", "means = Means()")
        script.hear("on_validation_start")
        script.hear("on_validation_epoch_start")
        index = "loader_idx" if several else "0"
        if several:
            with script.block("for loader_idx, (name, loader) in enumerate(loaders.items()):"):
                _pass(script, index, 'f"val/{name}/"')
        else:
            _pass(script, index, '"val/"')
        script.say("values = means.read()")
        _listeners(script)
        if frozen:
            script.say("for module, training in modes:", "    module.training = training")
        else:
            script.say("model.train()")
        script.say("return values")


def _listeners(script: Script) -> None:
    if "run" in script.passed:
        script.say("run.metrics |= values")
    script.hear("on_validation_epoch_end")
    script.hear("on_validation_end")


def _pass(script: Script, index: str, prefix: str) -> None:
    """One pass over one loader."""
    loaders = script.session.loaders["val"]
    kinds = {kind_of(loader) for loader in loaders}
    kind = kinds.pop() if len(kinds) == 1 else "indexed" if kinds == {"tensors", "indexed"} else "other"
    if len(loaders) == 1:
        script.say(*wishes(loaders[0], "loader", "epoch"))
    if kind == "tensors":
        script.say("seed_all(order_seed(epoch))")
    wrap = {"indexed": "batches_of", "other": "read_in_turn"}.get(kind)
    text = "loader" if wrap is None else f"{wrap}(loader, epoch)"
    limit = _limit(script, loaders)
    text = text if limit is None else f"islice({text}, {limit})"
    names = {"dataloader_idx": index}
    seed = f"eval_seed({index}, batch_idx)"
    mode = "inference_mode" if script.settings.inference_mode else "no_grad"
    step = script.one("validation_step")
    assert step is not None
    with script.block(f"for batch_idx, batch in enumerate({text}):"), script.block(f"with torch.{mode}():"):
        transfer(script, seed, index)
        script.hear("on_validation_batch_start", names)
        script.say(f"torch.manual_seed({seed})")
        call = f"outputs = {script.call(step, names)}"
        if script.settings.precision == "bf16-mixed":
            script.say(f'with torch.autocast("{script.device}", torch.bfloat16):', f"    {call}")
        else:
            script.say(call)
        script.say(f"means.add(outputs, weight_of(outputs, batch), {prefix})")
        script.hear("on_validation_batch_end", names)


def _limit(script: Script, loaders: tuple[Loader, ...]) -> object:
    limits = [cut(script.settings, loader, "val") for loader in loaders]
    if len(set(limits)) == 1:
        return limits[0]
    by_name = {loader.name: limit for loader, limit in zip(loaders, limits, strict=True)}
    return f"{by_name!r}[name]"


def validation(script: Script) -> None:
    """A validation inside of `main`, with what is decided by its result."""
    several = script.session.loaders["val"][0].name is not None
    given = ", ".join(["model", "val_loaders" if several else "val_loader", "epoch", *script.passed])
    script.say(f"{script.metrics} |= evaluate({given})")
    early_stopping(script, "val/")


# ---- early stopping --------------------------------------------------------------------------------------------------


def _names(script: Script, early: EarlyStopping) -> tuple[str, str]:
    number = "" if len(script.early) == 1 else f"_{script.early.index(early) + 1}"
    return f"best{number}", f"waited{number}"


def early_begins(script: Script) -> None:
    """The variables of early stopping."""
    for early in script.early:
        assert isinstance(early, EarlyStopping)
        best, waited = _names(script, early)
        worst = "math.inf" if early.mode == "min" else "-math.inf"
        script.say(f"{best}, {waited} = {worst}, 0  # early stopping by {early.monitor}")
    if script.early and held_off(script):
        script.say("stalled = None")


def early_stopping(script: Script, prefix: str) -> None:
    """Judge the metrics that were just recorded: those of validation, or those of an epoch of training."""
    for early in script.early:
        assert isinstance(early, EarlyStopping)
        if not early.monitor.startswith(prefix):
            continue
        best, waited = _names(script, early)
        least, sign = early.mode == "min", "<" if early.mode == "min" else ">"
        delta = "" if not early.min_delta else f" {'-' if least else '+'} {early.min_delta!r}"
        script.say(f'value = {script.metrics}["{early.monitor}"]')
        script.say(f"if value {sign} {best}{delta}:", f"    {best}, {waited} = value, 0")
        script.say("else:", f"    {waited} += 1")
        reasons = []
        if early.check_finite:
            reasons.append(("not math.isfinite(value)", f'f"early stopping: {early.monitor} is {{value}}"'))
        if early.stopping_threshold is not None:
            words = f'"early stopping: {early.monitor} has reached its threshold"'
            reasons.append((f"value {sign}= {early.stopping_threshold!r}", words))
        if early.divergence_threshold is not None:
            words = f'"early stopping: {early.monitor} has diverged"'
            reasons.append((f"value {'>' if least else '<'} {early.divergence_threshold!r}", words))
        words = f'f"early stopping: {early.monitor} has not improved on {{{best}:.6g}}"'
        reasons.append((f"{waited} >= {early.patience}", words))
        decided = "stalled" if held_off(script) else "stop"
        if len(reasons) == 1:
            script.say(f"{decided} = {reasons[0][1]} if {reasons[0][0]} else None")
            continue
        for i, (condition, reason) in enumerate(reasons):
            script.say(f"{'elif' if i else 'if'} {condition}:", f"    {decided} = {reason}")
        script.say("else:", f"    {decided} = None")


def held_off(script: Script) -> bool:
    """Whether `min_epochs` or `min_steps` can hold an early end off."""
    return bool(script.settings.min_epochs or script.settings.min_steps) or len(script.early) > 1
