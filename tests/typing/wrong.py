"""Mistakes that type checkers must see: each line's suppression is needed, or the checkers report it as unused."""

import torch
from torch import Tensor, nn

import lightdeco as ld


class Net(nn.Module):
    @ld.training_step
    def step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch.mean()

    @ld.validation_step()
    def check(self, batch: Tensor) -> Tensor:
        return batch.mean()

    @ld.on("train_batch_end", every=10)
    def tell(self, batch_idx: int) -> None: ...


def wrong_calls(net: Net, batch: Tensor) -> None:
    """A decorated method is called as it was written."""
    net.step(batch)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    net.step(batch, "0")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    net.check(batch, batch_index=0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    net.tell("0")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    net.check(batch).nope()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_settings(net: Net, batches: list[Tensor]) -> None:
    """Every setting's name and type is known."""
    ld.fit(net, batches, max_epoch=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ld.fit(net, batches, max_epochs="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ld.fit(net, batches, precision="half")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ld.test(net, batches, progress_bar=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ld.Settings(max_epoch=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_parts(net: Net) -> None:
    """So are the arguments of marks, optimizers and loaders."""
    ld.training_step(every="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ld.Optim(optimizer, interval="batch")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ld.CombinedLoader([[1]], mode="longest")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_names() -> None:
    """So is every name of the packages whose names are imported late."""
    print(ld.EarlyStoping)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    print(ld.callbacks.Timers)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    print(ld.loggers.Wandb)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
