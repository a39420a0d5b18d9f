"""DIVA against a line-by-line slow version on a real small U-Net, its token rules against loops, and its switches."""

import inspect
import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from fits import fit
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from small import CONF, batch, build

import clipfix.__main__  # noqa: F401  the resolvers that the configs use
from clipfix import PACKAGE
from clipfix.functional.anchors import feature_drift, similarity_drift
from clipfix.functional.denoising import contrastive_denoising_loss, logit_normal_timesteps
from clipfix.functional.patches import AveragePatches, RandomPatches, ShareOfPatches, condition_from_tokens
from clipfix.functional.views import random_crops
from clipfix.methods.diva import DIVA
from clipfix.models.clip import Backbone
from clipfix.parts.condition import CaptionSpace, VisualTokens
from clipfix.parts.feedback import Contrastive, shifted_condition
from clipfix.parts.timesteps import LogitNormal, Uniform
from clipfix.parts.trainable import LastBlocks, LoRA
from clipfix.results.pictures.diva import Watch
from clipfix.training.callbacks import SaveTensors
from clipfix.training.ranks import Ranks
from clipfix.training.schedules import Cosine, Steps

RULES = {  # option of the group `patches`: its settings, the null text it goes with, tokens of the condition
    "none": ({}, "mean", 1),
    "all": ({}, "mean", 17),
    "random": ({"amount": 7}, "tokenwise", 8),
    "share": ({"share": 0.5}, "mean", 9),
    "average": ({"side": 2}, "mean", 5),
}
DCR = {"temperature": 0.1, "negatives": 1, "crop_area": [0.5, 0.8], "crop_ratio": [0.9, 1.1]}
CAPTIONS = "condition=caption_space"
CLASS_TOKEN = {"null_text": "mean"}  # of the condition, with patches=none


def cpu_draw(sampler, *args, rows, shape=()):
    return sampler(*args, (rows, *shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_equals_a_slow_version(prediction_type, clip_folder, generator_folder):
    """One image, one draw at a time, in the paper's order, with diffusers' own parts."""
    method = build("diva", clip_folder, generator_folder, "patches=all", condition=CLASS_TOKEN)
    diffusion, inputs, rows = method.diffusion, batch(3), 3
    diffusion.prediction_type = prediction_type
    method.seed_draws(0)
    loss = method.loss(inputs)["denoising"]

    unet = UNet2DConditionModel.from_pretrained(generator_folder, subfolder="unet").eval()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    method.seed_draws(0)  # the same draws, in the same order
    noise = torch.randn(rows, method.timesteps.draws, 4, 8, 8, generator=method.ranks.generator)
    timesteps = torch.randint(0, 1000, (rows, method.timesteps.draws), generator=method.ranks.generator)
    total = 0.0
    with torch.no_grad():
        null = diffusion.condition([""])[0].mean(0)
        for i in range(rows):
            image = inputs["image"][i : i + 1]
            latent = diffusion.vae.encode(2 * image - 1).latent_dist.mode() * diffusion.vae.config.scaling_factor
            pooled, patches = method.backbone.visual_tokens(image)
            tokens = (
                torch.stack([pooled[0], *patches[0]]) @ method.condition.projection.weight.T
                + method.condition.projection.bias
            )
            for d in range(method.timesteps.draws):
                t, e = timesteps[i, d], noise[i, d]
                a, s = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
                predicted = unet(a * latent + s * e, t, encoder_hidden_states=(tokens + null)[None]).sample[0]
                target = e if prediction_type == "epsilon" else a * e - s * latent[0]
                total += float(((predicted - target) ** 2).mean()) / (rows * method.timesteps.draws)
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
    method = build("diva", clip_folder, generator_folder, "patches=none", condition=CLASS_TOKEN)
    inputs, generator = batch(2), torch.Generator().manual_seed(3)
    noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (2, 2), generator=generator)

    def gradient(columns):
        queue = [noise[:, columns], timesteps[:, columns]]
        method.ranks.sample = lambda *_, **__: queue.pop(0)  # noise, then timesteps
        method.timesteps.draws = len(columns)
        method.zero_grad()
        method.loss(inputs)["denoising"].backward()
        return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient([0, 1]), (gradient([0]) + gradient([1])) / 2, atol=1e-6, rtol=1e-4)


def test_only_visual_tower_and_projection_train(clip_folder, generator_folder):
    method = build("diva", clip_folder, generator_folder)
    assert {name.split(".")[0] for name in method.trained_names()} == {"backbone", "condition"}
    projection = "condition.projection."
    assert all(".visual." in name or name.startswith(projection) for name in method.trained_names())


