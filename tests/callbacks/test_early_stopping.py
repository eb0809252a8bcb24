"""Early stopping: what it counts, when and why it ends a run, and what it refuses."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.callbacks.early_stopping import EarlyStopping
from tests.models import QUIET, Net, batches, equal, weights


class Scripted(Net):
    """A net whose validations record the given scores as `val/score`, one after the other, sanity check included."""

    def __init__(self, scores: Sequence[float], sanity: float = 0.0) -> None:
        super().__init__()
        self.scores, self.sanity, self.seen = list(scores), sanity, 0

    @ld.on_validation_epoch_end
    def score(self, run: ld.Run) -> None:
        if run.stage == "sanity":
            run.log("val/score", self.sanity)
        else:
            run.log("val/score", self.scores[min(self.seen, len(self.scores) - 1)])
            self.seen += 1


def fit(model: Net, callback: EarlyStopping, **settings: Any) -> ld.Run:
    """A fit of at most 10 epochs of 4 batches with validation on one."""
    data = settings.pop("data", (batches(), batches(1)))
    return ld.fit(model, data, callbacks=[callback], **({"max_epochs": 10} | QUIET | settings))


def test_stops_after_patience_validations_without_improvement() -> None:
    """The run ends once the score has not improved `patience` times in a row, and says so in words."""
    run = fit(Scripted([5, 3, 4, 4, 2, 3, 3, 3, 3]), EarlyStopping("val/score", patience=3))
    assert run.epoch == 8
    assert run.stop_reason == "early stopping: val/score has not improved on 2 for 3 validations"


def test_mode_max_and_min_delta() -> None:
    """With "max" more is better, and a gain of no more than min_delta is none."""
    early = EarlyStopping("val/score", mode="max", patience=2, min_delta=0.5)
    run = fit(Scripted([1, 2, 2.5, 2.4]), early)
    assert (run.epoch, early.best, early.waited) == (4, 2, 2)
    assert run.stop_reason == "early stopping: val/score has not improved on 2 by more than 0.5 for 2 validations"


def test_counts_validations_not_epochs() -> None:
    """Several validations in an epoch count each, and the run ends in the middle of an epoch."""
    run = fit(Scripted([1, 1, 1]), EarlyStopping("val/score", patience=2), val_check_interval=1)
    assert (run.epoch, run.global_step) == (0, 3)


def test_rare_validations_are_waited_for() -> None:
    """With check_val_every_n_epoch the epochs between do not count, and the monitor is not refused in them."""
    run = fit(Scripted([1, 1]), EarlyStopping("val/score", patience=1), check_val_every_n_epoch=3)
    assert run.epoch == 6
    assert run.stop_reason == "early stopping: val/score has not improved on 1 for 1 validation"


def test_sanity_check_is_no_validation() -> None:
    """What the sanity check scores is not remembered as the best."""
    early = EarlyStopping("val/score", patience=2)
    run = fit(Scripted([9, 8, 7], sanity=-100.0), early, max_epochs=3)
    assert (run.stop_reason, early.best, early.waited) == ("max_epochs", 7, 0)


def test_training_metric_is_looked_at_per_epoch() -> None:
    """A metric of training counts once per epoch, by its epoch's mean, also where validations run."""

    class Frozen(Net):
        @ld.configure_optimizers
        def adam(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    run = fit(Frozen(dropout=0.0), EarlyStopping("train/loss", patience=2), val_check_interval=1)
    assert (run.epoch, run.global_step) == (3, 12)
    assert run.stop_reason is not None
    assert run.stop_reason.endswith("for 2 epochs")


def test_metric_logged_at_the_epochs_end_is_found() -> None:
    """A metric that an earlier object logs in on_train_epoch_end is fresh when early stopping looks at it."""

    class Ends(Net):
        @ld.on_train_epoch_end
        def tell(self, run: ld.Run) -> None:
            run.log("score", [3.0, 2.0, 2.0][run.epoch])

    early = EarlyStopping("score", patience=1)
    assert fit(Ends(), early).epoch == 3
    assert early.best == 2.0


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_stops_at_a_value_that_is_not_finite(value: float, shown: str) -> None:
    """A value that is not finite ends the run at once."""
    run = fit(Scripted([1, value]), EarlyStopping("val/score"))
    assert (run.epoch, run.stop_reason) == (2, f"early stopping: val/score is {shown}")


def test_nan_counts_as_not_improved_without_check_finite() -> None:
    """With check_finite=False a NaN is waited out, and never becomes the best."""
    early = EarlyStopping("val/score", patience=2, check_finite=False)
    assert fit(Scripted([math.nan, 3, math.nan, 2, 2, 2]), early).epoch == 6
    assert early.best == 2
    run = fit(Scripted([math.nan]), early)
    assert run.stop_reason == "early stopping: val/score has been nan for 2 validations"


def test_thresholds() -> None:
    """As good as the stopping threshold ends the run, and so does worse than the divergence threshold."""
    run = fit(Scripted([3, 2, 1]), EarlyStopping("val/score", stopping_threshold=2))
    assert run.epoch == 2
    assert run.stop_reason == "early stopping: val/score has reached 2, the stopping_threshold is 2"
    run = fit(Scripted([5, 6, 4]), EarlyStopping("val/score", mode="max", divergence_threshold=5))
    assert run.epoch == 3
    assert run.stop_reason == "early stopping: val/score has come to 4, the divergence_threshold is 5"


def test_min_epochs_holds_off_and_improving_takes_it_back() -> None:
    """Before min_epochs the run goes on; when the metric improves meanwhile, it is not ended afterwards."""
    run = fit(Scripted([1, 1, 1]), EarlyStopping("val/score", patience=1), min_epochs=5)
    assert run.epoch == 5
    assert run.stop_reason == "early stopping: val/score has not improved on 1 for 4 validations"
    run = fit(Scripted([5, 5, 4, 3, 2, 1]), EarlyStopping("val/score", patience=1), min_epochs=5, max_epochs=6)
    assert (run.epoch, run.stop_reason) == (6, "max_epochs")


def test_anothers_reason_to_stop_is_kept() -> None:
    """Where another callback has asked to stop and said why, that reason stays, improved or not."""

    class Other:
        @ld.on_validation_epoch_end
        def stop(self, run: ld.Run) -> None:
            if run.stage == "val" and run.epoch == 1:
                run.should_stop, run.stop_reason = True, "good enough"

    for scores in ([1.0, 1.0], [2.0, 1.0]):
        early = EarlyStopping("val/score", patience=1)
        data = (batches(), batches(1))
        run = ld.fit(Scripted(scores), data, max_epochs=9, callbacks=[early, Other()], **QUIET)
        assert (run.epoch, run.stop_reason) == (2, "good enough")


def test_wrong_monitor_of_validation_is_refused_at_the_first() -> None:
    """A name under val/ that the first validation does not record is refused there, with the names and the nearest."""
    with pytest.raises(ld.SettingsError, match=r"recorded: .*val/acc, val/loss.*did you mean 'val/loss'") as caught:
        fit(Net(), EarlyStopping("val/los"), val_check_interval=1, log_every_n_steps=1)
    assert "train/loss_epoch" not in str(caught.value)  # the first epoch had not ended


def test_wrong_monitor_is_refused_at_the_end_of_the_first_epoch() -> None:
    """Any other name, and any name without validation, is refused at the end of the first epoch."""
    with pytest.raises(ld.SettingsError, match=r"EarlyStopping\(monitor='loss'\).*did you mean 'val/loss'"):
        fit(Net(), EarlyStopping("loss"))
    with pytest.raises(
        ld.SettingsError, match=r"'val/loss'\) was not recorded; recorded: train/loss, train/loss_epoch"
    ):
        fit(Net(), EarlyStopping(), data=batches())


def test_warns_where_it_could_not_look() -> None:
    """A run that ends before any validation or epoch does warns that early stopping had no effect."""
    with pytest.warns(ld.LightdecoWarning, match=r"EarlyStopping\(monitor='val/loss'\) had no effect"):
        fit(Net(), EarlyStopping(), max_steps=2, max_epochs=None)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"monitor": ""}, "monitor=''"),
    ({"mode": "mix"}, r"mode='mix'\); allowed: 'min', 'max'; did you mean 'min'"),
    ({"patience": 0}, r"patience=0\); allowed: an integer of at least 1"),
    ({"patience": True}, "patience=True"),
    ({"min_delta": -1.0}, "min_delta=-1.0"),
    ({"min_delta": math.nan}, "min_delta=nan"),
    ({"check_finite": 1}, "check_finite=1"),
    ({"stopping_threshold": math.inf}, "stopping_threshold=inf"),
    ({"divergence_threshold": "1"}, "divergence_threshold='1'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Each wrong value is refused by name."""
    with pytest.raises(ld.SettingsError, match=message):
        EarlyStopping(**arguments)


def test_second_fit_starts_anew() -> None:
    """Another fit with the same object forgets the best value and how long it was waited."""
    early = EarlyStopping("val/score", patience=2)
    assert fit(Scripted([1, 1, 1]), early).epoch == 3
    assert fit(Scripted([9, 9, 9]), early).epoch == 3
    assert early.best == 9


def test_state_survives_as_json() -> None:
    """A state that went through JSON goes on in the next fit, and only in that one, whatever runs before it."""
    early = EarlyStopping("val/score", patience=3)
    fit(Scripted([1, 2]), early, max_epochs=2)
    state = json.loads(json.dumps(early.state_dict()))
    assert state == {"best": 1, "waited": 1, "unit": "validation", "asked": None}
    other = EarlyStopping("val/score", patience=3)
    other.load_state_dict(state)
    ld.validate(Scripted([0]), batches(1), callbacks=[other], progress_bar=False)
    assert other.state_dict() == state
    assert fit(Scripted([2]), other).epoch == 2
    assert fit(Scripted([2]), other).epoch == 4


def test_a_run_that_was_ended_is_ended_again() -> None:
    """A state saved when the end was held off ends the run as early as the uninterrupted one."""
    early = EarlyStopping("val/score", patience=1)
    fit(Scripted([1, 1]), early, min_steps=100, max_epochs=2)
    state = json.loads(json.dumps(early.state_dict()))
    other = EarlyStopping("val/score", patience=1)
    other.load_state_dict(state)
    run = fit(Scripted([1]), other)
    assert (run.global_step, run.stop_reason) == (0, state["asked"])


def test_leaves_no_trace() -> None:
    """Weights and random state are those of a run without it."""
    found: list[list[Tensor]] = []
    for callbacks in ([], [EarlyStopping("train/loss", patience=9)]):
        model = Net()
        ld.fit(model, (batches(), batches(1)), max_epochs=2, seed=1, callbacks=callbacks, **QUIET)
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(*found)
