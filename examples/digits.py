"""Train, validate and test a small classifier on scikit-learn's digits: 1,797 real scans of 8 x 8 pixels.

    python examples/digits.py
    python examples/digits.py --model cnn --epochs 20

It prints the accuracy on the test images and leaves TensorBoard files, `metrics.jsonl` and a picture of the curves in
the run's directory. `plain_pytorch.py` is the same training written by hand; both end in the same weights.
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld

SEED = 0
EPOCHS = 30


def make_loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """1,197 images to train on, 300 to validate on and 300 to test on; the split is always the same."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    train, val, test = (TensorDataset(images[part], labels[part]) for part in order.split([1197, 300, 300]))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=300), DataLoader(test, 300)


def shift(images: Tensor) -> Tensor:
    """Move each image by up to one pixel, in a direction of its own: (n, 1, 8, 8) to (n, 1, 8, 8)."""
    padded = F.pad(images, (1, 1, 1, 1)).squeeze(1)
    down, right = torch.randint(0, 3, (2, len(images), 1), device=images.device)
    pixels = torch.arange(8, device=images.device)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return padded[image, (pixels + down).unsqueeze(2), (pixels + right).unsqueeze(1)].unsqueeze(1)


def make_net(kind: str = "mlp") -> nn.Sequential:
    """A classifier of (n, 1, 8, 8) images: "mlp" has three linear layers, "cnn" two convolutions before its last."""
    if kind == "cnn":
        features = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, 10))
    hidden = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Dropout(0.1), nn.Linear(512, 10))


class Digits(nn.Module):
    def __init__(self, total_steps: int, kind: str = "mlp") -> None:
        super().__init__()
        self.total_steps = total_steps
        self.net = make_net(kind)

    def forward(self, images):
        return self.net(shift(images) if self.training else images)

    @ld.training_step
    @ld.validation_step
    @ld.test_step
    def step(self, batch):
        images, labels = batch
        logits = self(images)
        right = logits.argmax(1) == labels
        return {"loss": F.cross_entropy(logits, labels), "acc": right.float().mean()}

    @ld.configure_optimizers
    def optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = OneCycleLR(optimizer, max_lr=5e-3, total_steps=self.total_steps)
        return ld.Optim(optimizer, scheduler, interval="step")


def main(arguments: Sequence[str] | None = None) -> tuple[ld.Run, float]:
    """Train, plot and test; returns the run and the accuracy on the test images."""
    parser = argparse.ArgumentParser(description="Train a classifier on scikit-learn's digits.")
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--root-dir", default="runs", help="where the run's directory is made")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # so small a net gains nothing from a second thread, and loses much on a busy machine
    train_loader, val_loader, test_loader = make_loaders()
    ld.seed_everything(SEED)
    model = Digits(options.epochs * len(train_loader), options.model)
    run = ld.fit(model, (train_loader, val_loader), max_epochs=options.epochs, seed=SEED, root_dir=options.root_dir)
    run.plot(run.dir / "curves.png")
    accuracy = ld.test(model, test_loader, seed=SEED)["test/acc"]
    print(f"test accuracy {accuracy:.2%}; curves, metrics and TensorBoard files are in {run.dir}")
    return run, accuracy


if __name__ == "__main__":
    main()
