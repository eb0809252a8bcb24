"""Hyperparameters become plain values without secrets."""

import argparse
import enum
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from lightdeco.loggers.masking import is_secret, mask, mask_text

SECRET = re.findall(
    r"\S+",
    """
    api_key apiKey API_KEY api-key wandbApiKey token hf_token HF_TOKEN accessToken access-token
    password db_password secret client_secret credential credentials auth private_key privateKey
    ssh_key AWS_SECRET_ACCESS_KEY aws_access_key_id apikey passwd
""",
)
HARMLESS = re.findall(
    r"\S+",
    """
    max_tokens num_tokens token_count tokenizer vocab_tokens tokens maxTokens pad_token eos_token
    token_type author authors key keyboard monkey secretary passes lr compass
""",
)


@pytest.mark.parametrize("key", SECRET)
def test_key_that_names_a_secret_hides_its_text(key: str) -> None:
    """Every spelling of a key that names a secret hides a text, at the top and nested."""
    assert is_secret(key)
    assert mask({key: "abc", "outer": {key: "abc", "deeper": [{key: "abc"}]}}) == {
        key: "***",
        "outer": {key: "***", "deeper": [{key: "***"}]},
    }


@pytest.mark.parametrize("key", HARMLESS)
def test_key_that_names_no_secret_keeps_its_text(key: str) -> None:
    """Keys that only look like secrets keep their values."""
    assert not is_secret(key)
    assert mask({key: "abc"}) == {key: "abc"}


def test_numbers_are_no_secrets() -> None:
    """A number, a bool or None under a secret's key stays."""
    assert mask({"token": 3, "auth": True, "password": None}) == {"token": 3, "auth": True, "password": None}


def test_everything_textual_below_a_secret_key_is_hidden() -> None:
    """Texts in lists and dicts below a secret's key, and objects, are hidden too."""
    given = {"auth": ("me", "pw"), "credentials": {"user": "me", "tries": 3}, "api_keys": ["a"], "token": Path("x")}
    assert mask(given) == {
        "auth": ["***", "***"],
        "credentials": {"user": "***", "tries": 3},
        "api_keys": ["***"],
        "token": "***",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://me:p:w@host:5432/db", "postgres://***@host:5432/db"),
        ("https://host:8080/repo@v1", "https://host:8080/repo@v1"),
        ("git clone https://me:pw@host/r && echo", "git clone https://***@host/r && echo"),
        ("train.py --api-key xyz --lr 0.1", "train.py --api-key *** --lr 0.1"),
        ("train.py --token=xyz --lr 0.1", "train.py --token=*** --lr 0.1"),
        ("train.py --password 'a b' --lr 0.1", "train.py --password *** --lr 0.1"),
        ("train.py --auth --lr 0.1", "train.py --auth --lr 0.1"),
        ("train.py --max-tokens 5 tokens=3", "train.py --max-tokens 5 tokens=3"),
        ("WANDB_API_KEY=xyz python train.py", "WANDB_API_KEY=*** python train.py"),
        ("https://host/x?api_key=1&b=2", "https://host/x?api_key=***&b=2"),
        ('{"api_key": "xyz", "lr": 1}', '{"api_key": ***, "lr": 1}'),
        ("Authorization: Bearer abcdefgh", "Authorization: ***"),
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678", "***"),
        ("x ghp_AbCdEfGhIjKlMnOpQrStUvWxYz1234567890 y", "x *** y"),
        ("sk-proj-abc123def456ghi789", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("hf_transformers sk-learn task-1234567890 risk-abc123def456", None),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- end", "*** end"),
    ],
)
def test_secrets_inside_texts(text: str, expected: str | None) -> None:
    """Credentials in URLs, known kinds of tokens and values of secret options are hidden; nothing else is."""
    assert mask_text(text) == (text if expected is None else expected)
    assert mask({"command": text}) == {"command": text if expected is None else expected}


def test_secret_option_in_a_list_of_arguments() -> None:
    """The argument after a secret option in a list like sys.argv is hidden."""
    assert mask({"argv": ["t.py", "--api-key", "xyz", "--lr", "1", "--token", "--fast"]}) == {
        "argv": ["t.py", "--api-key", "***", "--lr", "1", "--token", "--fast"]
    }


def test_values_become_plain() -> None:
    """Whatever is given, the result is made of what JSON knows."""

    class Colour(enum.Enum):
        RED = "red"

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    given: Any = {
        "number": numpy.float32(0.5),
        "path": Path("/data"),
        "enum": Colour.RED,
        "tensor": torch.zeros(2, 3, dtype=torch.bfloat16),
        "module": nn.Linear(2, 3),
        "lazy": nn.LazyLinear(3),
        "class": torch.optim.Adam,
        "set": {1},
        "tuple": (1, (2,)),
        "dtype": torch.float16,
        "broken": Broken(),
        "namespace": argparse.Namespace(lr=1, api_key="abc"),
        4: None,
    }
    plain = mask(given)
    json.dumps(plain)
    assert plain == {
        "number": 0.5,
        "path": "/data",
        "enum": "red",
        "tensor": "Tensor(2, 3) bfloat16",
        "module": "Linear with 9 parameters",
        "lazy": "LazyLinear with 0 parameters",
        "class": "torch.optim.adam.Adam",
        "set": [1],
        "tuple": [1, [2]],
        "dtype": "torch.float16",
        "broken": "<Broken>",
        "namespace": "Namespace(lr=1, api_key=***)",
        "4": None,
    }


def test_a_list_that_holds_itself_ends() -> None:
    """A container that contains itself is cut off instead of recursing for ever."""
    endless: list[object] = []
    endless.append(endless)
    assert "…" in json.dumps(mask({"a": endless}), ensure_ascii=False)


def test_long_texts_of_objects_are_shortened_after_masking() -> None:
    """The text of an object is cut to 500 characters, and no part of a secret is left at the cut."""

    class Long:
        def __repr__(self) -> str:
            return "x" * 490 + " token=abcdefghijklmnop"

    (text,) = mask({"a": Long()}).values()
    assert isinstance(text, str)
    assert len(text) == 500
    assert "abc" not in text


def test_masking_a_long_text_is_fast() -> None:
    """A long text of one word takes linear time."""
    for word in ("token-", "sk-", "a.", "eyJ-", "http://"):
        text = word * 20_000
        started = time.perf_counter()
        assert mask_text(text) == text
        assert time.perf_counter() - started < 5, word
