"""DIVA against a line-by-line slow version on a real small U-Net, its token rules against loops, and its switches."""

import inspect
import json
import math
import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from fits import fit
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from scipy.stats import norm
from small import CONF, batch, build

import clipfix.__main__  # noqa: F401  the resolvers that the configs use
from clipfix.functional.anchors import feature_drift, similarity_drift
from clipfix.functional.denoising import contrastive_denoising_loss, logit_normal_timesteps
from clipfix.functional.patches import (
    PATCH_RULES,
    average_patches,
    condition_from_tokens,
    random_patches,
    share_of_patches,
)
from clipfix.functional.views import random_crops
from clipfix.methods.diva import DIVA

RULES = [
    ("none", None, "mean"),
    ("all", None, "mean"),
    ("random", 7, "tokenwise"),
    ("share", 0.5, "mean"),
    ("average", 2, "mean"),
]
DCR = {"temperature": 0.1, "negatives": 1, "crop_area": [0.5, 0.8], "crop_ratio": [0.9, 1.1]}
CAPTIONS = {"projection_from": "captions", "patches": "none", "patch_amount": None, "null_text": "mean"}
UNIFORM = {"law": "uniform", "range": None, "mean": 0.0, "sd": 1.0}


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


def test_stored_latents_take_the_place_of_the_autoencoder(clip_folder, generator_folder):
    """In half, as shards hold them: loss and gradients to 1e-3. The autoencoder itself is not asked."""
    method, inputs = build("diva", clip_folder, generator_folder), batch(4)
    stored = inputs | {"latents": method.diffusion.encode(inputs["image"]).half().float()}
    results = []
    for each in (inputs, stored, stored | {"latents": stored["latents"].flip(0)}):
        method.seed_draws(0)
        method.zero_grad()
        loss = method.loss(each)["denoising"]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
        results.append((loss.item(), gradient))
        method.diffusion.vae = None
    (loss, gradient), (found, close), (_, far) = results
    assert found == pytest.approx(loss, rel=1e-3)
    assert (close - gradient).norm() < 1e-3 * gradient.norm()
    assert (far - gradient).norm() > 1e-2 * gradient.norm()


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
    assert method.condition(*method.backbone.visual_tokens(batch(2)["image"])).shape == (2, tokens, 12)
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
        ({"timesteps": UNIFORM | {"law": "normal"}}, "timesteps.law is normal: choose uniform or logit_normal"),
        ({"timesteps": UNIFORM | {"range": [500, 1001]}}, "between 0 and the diffusion model's 1000"),
        ({"timesteps": UNIFORM | {"range": [500, 500]}}, r"range is \[500, 500\]"),
        ({"train": "text"}, "choose visual, norms, blocks or lora"),
        ({"train": "blocks"}, "train_blocks is None: train the last 1 to 2 blocks"),
        ({"train": "blocks", "train_blocks": 3}, "train_blocks is 3: train the last 1 to 2 blocks"),
        ({"train_blocks": 1}, "set method.train=blocks"),
        ({"train": "lora", "lora": {"rank": 0, "alpha": 1}}, "give rank, a whole number from 1"),
        ({"projection_steps": 5}, "projection_steps is 5: set it between 0 and 4"),
        ({"projection_from": "text"}, "choose images or captions"),
        (CAPTIONS, "set method.projection_steps above 0"),
        ({**CAPTIONS, "projection_steps": 2, "patches": "all"}, "method.patches=none, as a patch has no caption"),
        ({"condition_tokens": 0}, "condition_tokens is 0: set it to 1 or more"),
        ({"feedback": "dcr"}, "choose denoising or contrastive"),
        ({"feedback": "contrastive", "dcr": DCR | {"temperature": 0.0}}, "set the one above 0"),
        ({"feedback": "contrastive", "dcr": DCR | {"negatives": 0}}, "the other to 1 or more"),
        ({"feedback": "contrastive", "dcr": DCR | {"crop_area": [0.9, 1.1]}}, "areas above 0 and up to 1"),
        ({"feedback": "contrastive", "dcr": DCR | {"crop_ratio": [1.1, 0.9]}}, "its least and greatest"),
        ({"anchor": "feature"}, "choose null, features or similarities"),
        ({"control": "shuffle"}, "choose null, shuffled or off"),
        ({"control": "off"}, "method.caption_weight above 0"),
        ({"control": "off", "caption_weight": 1.0, "projection_steps": 1}, "method.projection_steps=0"),
        ({"optimizer": {"name": "Adamw", "lr": 1e-3}}, "torch.optim"),
    ],
)
def test_wrong_settings_say_how_to_fix_them(wrong, message, clip_folder, generator_folder):
    with pytest.raises(InstantiationException, match=message):
        build("diva", clip_folder, generator_folder, **wrong)


