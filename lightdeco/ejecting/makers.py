"""The functions of an ejected script that make model, data and callbacks anew, and the lines that import their classes.

What cannot be told from the objects raises NotImplementedError in the script, with what to return.
"""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from .objects import arguments_of, loader_text, made


@dataclass
class Makers:
    """Collects the functions, the imports they need, and what they assume."""

    functions: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    """Lines that load a module from its file."""
    assumed: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def objects(self, name: str, things: list[object]) -> None:
        """`make_<name>()` for the model, the data object, or the callbacks (a list)."""
        calls: list[str] = []
        missing: list[str] = []
        for thing in things:
            kind = type(thing)
            if not self.import_of(kind):
                missing.append(f"return a {kind.__name__}, whose class is defined inside of a function")
                continue
            if arguments_of(thing)[1]:
                missing.append(f"return {made(thing)}")
            elif inspect.signature(kind).parameters:
                self.assumed.append(f"`{made(thing)}` makes the {name} as it was made for this run")
            calls.append(made(thing))
        body = f"    return [{', '.join(calls)}]" if name == "callbacks" else f"    return {''.join(calls)}"
        self._put(name, _refusal("; ".join(missing)) if missing else body)

    def loaders(self, data: Any) -> None:
        """`make_data()` for loaders, which cannot be made again from what they are."""
        several = list(data.values()) if isinstance(data, Mapping) else data if _is_pair(data) else [data]
        names = {"train": "train_loader", "val": "val_loader"}
        keys = data if isinstance(data, Mapping) else list(names)[: len(several)]
        texts = [f"the {key} loader, {_described(one)}" for key, one in zip(keys, several, strict=True)]
        what = "return {" + ", ".join(f'"{key}": …' for key in keys) + "}" if isinstance(data, Mapping) else (
            f"return ({', '.join(names.values())})" if len(several) == 2 else "return the train loader"
        )  # fmt: skip
        if len(several) == 1 and not isinstance(data, Mapping):
            self._put("data", _refusal(f"return {texts[0]}"))
        else:
            self._put("data", _refusal(f"{what}: {'; '.join(texts)}".replace('"', "'")))

    def import_of(self, thing: type | Callable[..., Any]) -> bool:
        """Add the lines that import a class or a function; False where it has no name in a module."""
        name = importable(thing)
        module = sys.modules.get(thing.__module__)
        if name is None or module is None:
            return False
        first, file = name.partition(".")[0], getattr(module, "__file__", None)
        if thing.__module__ != "__main__" and getattr(module, "__spec__", None) is not None:
            self._add(f"from {thing.__module__} import {first}", self.imports)
            if file is not None and thing.__module__.partition(".")[0] not in ("torch", "lightdeco"):
                self._add(f"`{thing.__module__}` ({_short(file)}) can be imported from where this is run", self.assumed)
            return True
        if file is None:
            return False
        stem = Path(file).stem
        spec = f'spec = importlib.util.spec_from_file_location("{stem}", "{_short(file)}")'
        if spec not in self.loads:
            self.loads += [
                spec,
                f"{stem} = sys.modules[spec.name] = importlib.util.module_from_spec(spec)",
                f"spec.loader.exec_module({stem})  # but for what stands under `if __name__ == ...`",
            ]
            self.assumed.append(f"the file {_short(file)} is found from where this is run")
        self._add(f"{first} = {stem}.{first}", self.loads)
        return True

    def _put(self, name: str, body: str) -> None:
        self.names.append(name)
        self.functions.append(f"def make_{name}():\n{body}\n")

    def _add(self, line: str, lines: list[str]) -> None:
        if line not in lines:
            lines.append(line)


def importable(thing: Any) -> str | None:
    """The name under which a module has a class or function, or None."""
    name = getattr(thing, "__qualname__", "<locals>")
    return None if "<" in name else name


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2


def _described(loader: Any) -> str:
    text = loader_text(loader)
    if not isinstance(loader, DataLoader):
        return text
    dataset: Any = loader.dataset
    with contextlib.suppress(TypeError):  # an iterable dataset has no length
        text += f", {len(dataset)} samples"
    return text + (", shuffled" if type(loader.sampler).__name__ == "RandomSampler" else "")


def _refusal(message: str) -> str:
    """The body of a function that only says what it should return."""
    lines = textwrap.wrap(message.replace('"', "'"), 90, break_on_hyphens=False)
    if len(lines) == 1:
        return f'    raise NotImplementedError("{lines[0]}")'
    inside = [f'        "{line} "' for line in lines[:-1]] + [f'        "{lines[-1]}"']
    return "\n".join(["    raise NotImplementedError(", *inside, "    )"])


def _short(file: str) -> str:
    """The path of a file, as seen from here where it lies below."""
    path = Path(file)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.as_posix()


def functions(makers: Iterable[str]) -> str:
    """Several functions one after another, with two empty lines between them."""
    return "\n\n\n".join(text.strip("\n") for text in makers if text.strip())
