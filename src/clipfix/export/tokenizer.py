"""Tokenizers as files of transformers that give the ids that this model was trained and scored on."""

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

# What captions hold of html; open_clip unescapes all 2,231 names, of which these occur.
ENTITIES = ("lt", "gt", "quot", "apos", "#39", "nbsp")


def clip_files(context_length: int, pad_token: str = "<|endoftext|>", cleaned: bool = True) -> Files:
    """CLIP's tokenizer, for transformers old and new.

    With `cleaned`, tokenizer.json also does what open_clip does to a text first (`cleaning`), and names a class that
    reads the file as it is: transformers 5 rebuilds what it calls a CLIPTokenizer without looking at that part.
    Without, it is transformers' own CLIP tokenizer, which diffusers' pipelines ask for by name.
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
    # Old readers take the vocabulary from vocab.json and merges.txt, new ones from tokenizer.json.
    return named | _saved(tokenizer, cleaning() if cleaned else [], "lower" if cleaned else None)


def hub_files(tokenizer: Any, context_length: int, clean: str | None) -> Files:
    """A tokenizer that open_clip took from the hub (SigLIP's), with what open_clip does to a text before it.

    `clean` is open_clip's name for that, null where the reader is open_clip, which does it itself.
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
    """What open_clip's `basic_clean` does to a text (ftfy, then html), as far as rules without a dictionary can.

    Straight quotes, no ligatures, no wide characters, no control characters, composed accents, common html names, and
    a Greek word's last sigma, which Python's lower() tells from others and a lower-casing by character does not.
    Departs: a text that was decoded wrongly (as in Ã© for é) is mended by ftfy and not by these.
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
    """The files of `save_pretrained`, with more steps before the tokenizer's own."""
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