def test_image_size_serves_both_models(clip_folder, generator_folder, tmp_path):
    larger = shutil.copytree(generator_folder, tmp_path / "larger")
    config = json.loads((larger / "unet/config.json").read_text())
    (larger / "unet/config.json").write_text(json.dumps(config | {"sample_size": 12}))  # 48 px
    method = build("diva", clip_folder, str(larger))
    assert method.needs.image_size == 48
    assert method.needs.latents() == method.diffusion.latents_of(48)
    method.seed_draws(0)
    assert method.loss({"image": F.interpolate(batch(2)["image"], size=48)})["denoising"].isfinite()


def test_noise_schedule_is_the_folders(clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder)
    assert (
        method.diffusion.num_timesteps
        == DDPMScheduler.from_pretrained(generator_folder, subfolder="scheduler").config.num_train_timesteps
    )


# -- switches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(clip_folder, generator_folder):
    return lambda **overrides: build("diva", clip_folder, generator_folder, **overrides)


@pytest.fixture
def as_rank(monkeypatch):
    """Makes any method believe that it is this rank of several; `joined` is what gathering then gives."""

    def pretend(rank, world_size, joined=None):
        monkeypatch.setattr(DIVA, "rank", rank)
        monkeypatch.setattr(DIVA, "world_size", world_size)
        monkeypatch.setattr(DIVA, "gather", lambda self, rows: joined)

    return pretend


def terms(method: DIVA, inputs: dict) -> dict[str, torch.Tensor]:
    method.seed_draws(0)
    return method.loss(inputs)


def gradients(method: DIVA, inputs: dict) -> dict[str, torch.Tensor]:
    torch.stack(list(terms(method, inputs).values())).sum().backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mean", "sd", "low", "high"), [(0.0, 1.0, 0, 1000), (1.0, 0.5, 0, 1000), (-0.5, 2.0, 300, 700)]
)
def test_logit_normal_timesteps_follow_their_law(mean, sd, low, high):
    """P(t < k) = P(mean + sd z < logit of k's place), for z standard normal."""
    normal = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    drawn = logit_normal_timesteps(normal, mean, sd, low, high)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        below = (drawn < low + share * (high - low)).double().mean().item()
        assert below == pytest.approx(norm.cdf((math.log(share / (1 - share)) - mean) / sd), abs=0.01)
    extremes = logit_normal_timesteps(torch.tensor([-1e3, 1e3]), mean, sd, low, high)
    assert extremes.tolist() == [low, high - 1]


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_timesteps_stay_in_their_range_and_two_ranks_draw_what_one_does(law, make, as_rank):
    method = make(draws=3, timesteps=UNIFORM | {"law": law, "range": [200, 210]})
    method.seed_draws(0)
    alone = method.draw_timesteps(300)
    assert alone.shape == (300, 3)
    assert set(alone.flatten().tolist()) == set(range(200, 210))
    if law == "uniform":  # 90 of each on average, with a standard deviation of 9
        assert all(50 < count < 130 for count in alone.flatten().bincount()[200:].tolist())
    for rank in (0, 1):
        as_rank(rank, 2)
        method.seed_draws(0)
        assert torch.equal(method.draw_timesteps(150), alone[150 * rank :][:150])


