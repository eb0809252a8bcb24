"""Show more than curves: a confusion matrix, misread digits, weights, and a table of predictions, after each epoch.

    python examples/digits_shown.py
    python examples/digits_shown.py --logger wandb --epochs 10
    tensorboard --logdir runs

The training is that of `digits.py`; the callback `Shown` adds what is to be seen. Any logger will do: what one cannot
show is left out there, with a warning. Figures need `pip install lightdeco[plot]`.
"""

import argparse
from collections.abc import Sequence

import torch
from digits import SEED, Digits, make_loaders
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import lightdeco as ld


def confusion_figure(labels: Tensor, predictions: Tensor) -> Figure:
    """How many digits of each kind (rows) were read as which (columns)."""
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    figure = Figure(figsize=(5, 4.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(counts.numpy(), cmap="Blues", norm="symlog")  # few mistakes beside many right ones would not be seen
    for row in range(10):
        for column in range(10):
            if count := int(counts[row, column]):
                colour = "white" if row == column else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    right = float((labels == predictions).float().mean())
    axes.set(xlabel="read as", ylabel="is", xticks=range(10), yticks=range(10), title=f"{right:.1%} right")
    return figure


def grid(images: Tensor, columns: int = 8, scale: int = 6) -> Tensor:
    """Images (n, 1, 8, 8) beside and below each other, enlarged, with a grey frame: (height, width)."""
    enlarged = F.interpolate(images, scale_factor=scale).squeeze(1)
    padded = F.pad(enlarged, (1, 1, 1, 1), value=0.5)
    missing = -len(padded) % columns
    padded = torch.cat([padded, padded.new_zeros(missing, *padded.shape[1:])])
    rows = padded.unflatten(0, (-1, columns))
    return rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


class Shown:
    """Collects what validation predicts and shows it at the end of each; weights at the end of each epoch."""

    def __init__(self, rows: int = 32) -> None:
        self.rows = rows
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @ld.on_validation_start
    def forget(self) -> None:
        self.parts = []

    @ld.on_validation_batch_end
    def collect(self, batch, outputs) -> None:
        images, labels = batch
        self.parts.append((images.cpu(), labels.cpu(), outputs["logits"].softmax(1).cpu()))

    @ld.on_validation_end
    def show(self) -> None:
        images, labels, shares = (torch.cat(each) for each in zip(*self.parts, strict=True))
        sure, predictions = shares.max(1)
        ld.log_figure("val/confusion", confusion_figure(labels, predictions))
        wrong = (predictions != labels).nonzero().squeeze(1)
        if len(wrong):
            wrong = wrong[sure[wrong].argsort(descending=True)]  # the surest mistakes first
            ld.log_image("val/misread", grid(images[wrong[:32]]))
            ld.log_text("val/misread_as", "\n".join(f"- {labels[i]} read as {predictions[i]}" for i in wrong[:32]))
        first = slice(self.rows)
        columns = {"is": labels[first].tolist(), "read as": predictions[first].tolist()}
        shown = [round(share, 3) for share in sure[first].tolist()]
        ld.log_table("val/predictions", {"image": list(range(len(shown))), **columns, "sure": shown})

    @ld.on_train_epoch_end
    def weights(self, model) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                ld.log_histogram(f"weights/{name}", parameter)


class Logits(Digits):
    """`Digits`, with the logits among what a step returns: they are for events, and are not logged."""

    def step(self, batch):
        images, labels = batch
        logits = self(images)
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "acc": right, "logits": logits.detach()}


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, ld.Run]:
    """Train and show; returns the model and the run."""
    parser = argparse.ArgumentParser(description="Show what a classifier of digits does.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--logger", nargs="+", default=["tensorboard"], help="names, such as tensorboard wandb")
    parser.add_argument("--root-dir", default="runs", help="where the run's directory is made")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    train_loader, val_loader, _ = make_loaders()
    ld.seed_everything(SEED)
    model = Logits(options.epochs * len(train_loader))
    run = ld.fit(
        model,
        (train_loader, val_loader),
        max_epochs=options.epochs,
        seed=SEED,
        logger=options.logger,
        log_every_n_steps=10,
        log_gradients=True,
        callbacks=[Shown(), ld.LearningRateMonitor(), ld.SpikeDetection()],
        hparams={"model": "mlp", "epochs": options.epochs},
        root_dir=options.root_dir,
    )
    print(f"validation accuracy {run.metrics['val/acc']:.2%}; look with: tensorboard --logdir {options.root_dir}")
    return model, run


if __name__ == "__main__":
    main()
