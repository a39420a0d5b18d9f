"""What only a GPU can show. `pytest -m gpu` runs these; on a machine without one they are skipped."""

import copy
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from packed import LENGTHS, gradients, texts
from packed import build as build_text
from ports import free_port
from shards import numbered
from small import METHODS, batch, build
from torch.utils.data import DataLoader, IterableDataset

import clipfix.models.packed_text as packing
from clipfix import PACKAGE
from clipfix.data.decoding import in_unit_range
from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.evals.base import evaluate, percentages
from clipfix.evals.features import scoring
from clipfix.evals.retrieval import Retrieval
from clipfix.functional.contrastive import contrastive_loss
from clipfix.functional.sigmoid import sigmoid_loss
from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.models.packed_text import encode_packed
from clipfix.training.checkpoints import WholeFiles
from clipfix.training.strategy import FSDP2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
STEPS = 4
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts


@pytest.fixture
def deterministic():
    """torch promises the same bits twice only where it is asked for them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Stream(IterableDataset):
    """Batch n at step n, also after resuming."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __iter__(self):
        return (batch(8, seed) for seed in range(self.method.batches_seen, 100))


def fit(method: Method, folder: Path, steps: int = STEPS, resume: Path | None = None, **how: Any) -> Method:
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, every_n_train_steps=1)
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="gpu", devices=1, logger=False, callbacks=[last],
        plugins=[WholeFiles()], enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        log_every_n_steps=1, **how,
    )  # fmt: skip
    trainer.fit(method, DataLoader(Stream(method), batch_size=None), ckpt_path=resume, weights_only=True)
    return method.cpu()


def weights(method: Method) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu() for name, weight in method.named_parameters() if weight.requires_grad}


# -- towers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", ["mixed", "empty texts"])
def test_packed_text_tower(dtype: torch.dtype, lengths: str) -> None:
    model, tokens = build_text(), texts(LENGTHS[lengths])
    exact = model.encode_text(tokens)
    expected = gradients(model.text, exact)
    there = copy.deepcopy(model).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        ours = encode_packed(there.text, tokens.cuda())
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert (ours.cpu().float() - exact).abs().max() < tolerance * exact.abs().max()
    found = gradients(there.text, ours.cpu().float())
    for name, gradient in found.items():
        assert (gradient.cpu() - expected[name]).norm() < 10 * tolerance * expected[name].norm(), name


def test_text_attention_in_one_call_equals_groups(monkeypatch) -> None:
    if not packing.HAS_VARLEN:
        pytest.skip("this torch has no variable-length attention")
    model, tokens = build_text().cuda(), texts(LENGTHS["mixed"]).cuda()
    features = []
    for one_call in (True, False):
        monkeypatch.setattr(packing, "HAS_VARLEN", one_call)
        with torch.autocast("cuda", torch.bfloat16):
            features.append(encode_packed(model.text, tokens).float())
    assert (features[0] - features[1]).abs().max() < 0.02 * features[1].abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_towers_equal_those_of_a_cpu(compiled: bool) -> None:
    """Features and gradients, in fp32; compiled blocks, and self-attention without copies, are the same function."""
    folder = str(PACKAGE / "tiny" / "clip")
    here, there = Backbone(folder), Backbone(folder, compiled=compiled).cuda()
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = ["a red fish", "two stars above a house, and a long sentence that goes on", "", "left"]
    found = []
    for clip, images in ((here, pictures), (there, pictures.cuda())):
        pooled, patches = clip.visual_tokens(images)
        text = clip.encode_text(clip.tokenize(captions))
        (pooled.square().sum() + patches.square().sum() + text.square().sum()).backward()
        grads = {name: weight.grad.cpu() for name, weight in clip.named_parameters() if weight.grad is not None}
        found.append(({"pooled": pooled, "patches": patches, "text": text}, grads))
    for name, expected in found[0][0].items():
        torch.testing.assert_close(found[1][0][name].cpu(), expected, atol=2e-4, rtol=1e-3)
    assert found[0][1].keys() == found[1][1].keys()
    for name, expected in found[0][1].items():
        assert (found[1][1][name] - expected).norm() <= 2e-3 * expected.norm() + 1e-5, name


