"""What torch does not do by itself for a device of torch_xla (a TPU): find it, seed it, launch its work, read from it.

XLA collects what a step does and compiles it as one program, once for each shape; `synced` launches it after each
batch. Nothing here imports torch_xla before a run wants such a device, and everything does nothing until one has it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from .errors import LaunchError, warn

if TYPE_CHECKING:
    from accelerate import Accelerator

_OFF: Final = ("0", "false", "f", "no", "n", "off")

_device: torch.device | None = (
    None  # from the first run on XLA on; before, asking torch_xla for it would occupy the TPU
)


# ---- finding the device ----------------------------------------------------------------------------------------------


def installed() -> bool:
    """Whether torch_xla is here, and not switched off by `USE_TORCH_XLA=0`, the variable that accelerate reads."""
    wanted = os.environ.get("USE_TORCH_XLA", "1").lower() not in _OFF
    return wanted and importlib.util.find_spec("torch_xla") is not None


def is_tpu() -> bool:
    """Whether "auto" means XLA here: torch_xla is installed and finds a TPU. Imports it, which takes seconds."""
    if not installed():
        return False
    from torch_xla import runtime

    return bool(runtime.device_type() == "TPU")


def require(accelerator: str) -> None:
    """Refuse where torch_xla is missing; `accelerator` is what the setting was called.

    Raises:
        LaunchError: it is not installed, or switched off.
    """
    if installed():
        return
    if os.environ.get("USE_TORCH_XLA", "1").lower() in _OFF:
        raise LaunchError(f"accelerator={accelerator!r}, but USE_TORCH_XLA={os.environ['USE_TORCH_XLA']} rules XLA out")
    version = ".".join(str(torch.__version__).split("+")[0].split(".")[:2])
    raise LaunchError(
        f"accelerator={accelerator!r} needs torch_xla, which is not installed; on a TPU: pip install 'torch_xla[tpu]' "
        f"of the release that was made for this torch ({version})"
    )


def begin() -> None:
    """Take the XLA device of this process; from now on its random state is kept like that of the others.

    Raises:
        LaunchError: torch's autograd was used before and does not know the device: it counts devices once.
    """
    global _device
    if _device is not None:
        return
    import torch_xla

    device = torch_xla.device()
    try:
        torch.autograd.backward(torch.zeros((), device=device, requires_grad=True) * 2)
    except RuntimeError as error:
        if "device_ready_queues" not in str(error):
            raise
        raise LaunchError(
            "a backward ran in this process before the XLA device was there, and torch's autograd takes up no device "
            "after that; call torch_xla.device() at the top of the script, or train in a process of its own"
        ) from None
    _device = device


@contextmanager
def kept_out(kind: str) -> Iterator[None]:
    """Make accelerate believe meanwhile that torch_xla is not installed, unless the run is on it.

    Where it is installed, `Accelerator(cpu=True)` is on XLA too.
    """
    import accelerate.state as state

    before = state.is_torch_xla_available
    if kind != "xla":
        state.is_torch_xla_available = lambda **asked: False
    try:
        yield
    finally:
        state.is_torch_xla_available = before


def check(accelerator: "Accelerator", bf16_variable: str | None) -> None:
    """Make mixed bf16 mean the same on a TPU as elsewhere: autocast, with weights in float32.

    accelerate sets the variable `XLA_USE_BF16` there, under which all float32 is bf16, and leaves autocast off.
    `bf16_variable` is what it was before.

    Raises:
        LaunchError: accelerate was imported when torch_xla was ruled out.
    """
    if accelerator.device.type != "xla":
        raise LaunchError(
            "accelerate does not see torch_xla: it was imported under USE_TORCH_XLA=0; start the script without it"
        )
    if accelerator.mixed_precision == "bf16":
        accelerator.native_amp = True
        if bf16_variable is None:
            os.environ.pop("XLA_USE_BF16", None)
    import torch_xla

    if (count := torch_xla.device_count()) > 1:
        warn(f"there are {count} XLA devices here and this run uses one; runs on several are not available")


@contextmanager
def same_parameters(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep each parameter the same object when the model is moved to an XLA device meanwhile.

    torch makes new ones otherwise: tied weights would come apart, and an optimizer made before would hold the old ones.
    """
    moves = device.type == "xla" and any(p.device.type != "xla" for p in model.parameters())
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(before or moves)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# ---- work ------------------------------------------------------------------------------------------------------------


def sync() -> None:
    """Launch the work that was collected for the device; does not wait for it. Nothing without an XLA device."""
    if _device is not None:
        import torch_xla

        torch_xla.sync()


def synced(event: Callable[..., Any]) -> Callable[..., Any]:
    """The function for an event after a batch, with `sync` before it: what it reads is then there or on its way."""
    import torch_xla

    launch = torch_xla.sync

    def after_batch(*given: object) -> Any:
        launch()
        return event(*given)

    return after_batch


def numbers(values: Sequence[Any]) -> list[float]:
    """Numbers and tensors of one element as numbers. Waits for the device.

    One by one (60 µs each), since to stack them XLA would compile a program for each number of them.
    """
    sync()
    return [float(value.detach()) if isinstance(value, Tensor) else float(value) for value in values]


# ---- random state ----------------------------------------------------------------------------------------------------


def rng_state() -> int | None:
    """The random state of the device; None where no run has used one."""
    if _device is None:
        return None
    from torch_xla.core import xla_model

    return int(xla_model.get_rng_state(str(_device)))


def set_rng_state(state: int | None) -> None:
    """Set what `rng_state` returned, or a seed; does nothing where no run has used an XLA device, or with None."""
    if _device is None or state is None:
        return
    from torch_xla.core import xla_model

    xla_model.set_rng_state(state, str(_device))


def reseeder() -> Callable[[int], None]:
    """Seed the CPU's generator and the device's; costs 1 µs more than the CPU alone."""
    from torch_xla.core import xla_model

    seed_cpu, seed_xla, device = torch.default_generator.manual_seed, xla_model.set_rng_state, str(_device)

    def both(seed: int) -> None:
        seed_cpu(seed)
        seed_xla(seed, device)

    return both
