"""The generator against diffusers itself, from folders with random weights that diffusers and transformers wrote."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from clipfix import PACKAGE
from clipfix.models.diffusion import DTYPES, Diffusion, clip_tokenizer
from clipfix.models.patch_pca import PatchPCA

NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory) -> Path:
    """Stable Diffusion's layout and scheduler settings in miniature: 16 px pictures, 8 x 8 latents."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    UNet2DConditionModel(
        sample_size=8, cross_attention_dim=12, attention_head_dim=2, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        latent_channels=4, scaling_factor=0.18215, **blocks,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    text = CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    clip_tokenizer(77).save_pretrained(folder / "tokenizer")
    PNDMScheduler(**NOISE, prediction_type=request.param, skip_prk_steps=True, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def diffusion(folder) -> Diffusion:
    return Diffusion(str(folder))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# -- a folder of Stable Diffusion --------------------------------------------------------------------------------------


def test_sizes_are_read_from_the_folder(diffusion, folder):
    assert (diffusion.image_size, diffusion.condition_dim, diffusion.condition_tokens) == (16, 12, 77)
    assert (diffusion.num_timesteps, diffusion.prediction_type) == (1000, folder.name.rstrip("0"))


def test_latents_are_the_scaled_posterior_mean(diffusion, folder, generator):
    images = torch.rand(2, 3, 16, 16, generator=generator)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    latents = vae.encode(images * 2 - 1).latent_dist.mean * 0.18215
    torch.testing.assert_close(diffusion.encode(images), latents)
    torch.testing.assert_close(diffusion.decode(latents), (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1))


def test_pictures_of_another_size_are_resized(diffusion, generator):
    flat = torch.rand(1, 3, 1, 1, generator=generator)
    torch.testing.assert_close(
        diffusion.encode(flat.expand(1, 3, 40, 40)), diffusion.encode(flat.expand(1, 3, 16, 16)), atol=1e-5, rtol=1e-4
    )


def test_noise_and_target_follow_the_betas(diffusion, generator):
    """The forward process, term by term in float64."""
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for row, timestep in enumerate(timesteps.tolist()):
        kept = 1.0
        for beta in betas[: timestep + 1].tolist():
            kept *= 1 - beta
        signal, spread = kept**0.5, (1 - kept) ** 0.5
        noisy = signal * latents[row] + spread * noise[row]
        velocity = signal * noise[row] - spread * latents[row]
        target = noise[row] if diffusion.prediction_type == "epsilon" else velocity
        torch.testing.assert_close(diffusion.add_noise(latents, noise, timesteps)[row], noisy, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(diffusion.target(latents, noise, timesteps)[row], target, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [77, 3])
def test_prediction_is_the_unets(diffusion, folder, generator, tokens):
    noisy, condition = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, tokens, 12, generator=generator)
    timesteps = torch.tensor([3, 700])
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.testing.assert_close(diffusion.predict(noisy, timesteps, condition), unet(noisy, timesteps, condition).sample)


def test_weights_are_frozen_and_the_condition_gets_gradient(diffusion, generator):
    assert not diffusion.training
    noisy, condition = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 12, generator=generator)
    condition.requires_grad_(True)
    diffusion.predict(noisy, torch.tensor([3, 700]), condition).square().sum().backward()
    assert condition.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in diffusion.parameters())