@pytest.mark.parametrize("rows", [2, 5, 6])
def test_shuffled_condition_is_another_images_across_ranks(rows, make, as_rank):
    method = make(control="shuffled")
    joined = torch.arange(rows, dtype=torch.float).view(rows, 1, 1)
    alone = method.of_others(joined)
    assert (alone != joined).all()
    assert sorted(alone.flatten().tolist()) == joined.flatten().tolist()
    for rank in range(rows):
        as_rank(rank, rows, joined)
        assert torch.equal(method.of_others(joined[rank : rank + 1]), alone[rank : rank + 1])


def test_shuffled_loss_and_gradient_are_those_of_the_other_condition(make):
    """One image at a time, each with the description of the image three further on."""
    method, inputs = make(control="shuffled"), batch(6)
    condition = torch.randn(6, 8, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    method.seed_draws(0)
    method.feedback(inputs["image"], condition, None, None, shuffled=True).backward()
    found, condition.grad = condition.grad, None

    method.seed_draws(0)
    noise = torch.randn(6, method.draws, 4, 8, 8, generator=method.generator)
    timesteps = torch.randint(0, 1000, (6, method.draws), generator=method.generator)
    losses = []
    for i in range(6):
        latent = method.diffusion.encode(inputs["image"][i : i + 1])
        for e, t in zip(noise[i], timesteps[i], strict=True):
            noisy = method.diffusion.add_noise(latent, e[None], t[None])
            told = condition[(i + 3) % 6][None]
            losses.append((method.diffusion.predict(noisy, t[None], told) - e).square().mean())
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(found, condition.grad, rtol=1e-3, atol=1e-7)


def test_one_image_has_no_other(make):
    method = make(control="shuffled")
    with pytest.raises(ValueError, match="raise data"):
        terms(method, batch(1))
    assert terms(method.eval(), batch(1))["denoising"].isfinite()  # a validation split may end so


def test_without_feedback_the_caption_loss_is_finetunes(make, clip_folder, generator_folder):
    method, inputs = make(control="off", caption_weight=1.0), batch(5)
    control = build("finetune", clip_folder, generator_folder, train=["visual"])
    assert method.needs.texts == ("caption",)
    found, expected = gradients(method, inputs), gradients(control, inputs)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
    assert terms(method, inputs).keys() == {"caption"}
    torch.testing.assert_close(terms(method, inputs)["caption"], terms(control, inputs)["contrastive"])
    torch.testing.assert_close(
        terms(make(caption_weight=0.5), inputs)["caption"], 0.5 * terms(control, inputs)["contrastive"]
    )


def test_a_bare_off_in_yaml_is_off(make):
    assert terms(make(control=False, caption_weight=1.0), batch(2)).keys() == {"caption"}


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_anchors_equal_loops_and_are_zero_where_nothing_moved():
    features, original, texts, scale = unit(4, 0), unit(4, 1), unit(6, 2), torch.tensor(7.0)
    cosines = [sum(a * b for a, b in zip(*pair, strict=True)) for pair in zip(features, original, strict=True)]
    torch.testing.assert_close(feature_drift(features, original), 1 - torch.stack(cosines).mean())
    total = 0.0
    for new, old in zip(features, original, strict=True):
        after = [math.exp(7 * float(new @ text)) for text in texts]
        before = [math.exp(7 * float(old @ text)) for text in texts]
        for a, b in zip(after, before, strict=True):
            total += b / sum(before) * math.log((b / sum(before)) / (a / sum(after))) / 4
    assert similarity_drift(features, original, texts, scale).item() == pytest.approx(total, rel=1e-4)
    assert feature_drift(original, original).item() == pytest.approx(0, abs=1e-6)
    assert similarity_drift(original, original, texts, scale).item() == pytest.approx(0, abs=1e-6)


def test_similarity_anchor_ignores_what_no_text_looks_at():
    texts = torch.eye(3)[:2]
    moved = F.normalize(torch.tensor([[1.0, 1.0, 1.0]]), dim=-1)
    for stretch in (torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[1.0, 1.0, 9.0]])):
        drift = similarity_drift(moved, F.normalize(stretch, dim=-1), texts, torch.tensor(7.0))
        assert drift.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("anchor", ["features", "similarities"])
