"""open_clip's self-attention without the copies that `nn.MultiheadAttention` makes around it, on a GPU."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with the same weights, names and values, faster on a GPU.

    torch's own swaps batch and sequence and lays queries, keys and values out anew: three copies a layer of all that
    passes through, which flash attention does not need. A call that is not plain self-attention (other keys than
    queries, weights asked for, padding), or not on a GPU, goes to torch's own.
    """

    @classmethod
    def take_over(cls, module: nn.Module) -> None:
        """Turn every plain batch-first `nn.MultiheadAttention` below a module into this class, weights unchanged."""
        for part in module.modules():
            plain = type(part) is nn.MultiheadAttention and part.batch_first and part.in_proj_weight is not None
            if plain and not (part.dropout or part.bias_k is not None or part.add_zero_attn):
                part.__class__ = cls

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values, shape [b, n, width] as `query`, and None; a mask is added to the scores."""
        plain = query is key and key is value and query.is_cuda and query.ndim == 3 and not need_weights
        additive = attn_mask is None or (attn_mask.ndim == 2 and attn_mask.is_floating_point())
        if not (plain and additive) or key_padding_mask is not None or is_causal:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        rows, length, width = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask if attn_mask is None else attn_mask.to(q))
        return self.out_proj(mixed.transpose(1, 2).reshape(rows, length, width)), None
