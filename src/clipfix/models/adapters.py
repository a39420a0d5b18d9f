"""Which weights of a visual tower train: all of it, a named part, or low-rank adapters beside it (LoRA)."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # peft's own name for the only adapter of a model


def trained_parts(visual: Any, train: str, blocks: int | None, lora: dict[str, Any]) -> list[nn.Module | nn.Parameter]:
    """The whole tower; its layer norms; its last blocks with the final norm and projection; or adapters put into it."""
    if blocks is not None and train != "blocks":
        raise ValueError(f"method.train_blocks is {blocks}, but method.train is {train}: set method.train=blocks.")
    if train == "visual":
        return [visual]
    if train == "norms":
        return [module for module in visual.modules() if isinstance(module, nn.LayerNorm)]
    if train == "lora":
        return list(add_lora(visual, lora))
    layers = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if layers is None:
        raise ValueError(
            "method.train=blocks is for the vision transformers of open_clip's own (ViT-L-14-quickgelu, "
            f"ViT-H-14-quickgelu, ...), not for {type(visual).__name__}: choose method.train=visual, norms or lora."
        )
    if blocks is None or not 1 <= blocks <= len(layers):
        raise ValueError(f"method.train_blocks is {blocks}: train the last 1 to {len(layers)} blocks of this tower.")
    return [*layers[-blocks:], visual.ln_post, visual.proj]


# -- LoRA --------------------------------------------------------------------------------------------------------------


def add_lora(visual: nn.Module, lora: dict[str, Any]) -> list[nn.Parameter]:
    """Adapters beside every linear layer of the tower, in place: W + alpha / rank * B A, of which A and B train.

    B starts at zero, so the tower says what it said before.

    Source: LoRA (arXiv 2106.09685), equation 3, by the library peft.
    Departs: query, key and value, one matrix in open_clip and timm, share one adapter of that rank; the paper, on
    towers that keep them apart, gives each its own. Convolutions and what is no layer (open_clip's last projection to
    the joint space) have none.
    """
    rank, alpha = lora.get("rank"), lora.get("alpha")
    numbers = isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 and alpha > 0
    if not numbers or lora.keys() != {"rank", "alpha"}:
        raise ValueError(
            f"method.lora is {lora}: give rank, a whole number from 1, and alpha, above 0, and nothing else, as in "
            "'method.lora={rank: 16, alpha: 16}'."
        )
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            visual.set_submodule(name, LinearAttention(module))
    linear = [name for name, module in visual.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(
        LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=linear), visual, ADAPTER
    )
    return [parameter for name, parameter in visual.named_parameters() if ".lora_" in name]


class LinearAttention(nn.Module):
    """Self-attention of an `nn.MultiheadAttention`, with its very weights, as two linear layers that can be adapted.

    peft has a layer for nn.MultiheadAttention, but it adds the adapter to the frozen weights before a pass and
    subtracts it afterwards: rounding would let them drift, and a resumed run would miss that drift.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        assert attention.batch_first
        assert attention.in_proj_weight is not None
        self.heads = attention.num_heads
        self.in_proj = nn.Linear(width, 3 * width, device="meta")  # filled at once
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b n d"],
        value: Float[Tensor, "b n d"],
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b n d"], None]:
        assert key is query is value
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.in_proj(query).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def merged(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of `module` with each pair A, B merged into the weight beside it, under its name without adapters."""
    weights = dict(weights)
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (weights.pop(f"{name}.lora_{factor}.{ADAPTER}.weight") for factor in "AB")
            weight = f"{name}.weight".replace(".in_proj.weight", ".in_proj_weight")
            base = layer.get_base_layer().get_parameter("weight").detach().to(b.device)
            weights[weight] = base + layer.scaling[ADAPTER] * b @ a
    return weights
