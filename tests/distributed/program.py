"""What each process of a test does: `main` tries the group, trains with `fit`, and writes what came out.

python -m tests.distributed.program OUTPUT       with torchrun's variables
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import lightdeco as ld
from lightdeco import group
from tests.models import QUIET, Net, batches


def work(processes: group.Group) -> dict[str, Any]:
    """Everything that a group can do, and a reduction of a tensor."""
    total = torch.tensor([processes.rank + 1.0])
    if processes.size > 1:
        torch.distributed.all_reduce(total)
    processes.wait()
    return {
        "rank": processes.rank,
        "local_rank": processes.local_rank,
        "size": processes.size,
        "gathered": processes.gather({"rank": processes.rank, "text": "é" * processes.rank}),
        "same": processes.same([processes.rank, "from"]),
        "total": total.item(),
    }


def together() -> list[dict[str, Any]]:
    """Two groups, one after the other, in the same process."""
    found = []
    for _ in range(2):
        with group.opened("cpu", timeout_minutes=1) as processes:
            found.append(work(processes))
        assert not torch.distributed.is_initialized()
    return found


def train(name: str, strategy: str) -> dict[str, Any]:
    """A run with validation and checkpoints, in the present directory: its metrics and the sum of its weights."""
    model, data = Net(dropout=0.0), batches(6)
    run = ld.fit(model, (data, data), max_epochs=2, seed=1, num_nodes=2, name=name, strategy=strategy, **QUIET)
    reference = Net(dropout=0.0)
    assert run.last_checkpoint is not None
    ld.load_weights(reference, run.last_checkpoint)
    total = sum(float(p.detach().double().abs().sum()) for p in reference.parameters())
    return {"metrics": run.metrics, "steps": run.global_step, "weights": total, "world_size": run.world_size}


def main(output: str) -> None:
    """Write what came out as JSON; the last line is there only when all went well."""
    found = together()
    os.chdir(Path(output).parent)
    run, cut = train("run", "ddp"), train("cut", "fsdp")
    address = os.environ["MASTER_ADDR"]
    Path(output).write_text(json.dumps({"results": found, "address": address, "run": run, "cut": cut}))


if __name__ == "__main__":
    main(sys.argv[1])
