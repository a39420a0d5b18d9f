"""Token ids of texts: as a text tower reads them, and CLIP's own tokenizer as transformers reads it."""

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
    """Turns texts into token ids of one length. It holds no model, so a loader's worker can hold a copy.

    Args:
        tokenizer: open_clip's tokenizer of the text tower, `(texts, context_length) -> ids`.
        context_length: tokens that the tower reads; longer texts are cut, and keep their end token as far as the
            tokenizer gives one.
    """

    def __init__(self, tokenizer: Callable[[list[str], int], Tensor], context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.padding = int(tokenizer([""], context_length)[0, -1])  # fills the context behind a text

    def __call__(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return ids padded to the context length; `at_most` cuts each text after so many tokens before that."""
        tokens = self.tokenizer(texts, min(at_most or self.context_length, self.context_length))
        return F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self.padding)

    def cut_share(self, texts: list[str], tokens: Int[Tensor, "b l"]) -> float:
        """Return the share of the texts, tokenized as `tokens`, that did not fit the context."""
        full = (tokens[:, -1] != self.padding).tolist()  # only these need a second look
        if not any(full):
            return 0.0
        longer = self.tokenizer(list(compress(texts, full)), self.context_length + 1)
        return int((longer[:, -1] != self.padding).sum()) / len(texts)


class TokenizeBatch:
    """Adds `batch[key][name]`, the token ids of each named text. For `Needs.encode`: it runs in the loader's workers.

    With `count_cut`, `batch["cut"][name]` is the share of texts that did not fit the context.
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