def condition_gradient(diffusion: Diffusion, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction, and the gradient of its mean square for the condition: what feedback is made of."""
    generator = torch.Generator().manual_seed(0)
    side, channels = diffusion.unet.config.sample_size, diffusion.unet.config.in_channels
    noisy = torch.randn(rows, channels, side, side, generator=generator)
    condition = torch.randn(rows, 7, diffusion.condition_dim, generator=generator).requires_grad_()
    predicted = diffusion.predict(noisy, torch.linspace(3, 700, rows).long(), condition)
    predicted.square().mean().backward()
    return predicted.detach(), condition.grad


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_bf16_stays_near_fp32(folder, diffusion, generator):
    """bf16 has 8 bits: one rounding is at most 0.4 % off, and what a whole network adds up stays below 3 %."""
    half = Diffusion(str(folder), dtype="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    images, texts = torch.rand(2, 3, 16, 16, generator=generator), ["a red fish", ""]
    values = [
        (half.encode(images), diffusion.encode(images)),
        (half.condition(texts), diffusion.condition(texts)),
        *zip(condition_gradient(half), condition_gradient(diffusion), strict=True),
    ]
    for found, expected in values:
        assert found.dtype == torch.float32
        assert 0 < relative(found, expected) < 0.03


def test_shipped_generator_in_bf16_stays_near_fp32(generator):
    """Trained weights: latents within 1 %, predictions within 3 %, what a condition learns from them within 10 %."""
    half, full = (Diffusion(str(PACKAGE / "tiny/diffusion"), dtype=dtype) for dtype in ("bf16", "fp32"))
    images = torch.rand(2, 3, 48, 48, generator=generator)
    assert relative(half.encode(images), full.encode(images)) < 0.01
    prediction, gradient = map(relative, condition_gradient(half, 8), condition_gradient(full, 8))
    assert prediction < 0.03
    assert gradient < 0.1


def test_gpu_without_bf16_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ValueError, match=r"diffusion\.dtype is bf16, .* V100"):
        Diffusion(str(folder), dtype="bf16")


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bf16_where_the_device_computes_in_it(able, folder, monkeypatch):
    monkeypatch.setattr("clipfix.models.diffusion.has_bf16", lambda: able)
    assert {p.dtype for p in Diffusion(str(folder), dtype="auto").parameters()} == {DTYPES["bf16" if able else "fp32"]}


@pytest.mark.parametrize("switch", [pytest.param("compiled", marks=pytest.mark.slow), "checkpointing"])
def test_switches_for_time_and_memory_change_no_value(switch, folder, diffusion, monkeypatch):
    """Traced as in training but run by torch's own kernels: the C++ compiler takes minutes."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet, **how: compile(unet, backend="aot_eager", **how))
    switched = Diffusion(str(folder), **{switch: True})
    for found, expected in zip(condition_gradient(switched), condition_gradient(diffusion), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    assert not switched.unet.training  # no dropout wakes up


def test_checkpointing_keeps_less_for_the_backward_pass(folder, diffusion):
    kept = {}
    for name, model in {"plain": diffusion, "checkpointed": Diffusion(str(folder), checkpointing=True)}.items():
        kept[name], weights = 0, {p.data_ptr() for p in model.parameters()}

        def keep(tensor, name=name, weights=weights):
            kept[name] += 0 if tensor.data_ptr() in weights else tensor.numel()
            return tensor

        condition = torch.randn(2, 7, 12).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.predict(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), condition)
    assert kept["checkpointed"] < kept["plain"] / 2


def test_only_passes_with_a_gradient_are_compiled(folder, monkeypatch):
    traced = []
    compile = torch.nn.Module.compile

    def backend(graph, _):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet, **how: compile(unet, backend=backend, **how))
    diffusion = Diffusion(str(folder), compiled=True)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 12)
    with torch.no_grad():
        diffusion.predict(*inputs)
    assert not traced
    diffusion.predict(*inputs)
    assert traced


def test_latents_in_bf16_are_those_of_fp32_within_two_percent(diffusion, folder, generator):
    """Root mean square error over that of the latents. No graph is built of either."""
    images = torch.rand(8, 3, 16, 16, generator=generator)
    exact, found = diffusion.encode(images), Diffusion(str(folder), dtype="bf16").encode(images)
    assert 0 < (found - exact).square().mean().sqrt() < 0.02 * exact.std()
    assert not exact.requires_grad
    assert not found.requires_grad


