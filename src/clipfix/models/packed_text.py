"""A causal text tower on real tokens alone: texts laid end to end, no padding except inside attention."""

from inspect import signature
from itertools import groupby
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:  # torch 2.11 and later; flash attention on texts of any lengths, on a GPU
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "window_size" in signature(varlen_attn).parameters
except ImportError:
    HAS_VARLEN = False

# Texts whose lengths fall into the same STEP tokens attend in one padded call: at most 8 calls a layer for 248 tokens.
# Processor time of ViT-B/32's text tower, forward and backward, 32 long and 32 short captions, best of 3: 17.9 s with
# 51 groups of equal length, 17.9 s with 8 (STEP 32), 18.2 s with 4 (64), 19.4 s with 2 (128), 21.7 s with one.
STEP = 32


class Group(NamedTuple):
    """`texts` neighbours in the pack, padded to `width` for attention; `slots` [n] is where each token goes there."""

    texts: int
    width: int
    slots: Tensor


class Ends(NamedTuple):
    """Where each text begins in the pack, and where the last ends: `starts` [b + 1], int32. No text is longer than
    `longest`."""

    starts: Tensor
    longest: int


Layout = list[Group] | Ends


def install(blocks: Any, compiled: bool) -> None:
    """Give each residual block of a text tower a method `packed`, which `encode_packed` then calls.

    A method of the module, so that whoever wraps forward passes (FSDP2) can wrap this one too. With `compiled`,
    torch.compile runs it where that pays: passes with gradients, on texts laid out for attention in one call; groups
    of other lengths would be compiled anew in every batch.
    """
    fast = torch.compile(packed_block, dynamic=True) if compiled else packed_block

    def packed(block: Any, x: Tensor, layout: Layout, only: Tensor | None) -> Tensor:
        function = fast if isinstance(layout, Ends) and torch.is_grad_enabled() else packed_block
        return function(block, x, layout, only)

    for block in blocks:
        block.packed = MethodType(packed if compiled else packed_block, block)


def packed_block(block: Any, x: Float[Tensor, "t w"], layout: Layout, only: Tensor | None) -> Float[Tensor, "n w"]:
    """One residual block; `only` names the tokens that are read afterwards, and the rest goes no further."""
    mixed = _attention(block.attn, block.ln_1(x), layout)
    if only is not None:
        x, mixed = x.index_select(0, only), mixed.index_select(0, only)
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def encode_packed(text: Any, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
    """Pooled and projected features of open_clip's `TextTransformer`: its own, without computing the padding.

    For a tower with a causal mask, ordinary blocks (`ResidualAttentionBlock`), pooled at the largest id, the end token,
    and projected by a matrix. Nothing behind that token can reach the feature, so only tokens up to it are laid out,
    [t, width]; attention alone sees texts apart: by torch's variable-length attention on a GPU in half precision, else
    in groups of similar length. Blocks run by their method `packed` where they have one (`install`).

    Source: Patch n' Pack (arXiv 2307.06304) for the packing; grouping by length instead of masking is ours.
    """
    lengths = tokens.argmax(dim=1) + 1
    known = lengths.tolist()  # the only wait for the device
    dtype = text.transformer.get_cast_dtype()
    in_one_call = _one_call(tokens, dtype, text.transformer.resblocks[0].attn)
    if in_one_call:
        order = torch.arange(len(tokens), device=tokens.device)
    else:
        order, known = lengths.argsort(), sorted(known)
    row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(lengths[order], output_size=sum(known))
    ends = lengths[order].cumsum(0)
    position = torch.arange(len(row), device=tokens.device) - (ends - lengths[order])[row]
    starts = F.pad(ends, (1, 0)).int()
    layout: Layout = Ends(starts, tokens.shape[1]) if in_one_call else _groups(known, row, position)
    pooled = (ends - 1)[order.argsort()]  # each text's end token in the pack, texts as they came

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
    """Whether `varlen_attn` computes this: in half precision on a GPU, for heads that flash attention takes."""
    if not (HAS_VARLEN and tokens.is_cuda):
        return False
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype in (torch.bfloat16, torch.float16) and attn.head_dim % 8 == 0 and attn.head_dim <= 128


def _groups(lengths: list[int], row: Int[Tensor, " t"], position: Int[Tensor, " t"]) -> list[Group]:
    """Texts of similar length, from sorted lengths and each token's text and place in it."""
    groups, text, token = [], 0, 0
    for _, similar in groupby(lengths, key=lambda length: (length - 1) // STEP):
        members = list(similar)
        part = slice(token, token + sum(members))
        slots = (row[part] - text) * members[-1] + position[part]
        groups.append(Group(len(members), members[-1], slots))
        text, token = text + len(members), part.stop
    return groups


def _attention(attn: nn.MultiheadAttention, x: Float[Tensor, "t w"], layout: Layout) -> Float[Tensor, "t w"]:
    """Causal attention within each text, heads joined, not yet projected.

    In a group padding lies to the right, where no real token looks, so no group needs a mask.
    """
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    if isinstance(layout, Ends):
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