@pytest.mark.parametrize("rule", RULES)
def test_every_token_rule_gives_a_condition(rule, clip_folder, generator_folder):
    settings, null_text, tokens = RULES[rule]
    condition = {"null_text": null_text, "patches": settings}
    method = build("diva", clip_folder, generator_folder, f"patches={rule}", condition=condition)
    method.seed_draws(0)
    assert method.condition(*method.backbone.visual_tokens(batch(2)["image"])).shape == (2, tokens, 12)
    assert {path.stem for path in (CONF / "patches").glob("*.yaml")} == RULES.keys()


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("random", {"amount": 2}, r"method\.condition\.null_text is tokenwise"),
        ("average", {"side": 9}, r"method\.condition\.patches\.side is 9"),
    ],
)
def test_patches_that_do_not_fit_are_named_by_key_and_value(rule, settings, message, clip_folder, generator_folder):
    condition = {"null_text": "tokenwise", "patches": settings}
    method = build("diva", clip_folder, generator_folder, f"patches={rule}", condition=condition)
    method.seed_draws(0)
    tokens = method.backbone.visual_tokens(batch(2)["image"])
    with pytest.raises(ValueError, match=message):
        method.condition(*tokens)


def test_random_patches_are_drawn_with_replacement():
    patches = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 1)
    drawn = RandomPatches(60)(patches, cpu_draw)
    assert drawn.shape == (2, 60, 1)
    assert set(drawn.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_share_takes_each_patch_at_most_once():
    patches = torch.arange(10.0).view(1, 10, 1).expand(3, 10, 1)
    for row in ShareOfPatches(0.5)(patches, cpu_draw)[..., 0].tolist():
        assert len(row) == len(set(row)) == 5


def test_average_equals_a_loop_and_leaves_out_the_incomplete_tile():
    patches = torch.randn(2, 25, 3)
    pooled = AveragePatches(2)(patches, cpu_draw)
    for row in range(2):
        for column in range(2):
            tile = [patches[:, 5 * (2 * row + i) + 2 * column + j] for i in (0, 1) for j in (0, 1)]
            torch.testing.assert_close(pooled[:, 2 * row + column], sum(tile) / 4)


def test_null_text_rules():
    tokens, null = torch.randn(2, 3, 4), torch.randn(3, 4)
    torch.testing.assert_close(condition_from_tokens(tokens, null, "tokenwise")[1, 2], tokens[1, 2] + null[2])
    torch.testing.assert_close(condition_from_tokens(tokens, null, "mean")[1, 2], tokens[1, 2] + null.mean(0))
    with pytest.raises(ValueError, match=r"null_text is tokenwise.* 4 patches"):
        condition_from_tokens(tokens, torch.randn(5, 4), "tokenwise")


@pytest.mark.parametrize(
    ("construct", "key", "value"),
    [
        (lambda: VisualTokens(RandomPatches(7), "average", 1, 0, None), "method.condition.null_text", "average"),
        (lambda: VisualTokens(RandomPatches(7), "mean", 0, 0, None), "method.condition.tokens", "0"),
        (lambda: CaptionSpace(1, 0, None, None), "method.condition.steps", "0"),
        (lambda: Uniform(2, [500, 1001]).bounds(1000), "method.timesteps.range", r"\[500, 1001\]"),
        (lambda: LogitNormal(2, [500, 500], 0.0, 1.0).bounds(1000), "method.timesteps.range", r"\[500, 500\]"),
        (lambda: Uniform(0, None), "method.timesteps.draws", "0"),
        (lambda: LoRA(0, 1), "method.trainable.rank", "0"),
        (lambda: LoRA(4, 0), "method.trainable.alpha", "0"),
        (lambda: Contrastive(**DCR | {"temperature": 0.0}), "method.feedback.temperature", "0.0"),
        (lambda: Contrastive(**DCR | {"negatives": 0}), "method.feedback.negatives", "0"),
        (lambda: Contrastive(**DCR | {"crop_area": [0.9, 1.1]}), "method.feedback.crop_area", r"\[0.9, 1.1\]"),
        (lambda: Contrastive(**DCR | {"crop_ratio": [1.1, 0.9]}), "method.feedback.crop_ratio", r"\[1.1, 0.9\]"),
        (lambda: Cosine(9, 0.0).check(4), "method.schedule.warmup_steps", "9"),
        (lambda: Cosine(0, 1.5), "method.schedule.floor", "1.5"),
        (lambda: Steps(0, [1.0], 0.1), "method.schedule.at", r"\[1.0\]"),
    ],
)
def test_wrong_settings_of_parts_are_named_by_key_and_value(construct, key, value):
    """Each part checks its own settings: no model is needed."""
    with pytest.raises(ValueError, match=rf"^{key} is {value}: ."):
        construct()


@pytest.mark.parametrize(
    ("groups", "wrong", "key", "value"),
    [
        ((), {"schedule": {"warmup_steps": 9}}, "method.schedule.warmup_steps", "9"),
        ((), {"timesteps": {"range": [500, 1001]}}, "method.timesteps.range", r"\[500, 1001\]"),
        ((), {"condition": {"steps": 5}}, "method.condition.steps", "5"),
        (("trainable=blocks",), {"trainable": {"blocks": 3}}, "method.trainable.blocks", "3"),
        ((), {"feedback": None}, "method.feedback", "null"),
        ((), {"optimizer": {"name": "Adamw", "lr": 1e-3}}, "method.optimizer.name", "Adamw"),
    ],
)
def test_settings_that_do_not_fit_the_models_or_each_other_are_named(
    groups, wrong, key, value, clip_folder, generator_folder
):
    with pytest.raises(InstantiationException, match=rf"{key}( is |=){value}"):
        build("diva", clip_folder, generator_folder, *groups, **wrong)


def test_last_blocks_are_for_open_clips_transformers():
    with pytest.raises(ValueError, match=r"not for Linear: .*trainable@method\.trainable="):
        LastBlocks(1).parts(torch.nn.Linear(2, 2))


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
    return lambda *groups, **overrides: build("diva", clip_folder, generator_folder, *groups, **overrides)


@pytest.fixture
def as_rank(monkeypatch):
    """Make any method believe that it is this rank of several; `joined` is what gathering then gives."""

    def pretend(rank, world_size, joined=None):
        monkeypatch.setattr(Ranks, "rank", rank)
        monkeypatch.setattr(Ranks, "size", world_size)
        monkeypatch.setattr(Ranks, "gather", lambda self, rows: joined)

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


@pytest.mark.parametrize("law", [Uniform(3, [200, 210]), LogitNormal(3, [200, 210], 0.0, 1.0)])
def test_timesteps_stay_in_their_range_and_two_ranks_draw_what_one_does(law, as_rank):
    ranks = Ranks(seed=0)

    def drawn(rows):
        ranks.reseed(0, torch.device("cpu"))
        return law.sample(rows, 1000, ranks)

    alone = drawn(300)
    assert alone.shape == (300, 3)
    assert set(alone.flatten().tolist()) == set(range(200, 210))
    if isinstance(law, Uniform):  # 90 of each on average, with a standard deviation of 9
        assert all(50 < count < 130 for count in alone.flatten().bincount()[200:].tolist())
    for rank in (0, 1):
        as_rank(rank, 2)
        assert torch.equal(drawn(150), alone[150 * rank :][:150])


@pytest.mark.parametrize("rows", [2, 5, 6])
def test_shuffled_condition_is_another_images_across_ranks(rows, as_rank):
    ranks = Ranks(seed=0)
    joined = torch.arange(rows, dtype=torch.float).view(rows, 1, 1)
    alone = shifted_condition(joined, ranks)
    assert (alone != joined).all()
    assert sorted(alone.flatten().tolist()) == joined.flatten().tolist()
    for rank in range(rows):
        as_rank(rank, rows, joined)
        assert torch.equal(shifted_condition(joined[rank : rank + 1], ranks), alone[rank : rank + 1])


def test_shuffled_loss_and_gradient_are_those_of_the_other_condition(make):
    """One image at a time, each with the description of the image three further on."""
    method, inputs = make(shuffled=True), batch(6)
    condition = torch.randn(6, 8, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    method.seed_draws(0)
    method.feedback_loss(method.feedback, inputs, condition).backward()
    found, condition.grad = condition.grad, None

    method.seed_draws(0)
    noise = torch.randn(6, method.timesteps.draws, 4, 8, 8, generator=method.ranks.generator)
    timesteps = torch.randint(0, 1000, (6, method.timesteps.draws), generator=method.ranks.generator)
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
    method = make(shuffled=True)
    with pytest.raises(ValueError, match="raise data"):
        terms(method, batch(1))
    assert terms(method.eval(), batch(1))["denoising"].isfinite()  # a validation split may end so


def test_without_feedback_the_caption_loss_is_finetunes(make, clip_folder, generator_folder):
    method, inputs = make(feedback=None, caption_weight=1.0), batch(5)
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
    method, inputs = make(f"anchor={anchor}", anchor={"weight": 2.0}, optimizer={"name": "SGD", "lr": 1.0}), batch(4)
    assert method.needs.texts == (("caption",) if anchor == "similarities" else ())
    before = {name: tensor.clone() for name, tensor in method.anchor.original.state_dict().items()}
    assert terms(method, inputs)["anchor"].item() == pytest.approx(0, abs=1e-5)
    fit(method, tmp_path, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.anchor.original.state_dict().items())
    assert method.anchor.original.text is method.backbone.text
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == method.trained_names()
    assert not [name for name in saved if "original" in name]

    new, old = (
        F.normalize(clip.encode_image(inputs["image"]), dim=-1) for clip in (method.backbone, method.anchor.original)
    )
    if anchor == "features":
        drift = feature_drift(new, old)
    else:
        text = F.normalize(method.backbone.encode_text(method.backbone.tokenize(inputs["caption"])), dim=-1)
        drift = similarity_drift(new, old, text, method.backbone.logit_scale.exp())
    assert drift > 1e-4
    torch.testing.assert_close(terms(method, inputs)["anchor"], 2 * drift, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "blocks", "belongs"),
    [
        ("tower", None, lambda name: True),
        ("norms", None, lambda name: "ln_" in name),
        ("blocks", 1, lambda name: "resblocks.1." in name or "ln_post" in name or name.endswith("visual.proj")),
        ("blocks", 2, lambda name: "resblocks." in name or "ln_post" in name or name.endswith("visual.proj")),
    ],
)
def test_named_part_of_the_tower_trains_and_all_of_it_is_reached(part, blocks, belongs, make):
    """A trained weight without a gradient would let DDP hang."""
    method = make(f"trainable={part}", trainable={} if blocks is None else {"blocks": blocks})
    tower = {name for name, _ in method.named_parameters() if ".visual." in name and belongs(name)}
    assert method.trained_names() == tower | {"condition.projection.weight", "condition.projection.bias"}
    assert gradients(method, batch(3)).keys() == method.trained_names()


def test_pretrained_projection_replaces_the_first_phase(make, tmp_path):
    """A run of the first phase alone writes its projection; the next run starts from it, and keeps it to the bit."""
    first = make(CAPTIONS, condition={"steps": 2}, steps=2)
    saves = SaveTensors("condition.projection.", str(tmp_path / "new" / "projection.safetensors"))
    fit(first, tmp_path / "first", 2, callbacks=[saves])
    for weights in (tmp_path / "new" / "projection.safetensors", tmp_path / "first" / "last.ckpt"):
        second = make(CAPTIONS, condition={"steps": 0, "weights": str(weights)})
        assert "captions" not in second.needs.texts
        assert not any(name.startswith("condition.") for name in second.trained_names())
        fit(second, tmp_path / "second", 2)
        for name, weight in first.condition.projection.state_dict().items():
            assert torch.equal(second.condition.projection.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (None, "no such file"),
        ({"other": torch.zeros(2)}, "shapes none"),
        (
            {"condition.projection.weight": torch.zeros(12, 9), "condition.projection.bias": torch.zeros(12)},
            r"\(12, 9\)",
        ),
    ],
)
def test_projection_that_does_not_fit_is_refused(tensors, reason, make, tmp_path):
    path = tmp_path / "projection.safetensors"
    if tensors is not None:
        save_file(tensors, path)
    with pytest.raises(InstantiationException, match=rf"method\.condition\.weights is {path}.*{reason}"):
        make(CAPTIONS, condition={"steps": 0, "weights": str(path)})


