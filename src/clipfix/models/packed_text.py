"""Text towers without padding: the tokens of all texts are packed into one sequence."""

from inspect import signature
from itertools import groupby
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:  # torch 2.11 and later: flash attention for sequences of different lengths, on a GPU
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "window_size" in signature(varlen_attn).parameters
except ImportError:
    HAS_VARLEN = False

# Texts whose lengths are in the same interval of STEP tokens share one padded call of attention, so a layer has at most
# 8 calls for 248 tokens. Measured: CPU time of ViT-B/32's text tower, forward and backward, 32 long and 32 short
# captions, best of 3: 17.9 s with 51 groups of equal length, 17.9 s with 8 (STEP 32), 18.2 s with 4 (64), 19.4 s with
# 2 (128), 21.7 s with one.
STEP = 32


class Group(NamedTuple):
    """`texts` consecutive texts of the pack, padded to `width` tokens for attention.

    `slots` [n] are the positions of their n tokens in the flattened, padded batch.
    """

    texts: int
    width: int
    slots: Tensor


class Offsets(NamedTuple):
    """The layout for variable-length attention.

    `starts` [b + 1], int32, has the first token of each text and the end of the last; `longest` is an upper bound of
    the lengths.
    """

    starts: Tensor
    longest: int


Layout = list[Group] | Offsets


def add_packed_method(blocks: Any, compiled: bool) -> None:
    """Add a method `packed` to each residual block of a text tower; `encode_packed` calls it.

    It is a method of the module so that FSDP2, which wraps forward methods, can wrap it too. With `compiled`, it is
    compiled for passes with gradients and variable-length attention. Padded groups are not compiled, because their
    shapes differ in every batch.
    """
    fast = torch.compile(packed_block, dynamic=True) if compiled else packed_block

    def packed(block: Any, x: Tensor, layout: Layout, only: Tensor | None) -> Tensor:
        function = fast if isinstance(layout, Offsets) and torch.is_grad_enabled() else packed_block
        return function(block, x, layout, only)

    for block in blocks:
        block.packed = MethodType(packed if compiled else packed_block, block)


def packed_block(block: Any, x: Float[Tensor, "t w"], layout: Layout, only: Tensor | None) -> Float[Tensor, "n w"]:
    """Return the output of one residual block, for the tokens with the indices `only`, or for all if it is None."""
    mixed = _attention(block.attn, block.ln_1(x), layout)
    if only is not None:
        x, mixed = x.index_select(0, only), mixed.index_select(0, only)
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def encode_packed(text: Any, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
    """Return the features of texts from open_clip's `TextTransformer`, computed without padding.

    The tower must have a causal mask and ordinary blocks (`ResidualAttentionBlock`), pool at the end token, which has
    the largest id, and project with a matrix. Tokens after the end token cannot change the feature, so only tokens up
    to it are packed, [t, width]. Attention is computed within each text: by torch's variable-length attention on a GPU
    in half precision, otherwise in padded groups of similar length. Blocks that have a method `packed`
    (`add_packed_method`) are run by it.

    Args:
        text: the text tower.
        tokens: token ids, one text in each row.

    Source: Patch n' Pack (arXiv 2307.06304) for the packing; grouping by length instead of masking is ours.
    """
    lengths = tokens.argmax(dim=1) + 1
    counts = lengths.tolist()  # the only synchronization with the device
    dtype = text.transformer.get_cast_dtype()
    in_one_call = _one_call(tokens, dtype, text.transformer.resblocks[0].attn)
    if in_one_call:
        order = torch.arange(len(tokens), device=tokens.device)
    else:
        order, counts = lengths.argsort(), sorted(counts)
    row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(lengths[order], output_size=sum(counts))
    ends = lengths[order].cumsum(0)
    position = torch.arange(len(row), device=tokens.device) - (ends - lengths[order])[row]
    starts = F.pad(ends, (1, 0)).int()
    layout: Layout = Offsets(starts, tokens.shape[1]) if in_one_call else _groups(counts, row, position)
    pooled = (ends - 1)[order.argsort()]  # the end token of each text in the pack, in the order of `tokens`

    x = text.token_embedding(tokens[order[row], position]).to(dtype)
    x = x + F.embedding(position, text.positional_embedding).to(dtype)
    blocks = text.transformer.resblocks
    for block in blocks:
        only = pooled if block is blocks[-1] else None
        run = getattr(block, "packed", None) or MethodType(packed_block, block)
        if text.transformer.grad_checkpointing:
            x = checkpoint(run, x, layout, only, use_reentrant=False)
        else:
            x = run(x, layout, only)
    return text.ln_final(x) @ text.text_projection


def _one_call(tokens: Tensor, dtype: torch.dtype, attn: nn.MultiheadAttention) -> bool:
    """Return whether `varlen_attn` supports this: half precision on a GPU, and a head size of flash attention."""
    if not (HAS_VARLEN and tokens.is_cuda):
        return False
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype in (torch.bfloat16, torch.float16) and attn.head_dim % 8 == 0 and attn.head_dim <= 128


def _groups(lengths: list[int], row: Int[Tensor, " t"], position: Int[Tensor, " t"]) -> list[Group]:
    """Return groups of texts of similar length.

    Args:
        lengths: length of each text, ascending.
        row: the text of each token of the pack.
        position: the position of each token in its text.
    """
    groups, text, token = [], 0, 0
    for _, similar in groupby(lengths, key=lambda length: (length - 1) // STEP):
        members = list(similar)
        part = slice(token, token + sum(members))
        slots = (row[part] - text) * members[-1] + position[part]
        groups.append(Group(len(members), members[-1], slots))
        text, token = text + len(members), part.stop
    return groups


def _attention(attn: nn.MultiheadAttention, x: Float[Tensor, "t w"], layout: Layout) -> Float[Tensor, "t w"]:
    """Return causal attention within each text, with heads concatenated, before the output projection.

    The padding of a group is on the right, where causal attention does not read it, so no group needs a mask.
    """
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    if isinstance(layout, Offsets):
        q, k, v = qkv.view(len(x), 3, attn.num_heads, attn.head_dim).unbind(1)
        starts, longest = layout
        mixed = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return mixed.reshape(len(x), -1)  # type: ignore[union-attr]
    parts = []
    for part, (texts, width, slots) in zip(qkv.split([len(g.slots) for g in layout]), layout, strict=True):
        padded = part.new_zeros(texts * width, part.shape[1]).index_copy(0, slots, part)
        q, k, v = padded.view(texts, width, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        parts.append(heads.transpose(1, 2).reshape(texts * width, -1).index_select(0, slots))
    return torch.cat(parts)
