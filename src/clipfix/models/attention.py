"""Self-attention on a GPU without the copies that `nn.MultiheadAttention` makes."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.MultiheadAttention):
    """A faster `nn.MultiheadAttention` for GPUs, with the same weights, parameter names and values.

    torch's class transposes batch and sequence and copies queries, keys and values: three copies of the activations in
    each layer, which flash attention does not need. Calls that are not plain self-attention (keys that differ from
    queries, attention weights, padding), and calls on a CPU, use torch's implementation.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Change the class of every plain batch-first `nn.MultiheadAttention` in a module to this one, in place."""
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
        """Return the attended values [b, n, width] and None; arguments are those of `nn.MultiheadAttention`."""
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