@pytest.mark.parametrize("part", ["tower", "norms"])
def test_checkpointed_tower_has_the_same_loss_and_gradients(part, make):
    plain, checkpointed, inputs = make(f"trainable={part}"), make(f"trainable={part}"), batch(3)
    checkpointed.backbone.visual.set_grad_checkpointing()  # as backbone.checkpointing=true does
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
        method = make("anchor=features", condition={"steps": 2}, optimizer=optimizer, caption_weight=1.0)
        trainer = fit(method, tmp_path / folder, steps, resume)
        return dict(method.named_parameters()), trainer.optimizers[0].state

    start = dict(make().named_parameters())
    first, _ = run("parts", 2)
    assert all(torch.equal(p, start[name]) for name, p in first.items() if name.startswith("backbone."))
    assert not torch.equal(first["condition.projection.weight"], start["condition.projection.weight"])

    whole, state = run("whole", 4)
    assert not torch.equal(whole["backbone.model.visual.proj"], start["backbone.model.visual.proj"])
    if optimizer["name"] == "AdamW":  # the tower's moments know nothing of stage one
        assert state[whole["condition.projection.weight"]]["step"] == 4
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


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_contrastive_feedback_equals_a_slow_version(shuffled, prediction_type, make):
    """One image and draw at a time. Gradients reach all conditions: own, view's and others'."""
    settings = {"condition": CLASS_TOKEN, "shuffled": shuffled, "feedback": DCR | {"negatives": 2}}
    method = make("patches=none", "feedback=contrastive", **settings)
    inputs, method.diffusion.prediction_type = batch(6), prediction_type
    found = gradients(method, inputs)
    loss = terms(method, inputs)["contrastive"]
    assert terms(method, inputs).keys() == {"contrastive"}
    assert found.keys() == method.trained_names()
    found = {name: gradient.clone() for name, gradient in found.items()}
    method.zero_grad()

    method.seed_draws(0)
    uniform = torch.rand(6, 4, generator=method.ranks.generator)
    noise = torch.randn(6, method.timesteps.draws, 4, 8, 8, generator=method.ranks.generator)
    timesteps = torch.randint(0, 1000, (6, method.timesteps.draws), generator=method.ranks.generator)
    views = random_crops(inputs["image"], uniform, (0.5, 0.8), (0.9, 1.1))
    own, other = (method.condition(*method.backbone.visual_tokens(each)) for each in (inputs["image"], views))
    losses = []
    for i in range(6):
        told = (i + 3) % 6 if shuffled else i
        latent = method.diffusion.encode(inputs["image"][i : i + 1])
        for e, t in zip(noise[i][:, None], timesteps[i][:, None], strict=True):
            noisy, target = method.diffusion.add_noise(latent, e, t), method.diffusion.target(latent, e, t)
            candidates = [own[(told + 1) % 6], own[(told + 2) % 6]]  # 6 * 1 / 6 and 6 * 2 / 6 further on
            assert not shuffled or i not in ((told + 1) % 6, (told + 2) % 6)
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
    method = make("feedback=contrastive", feedback=DCR | {"negatives": 3})
    with pytest.raises(
        ValueError, match=r"A batch of 4 .* all ranks together have 8 images, or lower method.feedback.neg"
    ):
        terms(method, batch(4))
    assert terms(method.eval(), batch(4))["contrastive"].isfinite()


