"""Interpolation of the position tables of text towers to longer texts."""

import torch
from jaxtyping import Float
from torch import Tensor


def stretch(table: Float[Tensor, "n d"], keep: int, ratio: int) -> Float[Tensor, "m d"]:
    """Return a longer table: the first rows unchanged, the others interpolated linearly.

    After row `keep` - 1, each row is followed by `ratio` - 1 rows between it and the next one; after the last row, the
    line from the row before it is continued. n rows become keep + ratio (n - keep): 77 rows with keep 20 and ratio 4
    become 248. Texts of at most `keep` tokens get the same positions as before.

    Args:
        table: position embeddings, one row for each token.
        keep: number of rows that are copied unchanged.
        ratio: rows for each remaining row; 1 returns a copy of the table.

    Raises:
        ValueError: if `ratio` is below 1, `keep` is negative, or fewer than 2 rows remain to be interpolated.

    Source: Long-CLIP (arXiv 2403.15378), section 3.1 "knowledge-preserved stretching".
    """
    rows = len(table)
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}: set it to 1 or more.")
    most = rows if ratio == 1 else rows - 2
    if not 0 <= keep <= most:
        raise ValueError(f"keep is {keep}: set it between 0 and {most}, because the table has {rows} rows.")
    if ratio == 1:
        return table.clone()
    first, last = table[keep:], table[-1:]
    following = torch.cat([table[keep + 1 :], last + (last - table[-2:-1])])
    steps = torch.arange(ratio, device=table.device, dtype=table.dtype) / ratio
    between = torch.lerp(first[:, None], following[:, None], steps[:, None])
    return torch.cat([table[:keep], between.flatten(0, 1)])