def test_anchor_starts_at_zero_and_the_original_never_moves_nor_is_saved(anchor, make, tmp_path):
    method, inputs = make(anchor=anchor, anchor_weight=2.0, optimizer={"name": "SGD", "lr": 1.0}), batch(4)
    assert method.needs.texts == (("caption",) if anchor == "similarities" else ())
    before = {name: tensor.clone() for name, tensor in method.original.state_dict().items()}
    assert terms(method, inputs)["anchor"].item() == pytest.approx(0, abs=1e-5)
    fit(method, tmp_path, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.original.state_dict().items())
    assert method.original.text is method.backbone.text
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == method.trained_names()
    assert not [name for name in saved if name.startswith("original")]

    new, old = (F.normalize(clip.encode_image(inputs["image"]), dim=-1) for clip in (method.backbone, method.original))
    if anchor == "features":
        drift = feature_drift(new, old)
    else:
        text = F.normalize(method.backbone.encode_text(method.backbone.tokenize(inputs["caption"])), dim=-1)
        drift = similarity_drift(new, old, text, method.backbone.logit_scale.exp())
    assert drift > 1e-4
    torch.testing.assert_close(terms(method, inputs)["anchor"], 2 * drift, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("train", "blocks", "belongs"),
    [
        ("visual", None, lambda name: True),
        ("norms", None, lambda name: "ln_" in name),
        ("blocks", 1, lambda name: "resblocks.1." in name or "ln_post" in name or name.endswith("visual.proj")),
        ("blocks", 2, lambda name: "resblocks." in name or "ln_post" in name or name.endswith("visual.proj")),
    ],
)
def test_named_part_of_the_tower_trains_and_all_of_it_is_reached(train, blocks, belongs, make):
    """A trained weight without a gradient would let DDP hang."""
    method = make(train=train, train_blocks=blocks)
    tower = {name for name, _ in method.named_parameters() if ".visual." in name and belongs(name)}
    assert method.trained_names() == tower | {"visual_proj.weight", "visual_proj.bias"}
    assert gradients(method, batch(3)).keys() == method.trained_names()


@pytest.mark.parametrize("train", ["visual", "norms"])
def test_checkpointed_tower_has_the_same_loss_and_gradients(train, make):
    plain, checkpointed, inputs = make(train=train), make(train=train, checkpointing=True), batch(3)
    assert checkpointed.backbone.visual.transformer.grad_checkpointing
    torch.testing.assert_close(terms(checkpointed, inputs), terms(plain, inputs))
    torch.testing.assert_close(gradients(checkpointed, inputs), gradients(plain, inputs), atol=1e-6, rtol=1e-4)


STRICT = [
    {"name": "AdamW", "lr": 1e-2, "momentum": None, "weight_decay": 0.5},
    {"name": "SGD", "lr": 1e-1, "momentum": 0.9, "weight_decay": 0.5},
]


@pytest.mark.parametrize("optimizer", STRICT, ids=lambda settings: settings["name"])
def test_stage_one_moves_the_projection_alone_and_resumes_across_its_end(optimizer, make, tmp_path):
    def run(folder, steps, resume=None):
        method = make(projection_steps=2, optimizer=optimizer, caption_weight=1.0, anchor="features")
        trainer = fit(method, tmp_path / folder, steps, resume)
        return dict(method.named_parameters()), trainer.optimizers[0].state

    start = dict(make().named_parameters())
    first, _ = run("parts", 2)
    assert all(torch.equal(p, start[name]) for name, p in first.items() if name.startswith("backbone."))
    assert not torch.equal(first["visual_proj.weight"], start["visual_proj.weight"])

    whole, state = run("whole", 4)
    assert not torch.equal(whole["backbone.model.visual.proj"], start["backbone.model.visual.proj"])
    if optimizer["name"] == "AdamW":  # the tower's moments know nothing of stage one
        assert state[whole["visual_proj.weight"]]["step"] == 4
        assert state[whole["backbone.model.visual.proj"]]["step"] == 2
    rest, _ = run("parts", 4, tmp_path / "parts" / "last.ckpt")
    assert all(torch.equal(p, whole[name]) for name, p in rest.items())


# -- contrastive feedback ----------------------------------------------------------------------------------------------


