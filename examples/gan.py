"""Train a small GAN on scikit-learn's digits: two nets, each with an optimizer and a schedule of its own.

    python examples/gan.py
    python examples/gan.py --form manual --epochs 50
    python examples/gan.py --devices 2          two processes, which share out the batches

Two forms of the same training, which end in the same weights: `Marked` has one training step for each optimizer,
`Manual` one step that drives both. It prints how well the generated images fill the pixels that real digits fill, and a
few of them as text.
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld

SEED = 0
EPOCHS = 40
NOISE = 16


def make_loader() -> DataLoader:
    """1,797 images of 8 x 8 pixels between -1 and 1, as rows of 64."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)
    return DataLoader(TensorDataset(images / 8 - 1), batch_size=64, shuffle=True)


class Gan(nn.Module):
    """The nets and their losses; the subclasses say how they are trained."""

    def __init__(self, total_epochs: int) -> None:
        super().__init__()
        self.total_epochs = total_epochs
        self.gen = nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
        self.disc = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1))

    def sample(self, count: int) -> Tensor:
        """`count` generated images, (count, 64)."""
        noise = torch.randn(count, NOISE, device=self.gen[0].weight.device)
        return self.gen(noise)

    def disc_loss(self, real: Tensor) -> Tensor:
        fake = self.sample(len(real)).detach()
        return F.softplus(-self.disc(real)).mean() + F.softplus(self.disc(fake)).mean()

    def gen_loss(self, real: Tensor) -> Tensor:
        return F.softplus(-self.disc(self.sample(len(real)))).mean()

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        gen = torch.optim.Adam(self.gen.parameters(), lr=1e-3, betas=(0.5, 0.999))
        return {"gen": gen, "disc": torch.optim.Adam(self.disc.parameters(), lr=5e-4, betas=(0.5, 0.999))}

    def decay(self, optimizer: torch.optim.Optimizer) -> LinearLR:
        return LinearLR(optimizer, 1.0, 0.1, total_iters=self.total_epochs)


class Marked(Gan):
    """One marked step for each optimizer; schedules by epoch."""

    @ld.training_step(optimizer="disc")
    def train_disc(self, batch):
        return self.disc_loss(batch[0])

    @ld.training_step(optimizer="gen")
    def train_gen(self, batch):
        return self.gen_loss(batch[0])

    @ld.configure_optimizers
    def optimizers(self):
        return {name: (optimizer, self.decay(optimizer)) for name, optimizer in self.make_optimizers().items()}


class Manual(Gan):
    """One step that does everything itself."""

    @ld.training_step(manual=True)
    def step(self, batch):
        losses = {}
        for name, loss_of in (("disc", self.disc_loss), ("gen", self.gen_loss)):
            optimizer = ld.optimizers()[name]
            losses[name] = loss_of(batch[0])
            optimizer.zero_grad()
            ld.backward(losses[name])
            ld.clip_gradients(optimizer)
            optimizer.step()
        return losses

    @ld.on_train_epoch_end
    def step_schedules(self):
        for scheduler in ld.schedulers().values():
            scheduler.step()

    @ld.configure_optimizers
    def optimizers(self):
        return {name: (optimizer, self.decay(optimizer)) for name, optimizer in self.make_optimizers().items()}


def show(images: Tensor) -> str:
    """Images of (n, 64) side by side, as text."""
    shades = " .:-=+*#"
    rows = ((images.clamp(-1, 0.99) + 1) * 4).long().view(-1, 8, 8)
    return "\n".join("  ".join("".join(shades[p] * 2 for p in image[y].tolist()) for image in rows) for y in range(8))


def main(arguments: Sequence[str] | None = None) -> tuple[Gan, ld.Run]:
    """Train, and show what was learnt; returns the model and the run."""
    parser = argparse.ArgumentParser(description="Train a GAN on scikit-learn's digits.")
    parser.add_argument("--form", choices=["marked", "manual"], default="marked")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--root-dir", default="runs", help="where the run's directory is made")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    loader = make_loader()
    ld.seed_everything(SEED)
    model = (Marked if options.form == "marked" else Manual)(options.epochs)
    settings = {"max_epochs": options.epochs, "devices": options.devices, "root_dir": options.root_dir}
    run = ld.fit(model, loader, seed=SEED, gradient_clip_val=5.0, **settings)
    ld.seed_everything(SEED)
    with torch.no_grad():
        fake = model.sample(500).cpu()
    real = loader.dataset.tensors[0]
    distance = (fake.mean(0) - real.mean(0)).abs().mean()
    print(show(fake[:6]))
    print(f"mean image: {distance:.3f} from the real one (an untrained net: about 0.5)")
    return model, run


if __name__ == "__main__":
    main()