# -- a projection from captions ----------------------------------------------------------------------------------------


def test_condition_of_captions_equals_the_same_by_hand(make):
    """Three tokens a visual token: three linear maps of their own."""
    method, inputs = make(CAPTIONS, condition={"steps": 2, "tokens": 3}), batch(4)
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
                expected = method.condition.projection.weight[part] @ spread + method.condition.projection.bias[part]
                torch.testing.assert_close(
                    found[i, token], expected + method.condition.null.mean(0), atol=1e-5, rtol=1e-4
                )
    assert method.needs.texts == ("captions",)


@pytest.mark.parametrize("optimizer", STRICT, ids=lambda settings: settings["name"])
def test_captions_teach_the_projection_alone_and_images_the_tower_alone(optimizer, make, tmp_path):
    """Whatever the optimizer's decay and momentum; a resumed run repeats it. The control only shuffles stage two."""

    def run(folder, steps, resume=None, **overrides):
        method = make(CAPTIONS, condition={"steps": 2}, optimizer=optimizer, **overrides)
        fit(method, tmp_path / folder, steps, resume)
        return dict(method.named_parameters())

    def moved(before, after):
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    start = dict(make(CAPTIONS, condition={"steps": 2}).named_parameters())
    first, whole = run("parts", 2), run("whole", 4)
    assert moved(start, first) == {"condition"}
    assert moved(first, whole) == {"backbone"}
    assert not moved(whole, run("parts", 4, tmp_path / "parts" / "last.ckpt"))
    if optimizer["name"] == "SGD":
        assert not moved(first, run("control", 2, shuffled=True))
        assert moved(whole, run("control", 4, shuffled=True)) == {"backbone"}


