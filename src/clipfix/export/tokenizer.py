"""Tokenizers as files of transformers, with the same token ids as in training and scoring."""

import html
import json
import string
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ftfy import chardata
from tokenizers import Regex, normalizers

from clipfix.export.folder import Files
from clipfix.models.tokenizer import byte_pairs, clip_tokenizer

# Html names that occur in captions; open_clip decodes all 2,231.
ENTITIES = ("lt", "gt", "quot", "apos", "#39", "nbsp")


def clip_files(context_length: int, pad_token: str = "<|endoftext|>", cleaned: bool = True) -> Files:
    """Return CLIP's tokenizer, for transformers 4 and 5.

    With `cleaned`, tokenizer.json also cleans a text as open_clip does (`cleaning`), and names a class that reads the
    file unchanged: transformers 5 rebuilds a CLIPTokenizer without that part. Without `cleaned`, it is the CLIP
    tokenizer of transformers, which the pipelines of diffusers request by name.
    """
    tokenizer = clip_tokenizer(context_length, pad_token)
    vocab, merges = byte_pairs()
    named: Files = {
        "vocab.json": vocab,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n",
        "special_tokens_map.json": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": pad_token,
            "unk_token": "<|endoftext|>",
        },
    }
    # Old versions read the vocabulary from vocab.json and merges.txt, new ones from tokenizer.json.
    return named | _saved(tokenizer, cleaning() if cleaned else [], "lower" if cleaned else None)


def hub_files(tokenizer: Any, context_length: int, clean: str | None) -> Files:
    """Return a tokenizer that open_clip took from the hub (SigLIP's), with open_clip's cleaning of a text.

    `clean` is open_clip's name of the cleaning; None if the reader is open_clip, which cleans by itself.
    """
    tokenizer.model_max_length = context_length
    if clean is None:
        return _saved(tokenizer, [], None)
    steps = [*cleaning(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if clean == "canonicalize":
        punctuation = "".join("\\" + mark for mark in string.punctuation if mark != "_")
        steps.insert(len(cleaning()), normalizers.Replace("_", " "))
        steps.insert(len(cleaning()) + 1, normalizers.Replace(Regex(f"[{punctuation}]"), ""))
    if clean in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    return _saved(tokenizer, steps, clean)


def cleaning() -> list[Any]:
    """Return rules that clean a text as open_clip's `basic_clean` does (ftfy, then html), as far as fixed rules can.

    They straighten quotes, split ligatures, replace full-width characters, remove control characters, compose accents,
    decode common html names, and lower-case the last sigma of a Greek word as Python's lower() does.
    Departs: ftfy repairs a text with a wrong encoding (such as Ã© for é); these rules do not.
    """
    wide = {chr(code): text for code, text in chardata.WIDTH_MAP.items()}
    joined = {chr(code): text for code, text in chardata.LIGATURES.items()}
    control = "".join(f"\\x{{{code:04x}}}" for code in chardata.CONTROL_CHARS)
    return [
        normalizers.Replace(Regex("&(?:amp;)+"), "&"),
        *(normalizers.Replace(f"&{name};", html.unescape(f"&{name};")) for name in ENTITIES),
        *(normalizers.Replace(theirs, ours) for theirs, ours in (joined | wide).items()),
        normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'"),
        normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'),
        normalizers.Replace(Regex(f"[{control}]"), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),
    ]


def _saved(tokenizer: Any, steps: Sequence[Any], clean: str | None) -> Files:
    """Return the files of `save_pretrained`, with these steps before the tokenizer's own."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    if clean is None:
        return dict(saved)
    described = json.loads(saved["tokenizer.json"])
    own = described["normalizer"]
    first = json.loads(normalizers.Sequence(list(steps)).__getstate__())["normalizers"]
    later = [] if own is None else own["normalizers"] if own["type"] == "Sequence" else [own]
    described["normalizer"] = {"type": "Sequence", "normalizers": first + later}
    config = json.loads(saved["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return saved | {"tokenizer.json": json.dumps(described, ensure_ascii=False), "tokenizer_config.json": config}
