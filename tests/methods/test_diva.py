"""DIVA against a line-by-line slow version on a real small U-Net, and its token rules against loops."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from hydra.errors import InstantiationException
from small import batch, build

from clipfix.methods.diva import PATCH_RULES, average_patches, condition_from_tokens, random_patches, share_of_patches

RULES = [
    ("none", None, "mean"),
    ("all", None, "mean"),
    ("random", 7, "tokenwise"),
    ("share", 0.5, "mean"),
    ("average", 2, "mean"),
]


def cpu_draw(sampler, *args, rows, shape=()):
    return sampler(*args, (rows, *shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_equals_a_slow_version(prediction_type, clip_folder, generator_folder):
    """One image, one draw at a time, in the paper's order, with diffusers' own parts."""
    method = build("diva", clip_folder, generator_folder, patches="all", patch_amount=None, null_text="mean")
    diffusion, inputs, rows = method.diffusion, batch(3), 3
    diffusion.prediction_type = prediction_type
    method.seed_draws(0)
    loss = method.loss(inputs)["denoising"]

    unet = UNet2DConditionModel.from_pretrained(generator_folder, subfolder="unet").eval()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    method.seed_draws(0)  # the same draws, in the same order
    noise = torch.randn(rows, method.draws, 4, 8, 8, generator=method.generator)
    timesteps = torch.randint(0, 1000, (rows, method.draws), generator=method.generator)
    total = 0.0
    with torch.no_grad():
        null = diffusion.condition([""])[0].mean(0)
        for i in range(rows):
            image = inputs["image"][i : i + 1]
            latent = diffusion.vae.encode(2 * image - 1).latent_dist.mode() * diffusion.vae.config.scaling_factor
            pooled, patches = method.backbone.visual_tokens(image)
            tokens = torch.stack([pooled[0], *patches[0]]) @ method.visual_proj.weight.T + method.visual_proj.bias
            for d in range(method.draws):
                t, e = timesteps[i, d], noise[i, d]
                a, s = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
                predicted = unet(a * latent + s * e, t, encoder_hidden_states=(tokens + null)[None]).sample[0]
                target = e if prediction_type == "epsilon" else a * e - s * latent[0]
                total += float(((predicted - target) ** 2).mean()) / (rows * method.draws)
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_draws_weigh_the_same(clip_folder, generator_folder):
    """Two draws in one pass have the gradient of the mean of two passes of one draw each."""
    method = build("diva", clip_folder, generator_folder, patches="none", patch_amount=None, null_text="mean")
    inputs, generator = batch(2), torch.Generator().manual_seed(3)
    noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (2, 2), generator=generator)

    def gradient(columns):
        queue = [noise[:, columns], timesteps[:, columns]]
        method.draw = lambda *_, **__: queue.pop(0)  # noise, then timesteps
        method.draws = len(columns)
        method.zero_grad()
        method.loss(inputs)["denoising"].backward()
        return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient([0, 1]), (gradient([0]) + gradient([1])) / 2, atol=1e-6, rtol=1e-4)


def test_only_visual_tower_and_projection_train(clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder)
    assert {name.split(".")[0] for name in method.trained_names()} == {"backbone", "visual_proj"}
    assert all(".visual." in name or name.startswith("visual_proj.") for name in method.trained_names())


@pytest.mark.parametrize(("patches", "amount", "null_text"), RULES)
def test_every_token_rule_gives_a_condition(patches, amount, null_text, clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder, patches=patches, patch_amount=amount, null_text=null_text)
    method.seed_draws(0)
    tokens = {"none": 1, "all": 17, "random": 8, "share": 9, "average": 5}[patches]
    assert method.condition(batch(2)["image"]).shape == (2, tokens, 12)
    assert PATCH_RULES.keys() == {rule for rule, *_ in RULES}


def test_random_patches_are_drawn_with_replacement():
    patches = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 1)
    drawn = random_patches(patches, cpu_draw, amount=60)
    assert drawn.shape == (2, 60, 1)
    assert set(drawn.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_share_takes_each_patch_at_most_once():
    patches = torch.arange(10.0).view(1, 10, 1).expand(3, 10, 1)
    for row in share_of_patches(patches, cpu_draw, amount=0.5)[..., 0].tolist():
        assert len(row) == len(set(row)) == 5


def test_average_equals_a_loop_and_leaves_out_the_incomplete_tile():
    patches = torch.randn(2, 25, 3)
    pooled = average_patches(patches, cpu_draw, amount=2)
    for row in range(2):
        for column in range(2):
            tile = [patches[:, 5 * (2 * row + i) + 2 * column + j] for i in (0, 1) for j in (0, 1)]
            torch.testing.assert_close(pooled[:, 2 * row + column], sum(tile) / 4)


def test_null_text_rules():
    tokens, null = torch.randn(2, 3, 4), torch.randn(3, 4)
    torch.testing.assert_close(condition_from_tokens(tokens, null, "tokenwise")[1, 2], tokens[1, 2] + null[2])
    torch.testing.assert_close(condition_from_tokens(tokens, null, "mean")[1, 2], tokens[1, 2] + null.mean(0))
    with pytest.raises(ValueError, match="draw 4 patches"):
        condition_from_tokens(tokens, torch.randn(5, 4), "tokenwise")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patches": "some", "patch_amount": None}, "choose from none, all, random, share, average"),
        ({"patches": "random", "patch_amount": 0.5}, "takes int"),
        ({"null_text": "average"}, "tokenwise or mean"),
        ({"warmup_steps": 9}, "between 0 and method.steps"),
        ({"optimizer": {"name": "Adamw", "lr": 1e-3}}, "torch.optim"),
    ],
)
def test_wrong_settings_say_how_to_fix_them(wrong, message, clip_folder, generator_folder):
    with pytest.raises(InstantiationException, match=message):
        build("diva", clip_folder, generator_folder, **wrong)


def test_image_size_serves_both_models(clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder)
    method.diffusion.image_size = 48
    assert method.image_size == 48
    bigger = F.interpolate(batch(2)["image"], size=48)
    method.diffusion.image_size = 32
    method.seed_draws(0)
    assert method.loss({"image": bigger})["denoising"].isfinite()


def test_noise_schedule_is_the_folders(clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder)
    assert (
        method.diffusion.num_timesteps
        == DDPMScheduler.from_pretrained(generator_folder, subfolder="scheduler").config.num_train_timesteps
    )