def test_each_stage_has_a_schedule_of_its_own(make, tmp_path):
    """Stage one warms up over two steps and falls over two; so does stage two, at the optimizer's rate."""
    settings = {"condition": {"steps": 4, "lr": 0.3}, "steps": 8, "schedule": {"warmup_steps": 2}}
    method = make(CAPTIONS, **settings, optimizer={"name": "SGD", "lr": 0.1})
    rates, hook = [], method.on_before_optimizer_step

    def watch(optimizer):
        hook(optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups for p in group["params"][:1]])

    method.on_before_optimizer_step = watch
    trainer = fit(method, tmp_path, steps=8)
    groups = trainer.optimizers[0].param_groups
    assert [any(p is method.condition.projection.weight for p in group["params"]) for group in groups[:2]] == [
        True,
        False,
    ]
    factors = [0.5, 1.0, 1.0, 0.5]
    for step, (projection, bias, *tower) in enumerate(rates):
        assert projection == bias
        assert len(tower) == 2
        if step < 4:
            assert projection == pytest.approx(0.3 * factors[step])
        else:
            assert tower == pytest.approx([0.1 * factors[step - 4]] * 2)


def watched(method: DIVA, inputs: dict, batches_seen: int = 0, callback: Watch | None = None) -> dict[str, float]:
    """What `Watch` logs before the step on a batch."""
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=nullcontext))
    if callback is None:
        callback = Watch(every_n_batches=2)
        callback.setup(trainer, method, "fit")
    method.batches_seen, method.notes = batches_seen, {}
    callback.on_train_batch_start(trainer, method, inputs, 0)
    return {name: float(value) for name, value in method.notes.items()}