def test_contrastive_denoising_loss_equals_a_loop():
    """Line by line: cosines, their exponentials over both positives and all negatives, the mean of minus the logs."""
    generator = torch.Generator().manual_seed(0)
    anchor, positives, negatives = (torch.randn(5, *n, 2, 3, 3, generator=generator) for n in ((), (2,), (4,)))
    losses = []
    for row, right, wrong in zip(anchor, positives, negatives, strict=True):
        lengths = [float(row.square().sum().sqrt() * other.square().sum().sqrt()) for other in [*right, *wrong]]
        cosines = [float((row * other).sum()) / n for other, n in zip([*right, *wrong], lengths, strict=True)]
        weights = [math.exp(cosine / 0.1) for cosine in cosines]
        losses += [-math.log(weight / sum(weights)) for weight in weights[:2]]
    found = contrastive_denoising_loss(anchor, positives, negatives, 0.1)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    perfect = contrastive_denoising_loss(anchor, torch.stack([anchor, 3 * anchor], 1), -anchor[:, None], 0.1)
    assert perfect.item() == pytest.approx(math.log(2), rel=1e-5)


def test_crops_are_what_their_draws_say():
    ramp = (torch.arange(8.0) + 0.5) / 8  # a picture whose red says x and whose green says y
    image = torch.stack([ramp.expand(8, 8), ramp[:, None].expand(8, 8), torch.zeros(8, 8)])[None]
    whole = random_crops(image, torch.tensor([[0.0, 0.5, 0.3, 0.9]]), (1.0, 1.0), (1.0, 1.0))
    torch.testing.assert_close(whole, image)
    for x, y in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)):
        part = random_crops(image, torch.tensor([[0.0, 0.5, x, y]]), (0.25, 0.25), (1.0, 1.0))[0]
        found = part[:2, 1:-1, 1:-1]  # beyond the centres of the outermost pixels there is nothing to interpolate
        expected = torch.stack([(x + ramp).expand(8, 8), (y + ramp)[:, None].expand(8, 8)])[:, 1:-1, 1:-1] / 2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    wide = random_crops(image, torch.tensor([[0.0, 0.5, 0.0, 0.0]]), (0.25, 0.25), (4.0, 4.0))[0]
    assert wide[0].max() > 0.9  # the whole width
    assert wide[1].max() < 0.3  # a quarter of the height


@pytest.mark.parametrize("control", [None, "shuffled"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_contrastive_feedback_equals_a_slow_version(control, prediction_type, make):
    """One image and draw at a time. Gradients reach all conditions: own, view's and others'."""
    settings = {"patches": "none", "patch_amount": None, "null_text": "mean", "control": control}
    method = make(feedback="contrastive", dcr=DCR | {"negatives": 2}, **settings)
    inputs, method.diffusion.prediction_type = batch(6), prediction_type
    found = gradients(method, inputs)
    loss = terms(method, inputs)["contrastive"]
    assert terms(method, inputs).keys() == {"contrastive"}
    assert found.keys() == method.trained_names()
    found = {name: gradient.clone() for name, gradient in found.items()}
    method.zero_grad()

    method.seed_draws(0)
    uniform = torch.rand(6, 4, generator=method.generator)
    noise = torch.randn(6, method.draws, 4, 8, 8, generator=method.generator)
    timesteps = torch.randint(0, 1000, (6, method.draws), generator=method.generator)
    views = random_crops(inputs["image"], uniform, (0.5, 0.8), (0.9, 1.1))
    own, other = (method.condition(*method.backbone.visual_tokens(each)) for each in (inputs["image"], views))
    losses = []
    for i in range(6):
        told = (i + 3) % 6 if control else i
        latent = method.diffusion.encode(inputs["image"][i : i + 1])
        for e, t in zip(noise[i][:, None], timesteps[i][:, None], strict=True):
            noisy, target = method.diffusion.add_noise(latent, e, t), method.diffusion.target(latent, e, t)
            candidates = [own[(told + 1) % 6], own[(told + 2) % 6]]  # 6 * 1 / 6 and 6 * 2 / 6 further on
            assert not control or i not in ((told + 1) % 6, (told + 2) % 6)
            anchor, *rest = (method.diffusion.predict(noisy, t, c[None]) for c in (own[told], other[told], *candidates))
            cosines = torch.stack([F.cosine_similarity(anchor.flatten(), p.flatten(), dim=0) for p in (target, *rest)])
            losses.append(-(cosines / 0.1).log_softmax(0)[:2].mean())
    slow = torch.stack(losses).mean()
    slow.backward()
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-6)
    for name, gradient in found.items():
        expected = method.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-8)


