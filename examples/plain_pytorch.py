"""The training of `digits.py` written by hand: plain PyTorch, bit for bit the same weights at the end.

    python examples/plain_pytorch.py

`lightdeco.seeds` gives the seeds of the order of the data and of each step; they are pure functions of a few
integers, so that any loop can repeat a run of lightdeco.
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightdeco import seeds

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


class PlainDigits(nn.Module):
    def __init__(self, kind: str = "mlp") -> None:
        super().__init__()
        self.net = make_net(kind)

    def forward(self, images):
        return self.net(shift(images) if self.training else images)


def train(model, train_loader, val_loader, epochs):
    steps = epochs * len(train_loader)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    step = 0
    for epoch in range(epochs):
        model.train()
        torch.manual_seed(seeds.order_seed(SEED, epoch))
        for images, labels in train_loader:
            torch.manual_seed(seeds.step_seed(SEED, 0, step))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
        loss, accuracy = evaluate(model, val_loader)
        print(f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.2%}")


def evaluate(model, loader):
    model.eval()
    loss = right = count = 0
    with torch.inference_mode():
        for images, labels in loader:
            logits = model(images)
            loss += F.cross_entropy(logits, labels).item() * len(labels)
            right += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss / count, right / count


def main(arguments: Sequence[str] | None = None) -> tuple[PlainDigits, float]:
    """Train and test; returns the model and the accuracy on the test images."""
    parser = argparse.ArgumentParser(description="Train a classifier on scikit-learn's digits, by hand.")
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # so small a net gains nothing from a second thread, and loses much on a busy machine
    train_loader, val_loader, test_loader = make_loaders()
    torch.manual_seed(SEED)
    model = PlainDigits(options.model)
    train(model, train_loader, val_loader, options.epochs)
    _, accuracy = evaluate(model, test_loader)
    print(f"test accuracy {accuracy:.2%}")
    return model, accuracy


if __name__ == "__main__":
    main()
