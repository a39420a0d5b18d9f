"""CLIP's tokenizer as transformers reads it, from the merges that open_clip ships."""

import gzip
from functools import cache
from importlib.resources import files
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


@cache
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges as transformers spells them, from the merges file that open_clip ships.

    The order is that of OpenAI's release: 256 byte symbols, the same as word ends, one word piece a merge, two marks.
    """
    packed = files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    symbols = sorted(ByteLevel.alphabet())
    pieces = symbols + [s + "</w>" for s in symbols] + ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return vocab, merges


def clip_tokenizer(context_length: int, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Tokens of CLIP's vocabulary, as many as `context_length` marks included; transformers' reader, no download."""
    vocab, merges = byte_pairs()
    pairs: Any = merges  # its signature knows no pairs, its docstring and code do
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=context_length, pad_token=pad_token)
