"""Tokenization of texts for a text tower, and CLIP's tokenizer as an object of transformers."""

import gzip
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from itertools import compress
from typing import Any

import torch.nn.functional as F
from jaxtyping import Int
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer


class Tokens:
    """Converts texts to token ids of one length. It holds no model, so the loader's workers can use a copy.

    Args:
        tokenizer: open_clip's tokenizer of the text tower, `(texts, context_length) -> ids`.
        context_length: number of tokens that the tower reads. Longer texts are cut; their end token is kept, if the
            tokenizer has one.
    """

    def __init__(self, tokenizer: Callable[[list[str], int], Tensor], context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.padding = int(tokenizer([""], context_length)[0, -1])  # the id that fills the context after a text

    def __call__(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return ids padded to the context length; `at_most` first cuts each text to that number of tokens."""
        tokens = self.tokenizer(texts, min(at_most or self.context_length, self.context_length))
        return F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self.padding)

    def cut_share(self, texts: list[str], tokens: Int[Tensor, "b l"]) -> float:
        """Return the fraction of `texts`, of which `tokens` are the ids, that did not fit the context."""
        full = (tokens[:, -1] != self.padding).tolist()  # only these can be longer than the context
        if not any(full):
            return 0.0
        longer = self.tokenizer(list(compress(texts, full)), self.context_length + 1)
        return int((longer[:, -1] != self.padding).sum()) / len(texts)


class TokenizeBatch:
    """Adds the token ids of each named text as `batch[key][name]`. For `Needs.encode`, in the loader's workers.

    Args:
        tokens: the tokenizer.
        names: names of the texts.
        key: entry of the batch for the token ids.
        count_cut: also add `batch["cut"][name]`, the fraction of texts that did not fit the context.
    """

    def __init__(self, tokens: Tokens, names: tuple[str, ...], key: str = "tokens", count_cut: bool = False) -> None:
        self.tokens, self.names, self.key, self.count_cut = tokens, names, key, count_cut

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        ids = {name: self.tokens(batch[name]) for name in self.names}
        added: dict[str, Any] = {self.key: ids}
        if self.count_cut:
            added["cut"] = {name: self.tokens.cut_share(batch[name], rows) for name, rows in ids.items()}
        return added


@cache
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's vocabulary and merges in the form of transformers, from the merges file of open_clip.

    The order is that of OpenAI's release: 256 byte symbols, the same symbols at the end of a word, one piece for each
    merge, the start and the end token.
    """
    packed = files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    symbols = sorted(ByteLevel.alphabet())
    pieces = symbols + [s + "</w>" for s in symbols] + ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return vocab, merges


def clip_tokenizer(context_length: int, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer as an object of transformers, without a download; it cuts texts to `context_length`."""
    vocab, merges = byte_pairs()
    pairs: Any = merges  # its type annotation has no pairs, but its docstring and code do
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=context_length, pad_token=pad_token)