def test_watching_sees_three_conditions_and_changes_nothing(make):
    method, inputs = make(), batch(4)
    plain = terms(method, inputs)["denoising"]
    found = watched(method, inputs)
    assert found.keys() == {"denoising/right", "denoising/shuffled", "denoising/null", "drift/features"}
    assert torch.equal(terms(method, inputs)["denoising"], plain)
    assert found["denoising/right"] == plain.item()
    assert found["denoising/shuffled"] == terms(make(shuffled=True), inputs)["denoising"].item()
    assert found["drift/features"] == pytest.approx(0, abs=1e-6)
    silent = make()
    with torch.no_grad():  # tokens of nothing leave the null text
        for weight in silent.condition.projection.parameters():
            weight.zero_()
    assert found["denoising/null"] == pytest.approx(terms(silent, inputs)["denoising"].item(), rel=1e-5)
    assert watched(method, inputs, batches_seen=1) == {}
    assert watched(make(feedback=None, caption_weight=1.0), inputs).keys() == {"drift/features"}
    learning = make(CAPTIONS, condition={"steps": 2})
    assert watched(learning, inputs)["denoising/right"] == terms_now(learning, inputs)["denoising"].item()


def terms_now(method: DIVA, inputs: dict) -> dict[str, torch.Tensor]:
    """The terms of the phase that holds the current step."""
    method.seed_draws(0)
    return method.terms(inputs)


def test_drift_is_measured_from_the_pretrained_tower(make):
    method, inputs, callback = make(), batch(4), Watch(every_n_batches=1)
    callback.setup(None, method, "fit")
    assert watched(method, inputs, callback=callback)["drift/features"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        method.backbone.visual.proj.neg_()
    assert watched(method, inputs, callback=callback)["drift/features"] > 1  # features of the other sign
    assert not any(parameter.requires_grad for parameter in callback.original.visual.parameters())


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
    picked = instantiate(settings["condition"]["patches"])(torch.zeros(1, side**2, 3), cpu_draw)
    tokens = torch.cat([torch.zeros(1, 1, 3), picked], dim=1)
    null_text = settings["condition"]["null_text"]
    assert condition_from_tokens(tokens, torch.zeros(77, 3), null_text).shape[1] == TOKENS[backbone]


def test_experiments_are_these_and_the_tiny_one():
    found = {path.stem.removeprefix("diva-") for path in (CONF / "experiment").glob("diva-*.yaml")}
    assert found == {*TOKENS, "reference-tiny"}


def test_shipped_projection_is_the_one_of_the_default_run():
    """It fits the tiny CLIP and the tiny generator, and its file is in the package."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config").method
    assert config.condition.weights.endswith("tiny/projection.safetensors")
    assert config.condition.steps == 0
    method = instantiate(config, backbone=Backbone(str(PACKAGE / "tiny" / "clip")))
    assert not any(name.startswith("condition.") for name in method.trained_names())
    stored = load_file(PACKAGE / "tiny" / "projection.safetensors")
    assert torch.equal(method.condition.projection.weight, stored["condition.projection.weight"])
