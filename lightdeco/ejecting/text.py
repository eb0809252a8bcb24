"""The whole text of an ejected script: what it assumes and leaves out, imports, makers, the loop, its helpers."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any, cast

from lightdeco.data.loader import Loader
from lightdeco.data.rebuilt import _draws_once

from .evaluate import evaluate
from .makers import Makers, functions
from .objects import attached
from .parts import imports, needed
from .script import Script, kind_of
from .train import main


def written(script: Script, data: Any) -> str:
    """The script, from its docstring to its last line; `data` is what the verb was given."""
    main(script)
    loop, script.lines = _counted(script.lines), []
    if script.validates:
        evaluate(script)
    validation = _counted(script.lines)
    makers = _makers(script, data)
    helpers = needed(loop + validation + "seed_all(")
    given = ", ".join(f"make_{name}()" for name in makers.names)
    start = f'if __name__ == "__main__":\n    seed_all(SEED)  # decides the initial weights\n    main({given})'
    body = functions([*makers.functions, loop, validation, *helpers, start])

    seed = script.settings.seed
    constants = [f"SEED = {seed}" if seed is not None else "SEED = 0  # none was given to fit, which then draws one"]
    constants += [] if script.device == "cpu" else [f'DEVICE = "{script.device}"']
    constants = [*makers.loads, *constants]
    head = imports("\n".join([body, *constants]), makers.imports)
    return "\n\n".join([_docstring(script, makers.assumed), head, "\n".join(constants)]) + f"\n\n\n{body}\n"


def _counted(lines: list[str]) -> str:
    """The lines of a function; batches are numbered only where somebody asks for the number."""
    text = "\n".join(lines)
    if len(re.findall(r"\bbatch_idx\b", text)) == 1:
        text = re.sub(
            r"for batch_idx, (\(.*?\)|batch) in enumerate\((.*)\):",
            lambda m: f"for {m[1].strip('()')} in {m[2]}:",
            text,
        )
    return text


def _makers(script: Script, data: Any) -> Makers:
    makers = Makers()
    makers.objects("model", [script.plan.model])
    if script.plan.data is not None and script.plan.data is not script.plan.model:
        makers.objects("data", [script.plan.data])
    elif script.session.given:
        makers.loaders(data)
    if script.callbacks:
        makers.objects("callbacks", script.callbacks)
    for hook in script.hooks:
        if (function := attached(hook)) is not None:
            makers.import_of(function)
    return makers


def _docstring(script: Script, assumed: list[str]) -> str:
    """What the script is, what was assumed, and what is left out."""
    model = type(script.plan.model).__name__
    lines = [f'"""The training of {model} as a plain loop, written by lightdeco\'s `eject`.', ""]
    but = " but for what differs" if _differs(script) else ""
    lines += _wrapped(
        f"From the same initial weights and data it ends in the weights of the run, bit for bit{but}.", ""
    )
    differs = _differs(script)
    for title, points in (("Assumed:", assumed), ("Differs from fit:", differs), ("Left out:", _left_out(script))):
        if points:
            lines += ["", title, *(line for point in points for line in _wrapped(point, "- "))]
    return "\n".join([*lines, '"""'])


def _wrapped(text: str, bullet: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False)


#: Events for which the script has no place.
_UNHEARD = ("on_exception", "on_sanity_check_start", "on_sanity_check_end", "on_save_checkpoint", "on_load_checkpoint")


def _left_out(script: Script) -> list[str]:
    s = script.settings
    saves = s.checkpoint is not False and not s.fast_dev_run
    left = ["several processes" + (", checkpoints, resuming" if saves else "")]
    left.append("loggers, and what `ld.log` records, which does nothing outside of a run; metrics are printed")
    if script.validates and s.num_sanity_val_steps and not s.fast_dev_run:
        left.append("the sanity check, which tries validation before training")
    if script.left_out:
        left.append(f"the callbacks {', '.join(script.left_out)}")
    if s.compile is not False:
        left.append("the compiled forward, which may differ in the last bits")
    heard = [hook for event in _UNHEARD for hook in script.all(event)]
    left += [f"{hook.where.partition(' (')[0]}, which listens to {hook.role.name}" for hook in heard]
    if unknown := script.unknown_of_run():
        left.append(f"of `run`, which is a plain namespace here: {', '.join(unknown)}")
    for early in script.early:
        if not early.monitor.startswith(("val/", "train/")):
            left.append(f"early stopping by {early.monitor}, which the steps do not return")
    return left


def _differs(script: Script) -> list[str]:
    """Where the script cannot repeat the run to the bit."""
    s, found = script.settings, []
    loaders = [loader for several in script.session.loaders.values() for loader in several]
    if any(kind_of(loader) == "other" for loader in loaders):
        found.append("the seeds inside of an IterableDataset or a CombinedLoader, whose noise is another one here")
    for given in _data_loaders(loaders):
        sampler = given.sampler if given.batch_size is not None else given.batch_sampler
        if not _draws_once(given._index_sampler):
            found.append(
                f"the order of the batches, if {type(sampler).__name__} draws random numbers from batch to batch: "
                "fit draws them all from the seed of the epoch, this script between the steps"
            )
        if given.persistent_workers:
            found.append(
                "the order of the batches from the second epoch on: with persistent_workers=True torch draws one "
                "number less than in the first; leave that out here and there"
            )
    if s.oom == "micro":
        found.append("a run that runs out of memory: fit goes on in parts (oom='micro'), this script ends")
    if s.max_time is not None:
        found.append("where the run ends, which max_time measures by the clock")
    return list(dict.fromkeys(found))


def _data_loaders(loaders: list[Loader]) -> Iterator[Any]:
    """The DataLoaders over map-style datasets among them."""
    return (cast(Any, loader._source)._loader for loader in loaders if kind_of(loader) in ("tensors", "indexed"))