def test_negatives_need_images(make):
    method = make(feedback="contrastive", dcr=DCR | {"negatives": 3})
    with pytest.raises(ValueError, match=r"A batch of 4 .* all ranks together have 8 images, or lower method.dcr.neg"):
        terms(method, batch(4))
    assert terms(method.eval(), batch(4))["contrastive"].isfinite()


# -- a projection from captions ----------------------------------------------------------------------------------------


def test_condition_of_captions_equals_the_same_by_hand(make):
    """Three tokens a visual token: three linear maps of their own."""
    method, inputs = make(**CAPTIONS, projection_steps=2, condition_tokens=3), batch(4)
    width, told = method.diffusion.condition_dim, []
    for i in range(4):
        texts = method.backbone.encode_text(method.backbone.tokenize(inputs["captions"][2 * i : 2 * i + 2]))
        mean = sum(text / text.norm() for text in texts) / 2
        told.append(mean / mean.norm())
    pooled, patches = method.backbone.visual_tokens(inputs["image"])
    seen = [feature / feature.norm() for feature in pooled]
    for features, found in ((told, method.condition_of_captions(inputs)), (seen, method.condition(pooled, patches))):
        assert found.shape == (4, 3, width)
        assert not torch.allclose(found[:, 0], found[:, 1])  # or many tokens would say no more than one
        for i in range(4):
            spread = (features[i] - sum(features) / 4) * len(features[i]) ** 0.5
            for token in range(3):
                part = slice(token * width, (token + 1) * width)
                expected = method.visual_proj.weight[part] @ spread + method.visual_proj.bias[part]
                torch.testing.assert_close(found[i, token], expected + method.null.mean(0), atol=1e-5, rtol=1e-4)
    assert method.needs.texts == ("captions",)


@pytest.mark.parametrize("optimizer", STRICT, ids=lambda settings: settings["name"])
def test_captions_teach_the_projection_alone_and_images_the_tower_alone(optimizer, make, tmp_path):
    """Whatever the optimizer's decay and momentum; a resumed run repeats it. The control only shuffles stage two."""

    def run(folder, steps, resume=None, **overrides):
        method = make(**CAPTIONS, projection_steps=2, optimizer=optimizer, **overrides)
        fit(method, tmp_path / folder, steps, resume)
        return dict(method.named_parameters())

    def moved(before, after):
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    start = dict(make(**CAPTIONS, projection_steps=2).named_parameters())
    first, whole = run("parts", 2), run("whole", 4)
    assert moved(start, first) == {"visual_proj"}
    assert moved(first, whole) == {"backbone"}
    assert not moved(whole, run("parts", 4, tmp_path / "parts" / "last.ckpt"))
    if optimizer["name"] == "SGD":
        assert not moved(first, run("control", 2, control="shuffled"))
        assert moved(whole, run("control", 4, control="shuffled")) == {"backbone"}


def test_each_stage_has_a_schedule_of_its_own(make, tmp_path):
    """Stage one warms up over two steps and falls over two; so does stage two, at the optimizer's rate."""
    settings = {"projection_steps": 4, "projection_lr": 0.3, "steps": 8, "warmup_steps": 2}
    method = make(**CAPTIONS, **settings, optimizer={"name": "SGD", "lr": 0.1})
    rates, hook = [], method.on_before_optimizer_step

    def watch(optimizer):
        hook(optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups for p in group["params"][:1]])

    method.on_before_optimizer_step = watch
    trainer = fit(method, tmp_path, steps=8)
    groups = trainer.optimizers[0].param_groups
    assert [any(p is method.visual_proj.weight for p in group["params"]) for group in groups[:2]] == [True, False]
    factors = [0.5, 1.0, 1.0, 0.5]
    for step, (projection, bias, *tower) in enumerate(rates):
        assert projection == bias
        assert len(tower) == 2
        if step < 4:
            assert projection == pytest.approx(0.3 * factors[step])
        else:
            assert tower == pytest.approx([0.1 * factors[step - 4]] * 2)


