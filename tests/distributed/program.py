"""What each process of a test does: `main` opens the group, calls `work` and writes what came out.

`work` can be changed for one that calls `ld.fit`: everything around it stays.

    python -m tests.distributed.program OUTPUT       with torchrun's variables
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightdeco import group


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


def main(output: str) -> None:
    """Write what came out as JSON; the last line is there only when all went well."""
    found = together()
    Path(output).write_text(json.dumps({"results": found, "address": os.environ["MASTER_ADDR"]}))


if __name__ == "__main__":
    main(sys.argv[1])
