"""Train, validate and test a small convolutional network on MNIST, with a data object of its own.

    python examples/mnist.py

torchvision downloads MNIST (12 MB) into `--data-dir`; without a network, `digits.py` trains on data that comes with
scikit-learn.
"""

import argparse
import socket
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

import lightdeco as ld

SEED = 0


class MNISTData:
    """60,000 images of 28 x 28 pixels to train and validate on, 10,000 to test on."""

    def __init__(self, folder: str = "data", batch_size: int = 128, num_val: int = 5000) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.num_val = num_val

    @ld.prepare_data
    def download(self) -> None:
        """Download once per machine, before any process reads; what is there already is left as it is."""
        MNIST(self.folder, train=True, download=True)

    @ld.setup
    def read(self, stage: str) -> None:
        """Read what the verb needs: `stage` is "fit", "validate", "test" or "predict"."""
        if stage in ("fit", "validate"):
            images, labels = self._tensors(train=True)
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
            train, val = order[self.num_val :], order[: self.num_val]
            self.train, self.val = TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])
        else:
            self.test = TensorDataset(*self._tensors(train=False))

    def _tensors(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        digits = MNIST(self.folder, train=train)
        return digits.data.unsqueeze(1).float().div(255), digits.targets

    @ld.train_dataloader
    def train_batches(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    @ld.val_dataloader
    def val_batches(self):
        return DataLoader(self.val, self.batch_size)

    @ld.test_dataloader
    def test_batches(self):
        return DataLoader(self.test, self.batch_size)

    @ld.predict_dataloader
    def predict_batches(self):
        return DataLoader(self.test.tensors[0], self.batch_size)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()]
        self.net = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(800, 10))

    def forward(self, images):
        return self.net(images)

    @ld.training_step
    @ld.validation_step
    @ld.test_step
    def step(self, batch):
        images, labels = batch
        logits = self(images)
        return {"loss": F.cross_entropy(logits, labels), "acc": (logits.argmax(1) == labels).float().mean()}

    @ld.predict_step
    def classify(self, images):
        return self(images).argmax(1)

    @ld.configure_optimizers
    def optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test and predict; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a small convolutional network on MNIST.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data-dir", default="data", help="where MNIST is, or is downloaded to")
    parser.add_argument("--root-dir", default="runs", help="where the run's directory is made")
    options = parser.parse_args(arguments)

    data = MNISTData(options.data_dir)
    socket.setdefaulttimeout(30)  # a server that does not answer is no download either
    try:
        data.download()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        print(f"MNIST could not be downloaded ({reason}); without a network, run examples/digits.py", file=sys.stderr)
        return 1

    ld.seed_everything(SEED)
    model = Net()
    run = ld.fit(model, data, max_epochs=options.epochs, seed=SEED, root_dir=options.root_dir)
    accuracy = ld.test(model, data, seed=SEED)["test/acc"]
    print(f"test accuracy {accuracy:.2%}; metrics and TensorBoard files are in {run.dir}")
    first = next(iter(ld.predict(model, data, seed=SEED)))
    print(f"the first ten test images show {first[:10].tolist()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
