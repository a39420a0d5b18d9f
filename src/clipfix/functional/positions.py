"""Position tables of text towers, made longer."""

import torch
from jaxtyping import Float
from torch import Tensor


def stretch(table: Float[Tensor, "n d"], keep: int, ratio: int) -> Float[Tensor, "m d"]:
    """A longer table: the first `keep` rows as they are, of every other row `ratio` on the line to the next one.

    n rows become keep + ratio (n - keep). The last row has no next; its line goes on as the one before it. Text within
    the kept rows reads as before, bit for bit; ratio 1 changes nothing. 77 rows, keep 20, ratio 4 make 248.

    Source: Long-CLIP (arXiv 2403.15378), section 3.1 "knowledge-preserved stretching".
    """
    rows = len(table)
    if ratio < 1 or not 0 <= keep <= rows or (ratio > 1 and rows - keep < 2):
        raise ValueError(
            f"A table of {rows} rows cannot keep {keep} and stretch the rest {ratio} times: set method.keep_tokens to "
            f"at most {rows - 2} and method.ratio to 1 or more."
        )
    if ratio == 1:
        return table.clone()
    first, last = table[keep:], table[-1:]
    following = torch.cat([table[keep + 1 :], last + (last - table[-2:-1])])
    shares = torch.arange(ratio, device=table.device, dtype=table.dtype) / ratio
    between = torch.lerp(first[:, None], following[:, None], shares[:, None])
    return torch.cat([table[:keep], between.flatten(0, 1)])
