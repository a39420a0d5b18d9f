"""Low-rank adapters (LoRA) beside the linear layers of a tower, and merging them into its weights."""

import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # the name that peft gives the first adapter of a model


def add_lora(visual: nn.Module, rank: int, alpha: int) -> list[nn.Parameter]:
    """Add an adapter to every linear layer of a tower, in place, and return the parameters A and B of each.

    A layer then computes W + alpha / rank * B A. B starts at zero, so the outputs of the tower do not change.

    Args:
        visual: the tower.
        rank: rank of each adapter.
        alpha: the output of an adapter is multiplied by alpha / rank.

    Source: LoRA (arXiv 2106.09685), equation 3; the library peft.
    Departs: query, key and value are one matrix in open_clip and timm, and have one adapter together; the paper has
    separate matrices, each with an adapter. Convolutions have no adapter, and neither have weights without a layer
    (open_clip's projection to the joint space).
    """
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            visual.set_submodule(name, LinearAttention(module))
    linear = [name for name, module in visual.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear), visual, ADAPTER)
    return [parameter for name, parameter in visual.named_parameters() if ".lora_" in name]


class LinearAttention(nn.Module):
    """Self-attention with the weights of an `nn.MultiheadAttention`, as two linear layers that can have adapters.

    peft has a layer for nn.MultiheadAttention, but that layer adds the adapter to the frozen weights before a pass and
    subtracts it afterwards. Rounding would change the frozen weights, and a resumed run would not have that change.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        assert attention.batch_first
        assert attention.in_proj_weight is not None
        self.heads = attention.num_heads
        self.in_proj = nn.Linear(width, 3 * width, device="meta")  # the weights are assigned below
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
        """Return the attended values, and None instead of attention weights; a mask is added to the scores."""
        assert key is query is value
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.in_proj(query).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def merge_adapters(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` of `module`, with each adapter A, B merged into the weight of its layer.

    A merged weight has the name that it has in a module without adapters.
    """
    weights = dict(weights)
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (weights.pop(f"{name}.lora_{factor}.{ADAPTER}.weight") for factor in "AB")
            weight = f"{name}.weight".replace(".in_proj.weight", ".in_proj_weight")
            base = layer.get_base_layer().get_parameter("weight").detach().to(b.device)
            weights[weight] = base + layer.scaling[ADAPTER] * b @ a
    return weights
