"""The helper functions of an ejected script, as text: those that the loop calls are put in, and no other.

Texts are dedented functions; `needed` finds which are called, and `imports` which modules they and the loop use.
"""

import re
from typing import Final

_MIX: Final = '''
def mix(*values):
    """A hash of a few integers, 32 bits (SplitMix64): all that is random is a function of its place in the run."""
    state = values[0]
    for value in values[1:]:
        state = (state * 0x9E37_79B9_7F4A_7C15 + value + 0x632B_E59B_D9B4_E019) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB % 2**64
        state ^= state >> 31
    return state % 2**32
'''

#: In the order of the script; a function may call those anywhere in it.
PARTS: Final[dict[str, str]] = {
    "mix": _MIX,
    "order_seed": '''
def order_seed(epoch):
    """What decides the order of the data in an epoch."""
    return mix(1, SEED, epoch)
''',
    "data_seed": '''
def data_seed(epoch, batch_idx):
    """What decides the noise in a batch while it is read."""
    return mix(2, SEED, epoch, batch_idx)
''',
    "step_seed": '''
def step_seed(micro_batch):
    """What decides dropout and the like in a training step; batches are counted over the whole run."""
    return mix(3, SEED, 0, micro_batch)
''',
    "eval_seed": '''
def eval_seed(loader_idx, batch_idx):
    """The same for a validation step; it does not depend on the epoch."""
    return mix(4, SEED, loader_idx, batch_idx)
''',
    "seed_all": '''
def seed_all(seed):
    """Seed torch, NumPy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
''',
    "Fetched": '''
class Fetched(Dataset):
    """A loader's dataset that reads a whole batch at a time, its noise seeded first, in a worker or not."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, seed_and_indices):
        seed, indices = seed_and_indices
        seed_all(seed)
        if not isinstance(indices, (list, tuple)):
            return self.dataset[indices]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[i] for i in indices]
''',
    "batches_of": '''
def batches_of(loader, epoch):
    """The batches of a DataLoader, their order and noise a function of SEED and epoch."""
    seed_all(order_seed(epoch))
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # a DataLoader draws it for its workers
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    places = [(data_seed(epoch, k), indices) for k, indices in enumerate(sampler)]
    return DataLoader(
        Fetched(loader.dataset),
        batch_size=None,
        sampler=places,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
''',
    "read_in_turn": '''
def read_in_turn(loader, epoch):
    """The batches of any iterable, seeded before it begins and before each batch."""
    seed_all(order_seed(epoch))
    for batch_idx, batch in enumerate(loader):
        yield batch
        seed_all(data_seed(epoch, batch_idx + 1))
''',
    "with_last": '''
def with_last(batches):
    """Each batch, with whether it is the last one; reads one ahead."""
    batches = iter(batches)
    following = next(batches, None)
    while following is not None:
        batch, following = following, next(batches, None)
        yield batch, following is None
''',
    "only": '''
@contextmanager
def only(optimizer, model):
    """Only the parameters of this optimizer require gradients."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and p not in own]
    for p in others:
        p.requires_grad_(False)
    yield
    for p in others:
        p.requires_grad_(True)
''',
    "to_device": '''
def to_device(batch):
    """The batch with its tensors on DEVICE, in the same structure."""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(map(to_device, batch))
    if isinstance(batch, dict):
        return {name: to_device(value) for name, value in batch.items()}
    return batch.to(DEVICE) if hasattr(batch, "to") else batch
''',
    "num_samples": '''
def num_samples(batch):
    """The first dimension of the first tensor in a batch."""
    if torch.is_tensor(batch):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif dataclasses.is_dataclass(batch):
        batch = vars(batch).values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((size for size in map(num_samples, batch) if size is not None), None)
''',
    "weight_of": '''
def weight_of(outputs, batch):
    """How much a batch counts: what the step says, or else its number of samples."""
    said = outputs if isinstance(outputs, dict) else {}
    weight = said.get("weight", said.get("batch_size"))
    return num_samples(batch) if weight is None else weight
''',
    "Means": '''
class Means:
    """The means of the scalars that steps return, by name, each batch with its weight."""

    def __init__(self):
        self.sums = {}

    def add(self, outputs, weight, prefix):
        named = outputs if isinstance(outputs, dict) else {"loss": outputs}
        for name, value in named.items():
            scalar = value.numel() == 1 if torch.is_tensor(value) else isinstance(value, (int, float))
            if scalar and name not in ("weight", "batch_size"):
                number = value.item() if torch.is_tensor(value) else value  # waits for a GPU
                total, weights = self.sums.get(prefix + name, (0.0, 0))
                self.sums[prefix + name] = total + number * float(weight), weights + float(weight)

    def read(self):
        return {name: total / weights for name, (total, weights) in self.sums.items()}
''',
}

_IMPORTS: Final = (  # what is looked for in the script, the line, and its place among the others
    ("dataclasses.", "import dataclasses"),
    ("importlib.", "import importlib.util"),
    ("math.", "import math"),
    ("random.seed(", "import random"),
    ("sys.", "import sys"),
    ("time.", "import time"),
    ("Counter(", "from collections import Counter"),
    ("Mapping)", "from collections.abc import Mapping"),
    ("contextmanager", "from contextlib import contextmanager"),
    ("count(", "from itertools import count"),
    ("islice(", "from itertools import islice"),
    ("Path(", "from pathlib import Path"),
    ("SimpleNamespace(", "from types import SimpleNamespace"),
)


def _calls(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}", text) is not None


def needed(text: str) -> list[str]:
    """The helper functions that a text calls, and those that they call, in the order of `PARTS`."""
    found: set[str] = set()
    seen, todo = text, True
    while todo:
        more = [name for name in PARTS if name not in found and _calls(seen, name + "(")]
        found.update(more)
        seen += "".join(PARTS[name] for name in more)
        todo = bool(more)
    return [PARTS[name] for name in PARTS if name in found]


def imports(text: str, users: list[str]) -> str:
    """The import lines of a script: of the standard library, of torch and NumPy, and the user's own."""
    standard = [line for word, line in _IMPORTS if _calls(text, word)]
    joined = [line for line in standard if line.startswith("from itertools")]
    if len(joined) == 2:
        at = standard.index(joined[0])
        standard[at : at + 2] = ["from itertools import count, islice"]
    torch = ["import numpy as np"] if _calls(text, "np.") else []
    torch += ["import torch"]
    of_data = [name for name in ("DataLoader", "Dataset") if _calls(text, name + "(") or f"({name})" in text]
    if of_data:
        torch.append(f"from torch.utils.data import {', '.join(of_data)}")
    named: dict[str, list[str]] = {}
    for line in users:
        module, _, name = line.removeprefix("from ").partition(" import ")
        named.setdefault(module, []).append(name)
    own = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())]
    return "\n\n".join("\n".join(group) for group in (standard, torch, own) if group)