def test_latents_are_known_by_all_that_they_depend_on(diffusion, folder, tmp_path):
    """Not by where the folder lies, nor by keys that a release of diffusers adds with their defaults."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "vae/config.json").read_text())

    def known(size=16, dtype="fp32", **changed):
        (tmp_path / "copy/vae/config.json").write_text(json.dumps(config | changed))
        return Diffusion(str(tmp_path / "copy"), dtype=dtype).latents_of(size)

    assert known() == diffusion.latents_of(16)
    assert known(_diffusers_version="9.9") == known()
    others = [known(17), known(dtype="bf16"), known(scaling_factor=0.2), known(norm_num_groups=2)]
    assert len({known(), *others}) == 5
    config.pop("scaling_factor"), config.pop("latents_mean")
    assert known(scaling_factor=0.18215) == known() != diffusion.latents_of(16)


@pytest.fixture
def pipeline(diffusion) -> StableDiffusionPipeline:
    parts = {name: getattr(diffusion, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    scheduler = DDIMScheduler.from_config(diffusion.scheduler.config)
    pipeline = StableDiffusionPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("text", ["", "a red fish facing left", "word " * 200])
def test_condition_is_the_pipelines(diffusion, pipeline, text):
    expected, _ = pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(diffusion.condition([text]), expected)


def test_samples_are_the_pipelines(diffusion, pipeline):
    texts = ["a red fish", "two blue stars"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = pipeline(texts, num_inference_steps=3, guidance_scale=4.0, latents=latents, output_type="pt").images
    told, null = diffusion.condition(texts), diffusion.condition([""])[0]
    images = diffusion.sample(told, null, steps=3, guidance=4.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)


# -- the tiny generator's own parts ------------------------------------------------------------------------------------


def test_pca_of_all_components_is_lossless(generator):
    images = torch.rand(50, 3, 8, 8, generator=generator) * 2 - 1
    vae = PatchPCA(patch_size=2, latent_channels=12, whitening=0.5)
    vae.fit(images)
    torch.testing.assert_close(vae.decode(vae.encode(images).latent_dist.mode()).sample, images, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_pca_latents_are_uncorrelated_with_the_variances_asked_for(generator, whitening):
    images = F.interpolate(torch.rand(50, 3, 4, 4, generator=generator), size=16, mode="bilinear") * 2 - 1
    vae = PatchPCA(patch_size=4, latent_channels=6, whitening=whitening)
    vae.fit(images)
    latents = vae.encode(images).latent_dist.mode().movedim(1, -1).reshape(-1, 6).double()
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    variances = torch.linalg.svdvals(patches - patches.mean(0))[:6] ** 2
    expected = variances ** (1 - whitening)
    torch.testing.assert_close(
        torch.cov(latents.T, correction=0), torch.diag(expected / expected.mean()), atol=1e-4, rtol=1e-3
    )


def test_tokens_are_open_clips():
    texts = ["A red Fish,   facing left; it's open!", "", "naïve café 3x3 <b>"]
    ours = clip_tokenizer(77)(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    for row, reference in zip(ours, open_clip.SimpleTokenizer()(texts), strict=True):
        end = int(reference.argmax()) + 1
        assert row[:end].tolist() == reference[:end].tolist()


def test_saved_folder_loads_as_it_was(generator_folder, generator, tmp_path):
    first = Diffusion(generator_folder)
    first.vae.fit(torch.rand(20, 3, 32, 32, generator=generator) * 2 - 1)
    first.save_pretrained(tmp_path, torch.float32)
    second = Diffusion(str(tmp_path))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    texts = ["a red fish", ""]
    torch.testing.assert_close(first.condition(texts), second.condition(texts), atol=0, rtol=0)
    assert second.image_size == 32
    for part in ("unet", "vae"):
        assert "_name_or_path" not in json.loads((tmp_path / part / "config.json").read_text())


def test_saved_text_encoder_has_the_keys_of_every_release(generator_folder):
    """Stable Diffusion's own spelling: what transformers 4 writes and reads, and transformers 5 still reads."""
    state = load_file(Path(generator_folder) / "text_encoder/model.safetensors")
    assert all(key.startswith("text_model.") for key in state)
    assert "text_model.embeddings.token_embedding.weight" in state
    _, told = CLIPTextModel.from_pretrained(generator_folder, subfolder="text_encoder", output_loading_info=True)
    assert not told["missing_keys"]


# -- what cannot be loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-model", "{empty}"])
def test_missing_model_names_the_key_that_takes_a_folder(path, tmp_path):
    with pytest.raises(ValueError, match=r"diffusion\.path"):
        Diffusion(path.format(empty=tmp_path))


def test_unknown_dtype_names_the_choices(folder):
    with pytest.raises(ValueError, match="choose auto, fp32 or bf16"):
        Diffusion(str(folder), dtype="fp16")


EDITS = [  # a file of the folder, what is changed in it, and what the user is told
    (
        "scheduler/scheduler_config",
        {"prediction_type": "sample"},
        r"diffusion\.path .* 'sample': .* epsilon or v_pred",
    ),
    ("text_encoder/config", {"hidden_size": 16}, r"diffusion\.path .* width 12, .* 16"),
    ("unet/config", {"cross_attention_dim": [12, 12]}, r"width \[12, 12\], .* 12"),
    ("vae/config", {"latent_channels": 16}, r"diffusion\.path .* 4 input and 4 output .* 16"),
    (
        "unet/config",
        {"in_channels": 9},
        r"diffusion\.path .* 9 input and 4 output",
    ),
    ("unet/config", {"out_channels": 8}, "4 input and 8 output"),
    (
        "unet/config",
        {"addition_embed_type": "text_time"},
        "addition_embed_type is 'text_time'.*Stable Diffusion 1.x or",
    ),
    ("unet/config", {"class_embed_type": "projection"}, "class_embed_type is 'projection'.*Stable Diffusion 1.x or"),
    ("unet/config", {"sample_size": [8, 16]}, r"diffusion\.path .* sample_size .* \[8, 16\]"),
    ("vae/config", {"_class_name": "AutoencoderTiny"}, "has a AutoencoderTiny: .* with PatchPCA or AutoencoderKL"),
]


@pytest.mark.parametrize(("file", "change", "message"), EDITS)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(file, change, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = (tmp_path / file).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        Diffusion(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_folder_without_a_part_is_refused_by_name(part, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path / part}.*diffusion\.path"):
        Diffusion(str(tmp_path))