def test_watching_sees_three_conditions_and_changes_nothing(make):
    method, inputs = make(watch_every=2, anchor="features"), batch(4)
    quiet = make(anchor="features")
    assert torch.equal(terms(method, inputs)["denoising"], terms(quiet, inputs)["denoising"])
    assert quiet.notes == {}
    assert method.notes.keys() == {"denoising/right", "denoising/shuffled", "denoising/null", "drift/features"}
    assert method.notes["denoising/right"] == terms(quiet, inputs)["denoising"].item()
    shuffled = make(control="shuffled", anchor="features")
    assert method.notes["denoising/shuffled"] == terms(shuffled, inputs)["denoising"].item()
    with torch.no_grad():  # tokens of nothing leave the null text
        for silent in quiet.visual_proj.parameters():
            silent.zero_()
    assert method.notes["denoising/null"] == pytest.approx(terms(quiet, inputs)["denoising"].item(), rel=1e-5)
    assert method.notes["drift/features"] == pytest.approx(0, abs=1e-6)
    unanchored = make(watch_every=2)
    assert terms(unanchored, inputs).keys() == {"denoising"}
    assert unanchored.notes["drift/features"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        unanchored.backbone.visual.proj.neg_()
    terms(unanchored, inputs)
    assert unanchored.notes["drift/features"] > 1  # features of the other sign
    assert not any(name.startswith("original") for name in unanchored.trained_names())
    for batches_seen, training, looks in ((1, True, False), (2, True, True), (2, False, False)):
        method.batches_seen, method.notes = batches_seen, {}
        method.train(training)
        terms(method, inputs)
        assert bool(method.notes) == looks


# -- experiments -------------------------------------------------------------------------------------------------------

TOKENS = {  # what the reference's table says: tokens of an image in the condition
    "vit-l14": 77,
    "vit-l14-336": 77,
    "metaclip-l14": 257,
    "metaclip-h14": 257,
    "dfn-h14": 257,
    "dfn-h14-378": 365,
    "siglip-so400m": 5,
    "siglip-so400m-384": 5,
}


@pytest.mark.parametrize("backbone", TOKENS)
def test_each_of_the_references_models_has_its_experiment(backbone):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"experiment=diva-{backbone}"])
    assert config.backbone == OmegaConf.load(CONF / "backbone" / f"{backbone}.yaml")
    assert "stable-diffusion-2-1-base" in config.diffusion.path
    settings = OmegaConf.to_container(config.method)
    assert settings.pop("_target_") == "clipfix.methods.diva.DIVA"
    assert settings.pop("_convert_") == "all"
    inspect.signature(DIVA.__init__).bind(None, backbone=None, **settings)
    assert (settings["steps"], settings["optimizer"]["name"], settings["optimizer"]["lr"]) == (4600, "SGD", 1e-4)
    assert 8 * config.data.batch_size * config.trainer.accumulate_grad_batches == 640
    assert config.trainer.precision == "bf16-mixed"

    side = open_clip.get_model_config(config.backbone.name)["vision_cfg"]["image_size"] // 14
    pick, _ = PATCH_RULES[settings["patches"]]
    tokens = torch.cat(
        [torch.zeros(1, 1, 3), pick(torch.zeros(1, side**2, 3), cpu_draw, settings["patch_amount"])], dim=1
    )
    assert condition_from_tokens(tokens, torch.zeros(77, 3), settings["null_text"]).shape[1] == TOKENS[backbone]


def test_experiments_are_these_and_the_tiny_one():
    found = {path.stem.removeprefix("diva-") for path in (CONF / "experiment").glob("diva-*.yaml")}
    assert found == {*TOKENS, "reference-tiny"}
