"""What the benchmarks compare is what they say: sizes of the generator, and one loss by two roads."""

import diva
import pytest
import torch
from small import build


def test_sd21_base_has_the_published_sizes():
    with torch.device("meta"):
        unet, vae, text = diva.sd21()
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (unet, vae, text)]
    assert millions == pytest.approx([865.91, 83.65, 340.39], abs=0.01)


def test_plain_diva_has_the_loss_and_gradient_of_diva(clip_folder, generator_folder):
    fast = build("diva", clip_folder, generator_folder)
    plain = build("diva", clip_folder, generator_folder, _target_="diva.PlainDIVA")
    losses = [diva.stepper(method, rows=2, autocast=False)() for method in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(diva.gradient(fast), diva.gradient(plain), atol=1e-6, rtol=1e-3)
