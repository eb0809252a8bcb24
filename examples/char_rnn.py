"""Train a character model on Python's own help texts, by truncated backpropagation through time.

    python examples/char_rnn.py
    python examples/char_rnn.py --epochs 12 --length 40

Each batch holds the whole of a long stretch of text; `split_batch` cuts it into parts of `length` characters, each with
an update of its own, and the state of the GRU goes on from part to part as `carry`. The text ships with Python. It
prints a sample before and after.
"""

import argparse
import pydoc_data.topics
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightdeco as ld

SEED = 0
EPOCHS = 6
STREAMS = 16


def make_text(size: int = 60_000) -> str:
    """The help texts that come with Python, in a fixed order, as far as `size` characters; ASCII alone."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(character for character in text if character.isascii())[:size]


def make_batches(text: str, count: int = 4) -> tuple[list[Tensor], str]:
    """`count` batches of (STREAMS, length) indices of characters, and the alphabet."""
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    indices = torch.tensor([index[character] for character in text])
    length = len(indices) // (count * STREAMS)
    return list(indices[: count * STREAMS * length].view(count, STREAMS, length)), alphabet


class CharRnn(nn.Module):
    def __init__(self, alphabet: str, hidden: int = 128) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.embedding = nn.Embedding(len(alphabet), 32)
        self.gru = nn.GRU(32, hidden, batch_first=True)
        self.out = nn.Linear(hidden, len(alphabet))

    def forward(self, characters, state=None):
        found, state = self.gru(self.embedding(characters), state)
        return self.out(found), state

    @ld.training_step
    def step(self, part, carry):
        logits, state = self(part[:, :-1], carry)
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        return {"loss": loss, "weight": part[:, 1:].numel(), "carry": state}

    @ld.configure_optimizers
    def optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)

    @torch.no_grad()
    def sample(self, start: str = "The ", length: int = 200) -> str:
        """`length` characters that follow a beginning."""
        written, state = start, None
        characters = torch.tensor([[self.alphabet.index(character) for character in start]])
        for _ in range(length):
            logits, state = self(characters, state)
            characters = torch.multinomial((logits[:, -1] / 0.7).softmax(1), 1)
            written += self.alphabet[int(characters)]
        return written


def split(model: CharRnn, batch: Tensor, size: int) -> list[Tensor]:
    """Parts of `size` characters and the one that follows."""
    return [batch[:, i : i + size + 1] for i in range(0, batch.shape[1] - 1, size)]


def main(arguments: Sequence[str] | None = None) -> ld.Run:
    """Train, and print a sample before and after; returns the run."""
    parser = argparse.ArgumentParser(description="Train a character model on texts that come with Python.")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--length", type=int, default=64, help="characters in a part")
    parser.add_argument("--root-dir", default="runs", help="where the run's directory is made")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    batches, alphabet = make_batches(make_text())
    ld.seed_everything(SEED)
    model = CharRnn(alphabet)
    print(f"untrained: {model.sample(length=60)!r}")
    ld.attach(model, split_batch=ld.split_batch(size=options.length)(split))  # its size comes from the command line
    run = ld.fit(model, batches, max_epochs=options.epochs, seed=SEED, accelerator="cpu", root_dir=options.root_dir)
    losses = [record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record]
    print("loss of each epoch:", " ".join(f"{loss:.2f}" for loss in losses))
    print(model.sample())
    return run


if __name__ == "__main__":
    main()
