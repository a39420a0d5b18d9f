"""SigLIP as a backbone: its own loss, its scale above 100, its bias in training, and no change at rate zero."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from kinds import SIGLIP
from kinds import build as build_backbone
from open_clip.loss import SigLipLoss
from small import batch, build

from clipfix.methods.base import Method
from clipfix.training.ranks import Ranks

PLAIN = {
    "finetune": {},
    "longclip": {"ratio": 1, "keep_tokens": 0, "components": 3, "label_smoothing": 0.0},
    "fff": {},
    "diva": {"caption_weight": 1.0, "condition": {"null_text": "mean", "patches": {"amount": 7}}},
}


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> str:
    """Return a folder of a small SigLIP."""
    folder = tmp_path_factory.mktemp("siglip")
    build_backbone(folder, SIGLIP)
    return str(folder)


def make(name: str, siglip_folder: str, generator_folder: str, **overrides) -> Method:
    """Return a method on a small SigLIP with the scale and the bias of a published one."""
    method = build(name, siglip_folder, generator_folder, **PLAIN[name], **overrides)
    method.backbone.logit_scale.data.fill_(117.3).log_()
    method.backbone.logit_bias.data.fill_(-12.9)
    return method


def step(method: Method, rate: float) -> None:
    """Take two optimizer steps as Lightning does, with the hook that limits the scale."""
    method.optimizer_settings = {"name": "AdamW", "lr": rate, "weight_decay": 0.1}
    optimizer = method.configure_optimizers()["optimizer"]
    method.start(iter([batch(6)]))
    for number in range(2):
        method.seed_draws(number)
        optimizer.zero_grad()
        torch.stack(list(method.loss(batch(6, number)).values())).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        method.on_train_batch_end()


@pytest.mark.parametrize("name", PLAIN)
def test_rate_zero_changes_no_feature_scale_or_bias(name, siglip_folder, generator_folder):
    method = make(name, siglip_folder, generator_folder)
    model = method.backbone
    images, texts = batch(4)["image"], ["a red circle", "", "two dogs above them", "a word " * 300]
    with torch.no_grad():
        before = model.encode_image(images), model.encode_text(model.tokenize(texts))
    step(method, 0.0)
    with torch.no_grad():
        after = model.encode_image(images), model.encode_text(model.tokenize(texts))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert model.logit_scale.exp().item() == pytest.approx(117.3)
    assert model.logit_bias.item() == pytest.approx(-12.9)


@pytest.mark.parametrize("name", ["finetune", "longclip", "fff"])
def test_scale_and_bias_train_without_a_limit(name, siglip_folder, generator_folder):
    method = make(
        name, siglip_folder, generator_folder, **({"train": ["visual", "logit_scale"]} if name == "finetune" else {})
    )
    step(method, 1e-3)
    scale, bias = method.backbone.logit_scale.exp().item(), method.backbone.logit_bias.item()
    assert scale > 110
    assert scale != pytest.approx(117.3, abs=1e-4)
    assert bias != pytest.approx(-12.9, abs=1e-6)


def test_contrast_is_siglips_loss(siglip_folder, generator_folder):
    method = make("finetune", siglip_folder, generator_folder)
    image, text = (F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (0, 1))
    found = method.contrast(image, text, 0.0)
    expected = SigLipLoss()(image, text, method.backbone.logit_scale.exp(), method.backbone.logit_bias)
    torch.testing.assert_close(found, expected)


def test_two_ranks_have_the_loss_and_gradient_of_one(siglip_folder, generator_folder, monkeypatch):
    method = make("finetune", siglip_folder, generator_folder).double()
    image, text = (torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    results = []
    for ranks in (1, 2):
        rows = [F.normalize(part.clone(), dim=-1).requires_grad_() for part in (image, text)]
        losses = []
        for rank in range(ranks):
            part = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
            monkeypatch.setattr(Ranks, "rank", rank)
            monkeypatch.setattr(Ranks, "gather", lambda self, _, joined=rows[1]: joined)
            losses.append(method.contrast(rows[0][part], rows[1][part], 0.0))
        loss = torch.stack(losses).mean()
        loss.backward()
        results.append((loss.detach(), rows[0].grad, rows[1].grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


def test_what_does_not_go_with_the_sigmoid_loss_is_refused(siglip_folder, generator_folder):
    with pytest.raises(InstantiationException, match=r"method\.label_smoothing=0"):
        build("longclip", siglip_folder, generator_folder, ratio=1, keep_tokens=0, label_smoothing=0.1)
    with pytest.raises(InstantiationException, match=r"objective@method\.objective=sigmoid"):
        build("fff", siglip_folder, generator_folder, "objective=softmax")


def test_longer_context_is_refused(siglip_folder, generator_folder):
    """The feature is read from the last position, and that of a longer context was never trained."""
    with pytest.raises(InstantiationException, match=r"last position.*method\.ratio=1"):
        build("longclip", siglip_folder, generator_folder, ratio=4, keep_tokens=4, label_smoothing=0.0)


def test_clips_scale_is_still_limited(clip_folder, generator_folder):
    method = build("finetune", clip_folder, generator_folder, train=["visual", "logit_scale"])
    method.backbone.logit_scale.data.fill_(5.0)
    assert isinstance(method, L.LightningModule)
    method.on_train_batch_end()
    assert method.backbone.logit_scale.exp().item() == pytest.approx(100)
