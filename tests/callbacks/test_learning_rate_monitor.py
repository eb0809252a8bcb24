"""The learning rate in the records: which, when, under which name, and at what cost."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lightdeco as ld
from lightdeco.callbacks.learning_rate_monitor import LearningRateMonitor
from tests.models import QUIET, Net, batches, equal, weights


class Scheduled(Net):
    """Update k (from 1) uses the learning rate 1/k; with interval="epoch" it is epoch k."""

    interval: Any = "step"

    @ld.configure_optimizers
    def adam(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=1.0)
        return ld.Optim(sgd, LambdaLR(sgd, lambda count: 1 / (count + 1)), interval=self.interval)


def fit(model: Net, callback: LearningRateMonitor | None = None, **settings: Any) -> ld.Run:
    """A fit of two epochs of 4 batches that records every second update."""
    defaults: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2}
    callbacks = [callback or LearningRateMonitor()]
    return ld.fit(model, settings.pop("data", batches()), callbacks=callbacks, **(defaults | QUIET | settings))


def logged(run: ld.Run, name: str = "lr") -> list[tuple[int, float]]:
    """(step, value) of every record that holds the name."""
    return [(record["step"], record[name]) for record in run.history if name in record]


def test_joins_the_records_with_the_rate_that_the_update_used() -> None:
    """Each training record gets the rate of its last update, once per step, and no record is added."""
    run = fit(Scheduled())
    assert logged(run) == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6), (8, 1 / 8)]
    assert len(run.history) == 4 + 2  # the windows' and the epochs'
    assert run.metrics["lr"] == 1 / 8


def test_schedule_by_epoch() -> None:
    """A scheduler by epoch steps after the record of the epoch."""
    model = Scheduled()
    model.interval = "epoch"
    assert logged(fit(model)) == [(2, 1), (4, 1), (6, 1 / 2), (8, 1 / 2)]


@pytest.mark.parametrize("unknown_length", [False, True])
def test_epoch_without_a_record_at_its_end_gets_it(unknown_length: bool) -> None:
    """An epoch that ends between two records carries the rate of its last update in its own record."""

    class Endless:
        def __iter__(self) -> Any:
            return iter(batches(3))

    run = fit(Scheduled(), data=Endless() if unknown_length else batches(3))
    assert logged(run) == [(2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (6, 1 / 6)]


def test_accumulation_counts_updates() -> None:
    """With accumulation a record belongs to an update, not to each of its batches."""
    run = fit(Scheduled(), accumulate_grad_batches=2, max_epochs=4)
    assert logged(run) == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6), (8, 1 / 8)]


def test_skipped_epoch_logs_the_present_rate() -> None:
    """After SKIP_EPOCH the epoch's record shows the rate as it stands."""

    class Skips(Scheduled):
        @ld.on_train_batch_start
        def skip(self, batch_idx: int) -> Any:
            return ld.SKIP_EPOCH if batch_idx == 1 else None

    assert logged(fit(Skips(), log_every_n_steps=5)) == [(1, 1 / 2), (2, 1 / 3)]


def test_names_of_groups() -> None:
    """Groups are told apart by their name, or by number where they have none or share one."""

    class Groups(Net):
        names: tuple[str | None, ...] = ()

        @ld.configure_optimizers
        def adam(self) -> torch.optim.Optimizer:
            layers = [self.body[0], self.body[3]][: len(self.names)]
            groups: list[dict[str, Any]] = [{"params": list(layer.parameters())} for layer in layers]
            for group, name, lr in zip(groups, self.names, (0.1, 0.2), strict=False):
                group["lr"] = lr
                if name is not None:
                    group["name"] = name
            return torch.optim.SGD(groups)

    for names, wanted in (
        ((None, None), {"lr/group0": 0.1, "lr/group1": 0.2}),
        (("stem", None), {"lr/stem": 0.1, "lr/group1": 0.2}),
        (("same", "same"), {"lr/group0": 0.1, "lr/group1": 0.2}),
        (("alone",), {"lr": 0.1}),
    ):
        model = Groups()
        model.names = names
        metrics = fit(model, max_epochs=1).metrics
        assert {name: value for name, value in metrics.items() if name.startswith("lr")} == wanted


def test_names_of_several_optimizers() -> None:
    """Where a run has several optimizers, their names come first."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    run = ld.Run("fit", Net(), ld.Settings(), 0)
    run.progress.global_step = 1
    run.optims = {
        "gen": ld.Optim(torch.optim.SGD(parameters[:1], lr=0.5)),
        "disc": ld.Optim(torch.optim.SGD([{"params": [p]} for p in parameters[1:]], lr=0.25)),
    }
    monitor = LearningRateMonitor()
    monitor._epoch_end(run)
    assert {name: run.metrics[name] for name in run.metrics} == {
        "lr/gen": 0.5,
        "lr/disc/group0": 0.25,
        "lr/disc/group1": 0.25,
    }


def test_momentum_and_weight_decay() -> None:
    """Momentum is an optimizer's own or the first of its betas."""
    run = fit(Net(), LearningRateMonitor(momentum=True, weight_decay=True))
    assert (run.metrics["lr"], run.metrics["momentum"], run.metrics["weight_decay"]) == (1e-2, 0.9, 0)
    run = fit(Scheduled(), LearningRateMonitor(momentum=True))
    assert run.metrics["momentum"] == 0
    assert "weight_decay" not in run.metrics


def test_warns_of_what_the_optimizer_has_not() -> None:
    """Asking for a momentum where there is none warns."""

    class Adagrad(Net):
        @ld.configure_optimizers
        def adam(self) -> torch.optim.Optimizer:
            return torch.optim.Adagrad(self.parameters())

    with pytest.warns(ld.LightdecoWarning, match=r"momentum=True\) has no effect: Adagrad has no 'momentum'"):
        run = fit(Adagrad(), LearningRateMonitor(momentum=True))
    assert run.metrics["lr"] == 1e-2


def test_tensor_rates_are_copied() -> None:
    """A tensor that a scheduler changes in place is logged as it was when the update used it."""

    class Tensors(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            adam = torch.optim.Adam(self.parameters(), lr=torch.tensor(1.0), foreach=False, capturable=False)
            return ld.Optim(adam, LambdaLR(adam, lambda count: 0.5**count), interval="step")

    assert logged(fit(Tensors(), max_epochs=1)) == [(2, 0.5), (4, 0.125)]


def test_second_fit_and_wrong_arguments() -> None:
    """The object keeps nothing of a run for the next; arguments are bools."""
    monitor = LearningRateMonitor()
    assert logged(fit(Scheduled(), monitor)) == logged(fit(Scheduled(), monitor))
    with pytest.raises(ld.SettingsError, match=r"momentum=1\); allowed: True, False"):
        LearningRateMonitor(momentum=1)  # type: ignore[arg-type]
    with pytest.raises(ld.SettingsError, match="weight_decay='no'"):
        LearningRateMonitor(weight_decay="no")  # type: ignore[arg-type]


def test_leaves_no_trace() -> None:
    """Weights and random state are those of a run without it."""
    found: list[list[Tensor]] = []
    for callbacks in ([], [LearningRateMonitor(momentum=True, weight_decay=True)]):
        model = Scheduled()
        ld.fit(model, batches(), max_epochs=2, seed=1, log_every_n_steps=1, callbacks=callbacks, **QUIET)
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(*found)
