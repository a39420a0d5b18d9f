"""Training a generator: the loss row by row, what is dropped and joined, and the folder it leaves."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import batch, build
from torch.utils.data import DataLoader

from clipfix.methods.denoise import Denoise, join_captions
from clipfix.models.diffusion import Diffusion
from clipfix.results.pictures.denoise import Samples


def hearing(clip_folder: str, generator_folder: str, **overrides: object) -> Denoise:
    """The method on a generator whose words differ: a blank one's embeddings are all zero."""
    method = build("denoise", clip_folder, generator_folder, **overrides)
    torch.nn.init.normal_(method.diffusion.text_encoder.get_input_embeddings().weight)
    return method


def test_generator_trains_and_nothing_else(clip_folder, generator_folder):
    method = build("denoise", clip_folder, generator_folder)
    parts = {".".join(name.split(".")[:2]) for name, p in method.named_parameters() if p.requires_grad}
    assert parts == {"diffusion.unet", "diffusion.text_encoder"}


@pytest.mark.parametrize("text_dropout", [0.0, 0.5, 1.0])
def test_loss_is_the_mean_error_of_single_pictures(clip_folder, generator_folder, text_dropout):
    method, inputs = hearing(clip_folder, generator_folder, text_dropout=text_dropout), batch(6)
    diffusion = method.diffusion
    method.seed_draws(0)
    loss = method.loss(inputs)["denoising"]

    method.seed_draws(0)
    dropped = torch.rand(6, generator=method.ranks.generator) < text_dropout
    assert 0 < dropped.sum() < 6 or text_dropout != 0.5
    noise = torch.randn(6, 4, 8, 8, generator=method.ranks.generator)
    timesteps = torch.randint(0, 1000, (6,), generator=method.ranks.generator)
    errors = []
    for row in range(6):
        latent = diffusion.encode(inputs["image"][row : row + 1])
        kept = diffusion.scheduler.alphas_cumprod[timesteps[row]]
        noisy = kept**0.5 * latent + (1 - kept) ** 0.5 * noise[row]
        text = "" if dropped[row] else inputs["caption"][row]
        predicted = diffusion.predict(noisy, timesteps[row : row + 1], diffusion.condition([text]))
        errors.append((predicted - noise[row]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


def test_stored_latents_are_denoised_where_the_autoencoder_stays(clip_folder, generator_folder):
    method, inputs = hearing(clip_folder, generator_folder, fit_autoencoder=False), batch(4)
    assert method.needs.latents() == method.diffusion.latents_of(32)
    assert build("denoise", clip_folder, generator_folder, fit_autoencoder=True).needs.latents is None
    losses = []
    for latents in ({}, {"latents": method.diffusion.encode(inputs["image"])}, {"latents": torch.zeros(4, 4, 8, 8)}):
        method.seed_draws(0)
        losses.append(method.loss(inputs | latents)["denoising"].item())
    assert losses[0] == losses[1] != losses[2]


def test_several_texts_of_a_picture_become_one():
    texts = ["a red fish", "a fish on the left", "a blue star", "a star at the top"]
    assert join_captions({"image": torch.zeros(2, 3, 4, 4), "caption": texts}) == [
        "a red fish. a fish on the left",
        "a blue star. a star at the top",
    ]


def test_validation_compares_right_null_and_shuffled_text(clip_folder, generator_folder, monkeypatch):
    method, inputs = hearing(clip_folder, generator_folder, check_timesteps=[200, 700]), batch(4)
    logged = {}
    monkeypatch.setattr(method, "log", lambda name, value, **_: logged.update({name: value.item()}))
    method.validation_step(inputs, 0)
    assert set(logged) == {f"val/t{t}_{name}" for t in (200, 700) for name in ("right", "null", "shuffled")}
    assert len(set(logged.values())) == 6

    first = dict(logged)
    method.validation_step({**inputs, "caption": inputs["caption"][-1:] + inputs["caption"][:-1]}, 0)
    assert logged["val/t200_right"] == pytest.approx(first["val/t200_shuffled"], rel=1e-4)
    assert logged["val/t200_null"] == first["val/t200_null"]
    method.validation_step({**inputs, "caption": [""] * 4}, 0)
    assert logged["val/t700_right"] == pytest.approx(first["val/t700_null"], rel=1e-4)


def test_run_fits_the_autoencoder_and_leaves_a_folder_that_loads(clip_folder, generator_folder, tmp_path):
    method = build("denoise", clip_folder, generator_folder, fit_autoencoder=True)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False,
        callbacks=[ModelCheckpoint(tmp_path), Samples(str(tmp_path), count=3, steps=2, guidance=3.0)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = DataLoader([batch(8, seed) for seed in range(2)], batch_size=None)
    trainer.fit(method, batches, batches)
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    shipped = Diffusion(str(tmp_path / "diffusion"))
    images = batch(8)["image"]
    latents = method.diffusion.encode(images)
    variances = latents.var((0, 2, 3), correction=0)
    torch.testing.assert_close(
        variances, torch.ones_like(variances), atol=1e-2, rtol=0
    )  # the folder asks for whitening
    torch.testing.assert_close(shipped.encode(images), latents, atol=0.05, rtol=0)  # written in fp16
    inputs = latents, torch.full((8,), 500), method.diffusion.condition(["a red fish"] * 8)
    torch.testing.assert_close(shipped.predict(*inputs), method.diffusion.predict(*inputs), atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_compiled_unet_gives_the_plain_loss(clip_folder, generator_folder, monkeypatch):
    """Traced as in training but run by torch's own kernels: the C++ compiler takes minutes."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet, **how: compile(unet, backend="aot_eager", **how))
    losses = []
    for compiled in (False, True):
        method, inputs = hearing(clip_folder, generator_folder, compiled=compiled), batch(4)
        method.seed_draws(0)
        losses.append(loss := method.loss(inputs)["denoising"])
        loss.backward()
        losses.append(method.diffusion.unet.conv_in.weight.grad)
    torch.testing.assert_close(losses[2:], losses[:2])
