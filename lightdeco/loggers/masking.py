"""Hyperparameters as plain values, with everything that looks like a secret replaced by `"***"`."""

import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

MASK = "***"
_LONGEST = 500  # characters of the text of an object that is not a plain value
_DEEPEST = 20  # levels of lists and dicts; a container that holds itself ends here

# fmt: off
# Words of a key that make it a secret; "key" does so after one of _SECRET_KEYS.
_SECRET_WORDS = frozenset({"password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets", "token",
    "credential", "credentials", "auth", "authorization", "apikey", "apitoken", "authtoken", "accesskey",
    "accesstoken", "secretkey", "privatekey"})
_SECRET_KEYS = frozenset({"api", "private", "access", "secret", "signing", "encryption", "ssh", "account", "service"})
# Words beside "token" that make it a part of a vocabulary or of a network rather than a key to a service.
_BEFORE_TOKEN = frozenset({"pad", "eos", "bos", "unk", "sep", "cls", "mask", "class", "special", "image", "start",
    "end", "stop", "next", "prompt", "per", "num", "max", "min"})
_AFTER_TOKEN = frozenset({"count", "type", "dim", "size", "length", "embedding", "embeddings", "mixing", "mixer",
    "merging", "pooling", "dropout", "level", "classification"})
# fmt: on

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/:@]*:[^\s/]*@")
_VALUE = r"""(?P<value>"[^"]*"|'[^']*'|[^\s&;,'")\]}]+)"""
# Repetitions are bounded, so that a long text takes linear time.
# A key that may be secret, judged by is_secret(); other keys are passed over, with secrets further on in their values.
_KEY = r"(?P<key>[\w.-]{0,60}?(?:pass|pwd|secret|token|cred|auth|key)[\w.-]{0,60})"
_OPTION = re.compile(rf"(?P<before>(?<!\S)--?{_KEY}\s+)(?!-){_VALUE}", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"""(?P<before>(?<![\w.-]){_KEY}["']?\s*[=:]\s*)(?:(?:bearer|basic)\s+)?{_VALUE}""", re.IGNORECASE
)
_GIVEN = re.compile(r"(?P<key>--?[A-Za-z][\w.-]{0,100})=.*", re.DOTALL)  # a word of a command line
_BEARER = re.compile(r"(?P<before>\b[Bb]earer\s+)[\w.~+/=-]{8,}")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_RANDOM = r"(?:[A-Za-z0-9]{20,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,})"  # not "hf_transformers"
_TOKEN = re.compile(
    rf"(?<![A-Za-z0-9])(?:hf_{_RANDOM}|gh[pousr]_{_RANDOM}|github_pat_\w{{20,}}|glpat-[\w-]{{16,}}"
    r"|sk-(?=[\w-]{0,100}\d)[\w-]{8,}|(?:AKIA|ASIA)[0-9A-Z]{12,}|AIza[\w-]{30,}|xox[abeprs]-[\w-]{10,}"
    r"|eyJ[\w-]{10,500}\.[\w-]{10,}\.[\w-]*)"
)


def mask(hparams: Mapping[str, object]) -> dict[str, object]:
    """Plain values (numbers, strings, bools, None, lists, dicts) of `hparams`, without what looks like a secret.

    A value is replaced by `"***"` when its key names a secret (`api_key`, `dbPassword`, `hf-token`, … but not
    `max_tokens` or `pad_token`) and the value is no number. In every other string, URL credentials, well-known kinds
    of tokens and the values of secret command-line options are replaced. Tensors and modules become their type and
    shape, other objects a shortened text.

    >>> mask({"lr": 0.1, "api_key": "abc", "max_tokens": 5, "url": "http://me:pw@host/"})
    {'lr': 0.1, 'api_key': '***', 'max_tokens': 5, 'url': 'http://***@host/'}
    >>> mask({"command": "train.py --token=abc --lr 0.1"})
    {'command': 'train.py --token=*** --lr 0.1'}
    """
    return {str(key): _plain(value, is_secret(str(key)), 0) for key, value in hparams.items()}


def is_secret(key: str) -> bool:
    """Whether a key in snake, camel or kebab case names a secret.

    >>> is_secret("wandbApiKey"), is_secret("num_tokens"), is_secret("tokenizer"), is_secret("author")
    (True, False, False, False)
    """
    words = [""] + [word.lower() for word in _WORD.findall(key)] + [""]
    for before, word, after in zip(words, words[1:], words[2:], strict=False):
        if word == "token" and (before in _BEFORE_TOKEN or after in _AFTER_TOKEN):
            continue
        if word in _SECRET_WORDS or (word in ("key", "keys") and before in _SECRET_KEYS):
            return True
    return False


def mask_text(text: str) -> str:
    """`text` without URL credentials, well-known kinds of tokens and values of secret options.

    >>> mask_text("python train.py --api-key xyz --lr 1e-3 postgres://me:pw@host/db")
    'python train.py --api-key *** --lr 1e-3 postgres://***@host/db'
    """
    text = _PRIVATE_KEY.sub(MASK, text)
    text = _URL.sub(rf"\g<scheme>{MASK}@", text)
    text = _TOKEN.sub(MASK, text)
    text = _OPTION.sub(_hide, text)
    text = _ASSIGNED.sub(_hide, text)
    return _BEARER.sub(rf"\g<before>{MASK}", text)


def _hide(match: re.Match[str]) -> str:
    return match["before"] + MASK if is_secret(match["key"]) else match[0]


def _plain(value: object, secret: bool, depth: int) -> object:
    if isinstance(value, enum.Enum):
        return _plain(value.value, secret, depth)
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {str(k): _plain(v, secret or is_secret(str(k)), depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return _plain_list(list(value), secret, depth)
    if secret:
        return MASK
    return mask_text(value) if isinstance(value, str) else _describe(value)


def _plain_list(values: list[object], secret: bool, depth: int) -> list[object]:
    """The values of a list; one that follows a secret option, as in `["--token", "abc"]`, is masked."""
    result: list[object] = []
    follows = False
    for value in values:
        is_option = isinstance(value, str) and re.fullmatch(r"--?[A-Za-z][\w.-]*", value) is not None
        given = _GIVEN.fullmatch(value) if isinstance(value, str) else None
        if given is not None and is_secret(given["key"]):  # as a whole: it may hold spaces
            value = f"{given['key']}={MASK}"
        result.append(_plain(value, secret or (follows and not is_option), depth + 1))
        follows = is_option and is_secret(str(value))
    return result


def _describe(value: Any) -> str:
    """The text of an object that is no plain value: type and shape, a dotted name, a path, or its `repr`."""
    if isinstance(value, torch.Tensor | numpy.ndarray):
        return f"{type(value).__name__}{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__} with {sum(p.numel() for p in _sized(value))} parameters"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        text = str(value) if isinstance(value, Path | torch.dtype | torch.device) else repr(value)
    except Exception:  # a broken __repr__ of a hyperparameter must not end a training
        return f"<{type(value).__name__}>"
    text = mask_text(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _sized(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters whose shape is known already; those of lazy modules are not."""
    return [p for p in module.parameters() if not isinstance(p, torch.nn.parameter.UninitializedParameter)]