def test_generator_in_bf16_is_near_fp32(generator_folder) -> None:
    from clipfix.models.diffusion import Diffusion

    exact, half = (Diffusion(generator_folder, dtype=dtype).cuda() for dtype in ("fp32", "bf16"))
    assert half.unet.dtype == torch.bfloat16
    latents = torch.randn(4, 4, 8, 8, device="cuda")
    timesteps = torch.tensor([10, 300, 600, 990], device="cuda")
    answers = [model.predict(latents, timesteps, model.condition(["a", "b", "c", "d"])) for model in (exact, half)]
    assert answers[1].dtype == torch.float32
    assert (answers[0] - answers[1]).norm() < 0.03 * answers[0].norm()


# -- losses ------------------------------------------------------------------------------------------------------------


def test_fused_losses_equal_those_of_a_cpu() -> None:
    """The sigmoid loss in tiles and the contrastive loss in chunks, loss and gradients, in fp32."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(96, 32, generator=generator), torch.randn(96, 3, 32, generator=generator)
    positive = torch.rand(96, 96, 3, generator=generator) < 0.1
    found = []
    for device in ("cpu", "cuda"):
        a, b = (
            part.to(device).div(part.norm(dim=-1, keepdim=True).to(device)).requires_grad_() for part in (image, text)
        )
        scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (30.0, -8.0))
        mask = positive.to(device)
        mined = sigmoid_loss(a, b, scale, bias, lambda part, mask=mask: mask[:, part], tile=40)
        chunked = contrastive_loss(a, b[:, 0], a, b[:, 0], scale, 0, 0.1, max_similarities=96 * 20)
        (mined + chunked).backward()
        found.append([value.detach().cpu() for value in (mined, chunked, a.grad, b.grad, scale.grad, bias.grad)])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_step_equals_that_of_a_cpu(name, clip_folder, generator_folder) -> None:
    """Every method, in fp32, with the draws of the GPU's own generator: finite, and the loss near where a CPU's is."""
    method = build(name, clip_folder, generator_folder).cuda()
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch(8).items()}
    method.seed_draws(0)
    total = torch.stack(list(method.loss(inputs).values())).sum()
    total.backward()
    here = build(name, clip_folder, generator_folder)
    here.seed_draws(0)
    expected = torch.stack(list(here.loss(batch(8)).values())).sum()
    drawn = name in ("diva", "denoise")  # noise of another generator
    assert total.item() == pytest.approx(expected.item(), rel=0.5 if drawn else 1e-4)
    assert all(weight.grad.isfinite().all() for weight in method.parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_on_a_gpu_to_the_same_bits(name, deterministic, clip_folder, generator_folder, tmp_path) -> None:
    whole = fit(build(name, clip_folder, generator_folder), tmp_path / "whole")
    fit(build(name, clip_folder, generator_folder), tmp_path / "parts", steps=2)
    rest = fit(build(name, clip_folder, generator_folder), tmp_path / "parts", resume=tmp_path / "parts" / "last.ckpt")
    for key, expected in weights(whole).items():
        assert torch.equal(weights(rest)[key], expected), key


@pytest.fixture
def process_group(monkeypatch):
    """A port of its own, and no group left for the next test."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nccl_with_one_rank_equals_no_ranks(strategy, clip_folder, generator_folder, tmp_path, process_group) -> None:
    """DDP and FSDP2 over NCCL, in fp32: the same weights as one device alone, frozen rows and all."""
    alone = fit(build("longclip", clip_folder, generator_folder), tmp_path / "alone")
    how = FSDP2() if strategy == "fsdp" else "ddp"
    ranks = build("longclip", clip_folder, generator_folder)
    before = ranks.backbone.text.positional_embedding.detach()[:6].clone()
    fit(ranks, tmp_path / "ranks", strategy=how)
    assert dist.get_backend() == "nccl"
    saved = torch.load(tmp_path / "ranks" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    for key, expected in weights(alone).items():
        torch.testing.assert_close(saved[key], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(saved["backbone.model.text.positional_embedding"][:6], before)


def test_frozen_rows_and_weights_stay_bit_identical(clip_folder, generator_folder, tmp_path) -> None:
    method = build(
        "longclip", clip_folder, generator_folder, optimizer={"name": "AdamW", "lr": 0.1, "weight_decay": 1.0}
    )
    rows = method.backbone.text.positional_embedding.detach()[:6].clone()
    fit(method, tmp_path / "a", precision="bf16-mixed")
    assert torch.equal(method.backbone.text.positional_embedding.detach()[:6], rows)
    diva = build("diva", clip_folder, generator_folder)
    frozen = {name: weight.detach().clone() for name, weight in diva.named_parameters() if not weight.requires_grad}
    fit(diva, tmp_path / "b", precision="bf16-mixed")
    assert all(torch.equal(weight, frozen[name]) for name, weight in diva.named_parameters() if name in frozen)


def test_losses_take_tf32_in_a_mixed_precision_step_alone(clip_folder, generator_folder, tmp_path) -> None:
    seen: dict[str, set[str]] = {}

    def watch(method: Method, key: str) -> Method:
        loss = method.loss
        found = seen.setdefault(key, set())
        method.loss = lambda inputs: found.add(torch.get_float32_matmul_precision()) or loss(inputs)
        return method

    for precision in ("32-true", "bf16-mixed"):
        fit(
            watch(build("finetune", clip_folder, generator_folder), precision),
            tmp_path / precision,
            precision=precision,
        )
    assert seen == {"32-true": {"highest"}, "bf16-mixed": {"high"}}
    assert torch.get_float32_matmul_precision() == "highest"


# -- scores and data ---------------------------------------------------------------------------------------------------


def test_scores_are_fp32_whatever_surrounds_them(tmp_path) -> None:
    """Within autocast and with TF32 allowed, features and scores are those of fp32; and equal to a CPU's."""
    numbered(tmp_path / "shards", [12])
    backbone = Backbone(str(PACKAGE / "tiny" / "clip"))
    benchmark = Retrieval(str(tmp_path / "shards"), {"key": "txt", "pick": "one"}, recall_at=[1, 5])
    here = percentages(evaluate(backbone, {"retrieval": benchmark}))
    backbone.cuda()
    pictures = torch.rand(3, 3, 64, 64)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            there = percentages(evaluate(backbone, {"retrieval": benchmark}))
            with scoring(backbone):
                features = backbone.encode_image(pictures.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.cpu(), backbone.cpu().encode_image(pictures).detach(), atol=1e-4, rtol=1e-4)
    assert there == pytest.approx(here, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_with_their_tokens(workers, clip_folder, tmp_path) -> None:
    numbered(tmp_path, [12])
    method = build("finetune", clip_folder, "no generator")
    data = ShardData(
        str(tmp_path), None, {"caption": {"key": "txt", "pick": "one"}}, batch_size=4, workers=workers, shuffle=0,
        seed=0, needs=Needs(32, ("caption",), method.needs.encode),
    )  # fmt: skip
    data.setup()
    found = next(iter(data.train_dataloader()))
    assert found["image"].is_pinned()
    assert found["tokens"]["caption"].is_pinned()
    assert torch.equal(found["tokens"]["caption"], method.backbone.tokenize(found["caption"]))


def test_bytes_become_the_same_floats_on_a_gpu() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(in_unit_range(every.cuda()).cpu(), in_unit_range(every))


def test_the_trainer_of_gpus_is_bf16() -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "trainer" / "gpu.yaml").trainer
    trainer = instantiate({"_target_": "lightning.Trainer", **config, "logger": False})
    assert trainer.precision == "bf16-mixed"
    assert torch.cuda.is_bf16_supported(including_emulation=False)
