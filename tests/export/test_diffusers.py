"""Pipelines made of tiny parts draw a picture from a prompt that only a stretched text tower reads to its end."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from kinds import TEXTS, equal, exported, loaded, text_features
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPT = "a red circle " * 66 + "and two dogs"  # 201 tokens and two marks


def unet(width: int, **more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **more,
    )  # fmt: skip


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)


def drawn(pipeline, prompt: str) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(
        pipeline(prompt, num_inference_steps=2, generator=generator, height=8, width=8, output_type="np").images
    )


def test_stable_diffusion_reads_200_tokens(backbones, tmp_path):
    folder = exported(backbones["248 tokens"], "diffusers", tmp_path)
    encoder = loaded(CLIPTextModel, folder, "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    assert (tokenizer.model_max_length, tokenizer.pad_token) == (248, "<|endoftext|>")
    assert len(tokenizer(PROMPT).input_ids) > 200
    StableDiffusionPipeline(
        vae(), encoder, tokenizer, unet(32), DDIMScheduler(), None, None, requires_safety_checker=False
    ).save_pretrained(tmp_path / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    picture = drawn(pipeline, PROMPT)
    assert picture.isfinite().all()
    assert not torch.equal(picture, drawn(pipeline, PROMPT.replace("two dogs", "two cats")))  # its end is read
    tokens = pipeline.tokenizer(TEXTS[:2], padding="max_length", return_tensors="pt").input_ids
    features = pipeline.text_encoder(tokens).pooler_output @ backbones["248 tokens"].text.text_projection
    equal(features, text_features(backbones["248 tokens"], TEXTS[:2]))


def sdxl(first: Path, second: Path) -> StableDiffusionXLPipeline:
    more = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 48,
    }  # fmt: skip
    return StableDiffusionXLPipeline(
        vae(),
        loaded(CLIPTextModel, first, "text_encoder"),
        loaded(CLIPTextModelWithProjection, second, "text_encoder_2"),
        CLIPTokenizer.from_pretrained(first, subfolder="tokenizer"),
        CLIPTokenizer.from_pretrained(second, subfolder="tokenizer_2"),
        unet(64, **more),
        DDIMScheduler(),
        add_watermarker=False,
    )


def test_sdxl_joins_two_encoders_of_one_length(backbones, tmp_path):
    long, short = (exported(backbones[kind], "diffusers", tmp_path / kind) for kind in ("248 tokens", "quick gelu"))
    second = exported(backbones["248 tokens"], "diffusers_2", tmp_path)
    pipeline = sdxl(long, second)
    assert pipeline.tokenizer_2.pad_token_id == 0
    picture = drawn(pipeline, PROMPT)
    assert picture.isfinite().all()
    assert not torch.equal(picture, drawn(pipeline, PROMPT.replace("two dogs", "two cats")))
    features = pipeline.text_encoder_2(
        pipeline.tokenizer_2(TEXTS[:2], padding="max_length", return_tensors="pt").input_ids
    )
    equal(features.text_embeds, text_features(backbones["248 tokens"], TEXTS[:2]))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        drawn(sdxl(short, second), PROMPT)
