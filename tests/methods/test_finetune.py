"""The control: which parts train, and which loss."""

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from open_clip.loss import ClipLoss
from small import batch, build


@pytest.mark.parametrize("train", [["visual"], ["text", "logit_scale"], ["visual", "text", "logit_scale"]])
def test_named_parts_train_and_no_others(train, clip_folder, generator_folder):
    method = build("finetune", clip_folder, generator_folder, train=train)
    for part in ("visual", "text", "logit_scale"):
        tensor = getattr(method.backbone, part)
        flags = {p.requires_grad for p in ([tensor] if part == "logit_scale" else tensor.parameters())}
        assert flags == {part in train}


def test_loss_is_clips_own(clip_folder, generator_folder):
    method, inputs = build("finetune", clip_folder, generator_folder), batch(5)
    model, images = method.backbone.model, (inputs["image"] - method.backbone.mean) / method.backbone.std
    image = F.normalize(model.encode_image(images), dim=-1)
    text = F.normalize(model.encode_text(method.backbone.tokenize(inputs["caption"])), dim=-1)
    expected = ClipLoss()(image, text, model.logit_scale.exp())
    torch.testing.assert_close(method.loss(inputs)["contrastive"], expected, atol=1e-5, rtol=1e-5)


def test_unknown_part_names_the_choices(clip_folder, generator_folder):
    with pytest.raises(InstantiationException, match="visual, text, logit_scale"):
        build("finetune", clip_folder, generator_folder, train=["vision"])
