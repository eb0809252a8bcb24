"""`python -m lightdeco.checkpoint PATH`: show what is at PATH; exit code 0 if all of it is valid, else 1."""

import argparse
from pathlib import Path

from .describe import describe


def main() -> int:
    """Print the description of the path on the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightdeco.checkpoint", description="Show and verify checkpoints.")
    parser.add_argument("path", type=Path, help="a checkpoint, a folder of checkpoints, or a run's directory")
    text, valid = describe(parser.parse_args().path)
    print(text)
    return 0 if valid else 1


if __name__ == "__main__":
    raise SystemExit(main())
