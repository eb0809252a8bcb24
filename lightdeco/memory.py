"""Running out of memory: which errors say so."""

from typing import Final

import torch

#: Forms of running out of memory that accelerate's predicate does not know.
_FORMS: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the CPU's allocator in torch, has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or not error.args or not isinstance(error.args[0], str):
        return False
    return should_reduce_batch_size(error) or any(form in error.args[0] for form in _FORMS)
