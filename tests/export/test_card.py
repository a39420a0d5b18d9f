"""The model card, read by the hub's own library."""

import pytest
import torch
from huggingface_hub import ModelCard
from kinds import exported
from transformers import AutoTokenizer, CLIPTextModel

from clipfix.export.about import base_model, datasets
from clipfix.export.card import TASKS, readme

SCORES = {
    "before": {"eval/pairs/mean": 51.04, "eval/zeroshot/shape": 99.0},
    "after": {"eval/pairs/mean": 53.46, "eval/zeroshot/shape": 98.5},
}
ABOUT = {
    "model": "ViT-L-14-quickgelu",
    "pretrained": "openai",
    "base_model": "timm/vit_large_patch14_clip_224.openai",
    "licence": "mit",
    "method": "diva",
    "datasets": ["pixparse/cc3m-wds"],
    "language": "en",
    "trained_on": ["a|b\n<script>.tar"],
    "context_length": 77,
    "image_size": 224,
    "dtype": "fp32",
    "weights": "ab12",
    "scores": SCORES,
}


@pytest.mark.parametrize("target", TASKS)
def test_the_hub_reads_the_card(target):
    card = ModelCard(readme(target, ABOUT))
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("timm/vit_large_patch14_clip_224.openai", "finetune")
    assert (data.pipeline_tag, data.datasets, data.language) == (TASKS[target], ["pixparse/cc3m-wds"], "en")
    assert data.license == "mit"
    found = {(one.dataset_type, one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {
        ("pairs", "mean", "mean, before the repair"): 51.04,
        ("pairs", "mean", "mean"): 53.46,
        ("zeroshot", "shape", "shape, before the repair"): 99.0,
        ("zeroshot", "shape", "shape"): 98.5,
    }
    assert r"| trained on | a\|b &lt;script&gt;.tar |" in card.text


def test_what_is_not_known_is_left_out():
    data = ModelCard(
        readme("timm", {**ABOUT, "base_model": None, "licence": None, "datasets": [], "scores": None})
    ).data
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert "base_model_relation" not in data.to_dict()
    assert (data.license, data.license_name) == ("other", "unknown")
    assert "base_model_relation" not in ModelCard(readme("timm", {**ABOUT, "method": None})).data.to_dict()


def test_repositories_of_weights_and_data():
    assert base_model("ViT-B-16-quickgelu", "openai") == "timm/vit_base_patch16_clip_224.openai"
    assert base_model("hf-hub:org/name", None) == "org/name"
    assert base_model("ViT-B-16", "weights.pt") is None
    assert base_model("/my/folder", None) is None
    urls = ["https://huggingface.co/datasets/org/name/resolve/main/{0..3}.tar", "hf://datasets/a/b.c/x.tar", "x.tar"]
    assert datasets([*urls, urls[0]]) == ["org/name", "a/b.c"]


def test_an_added_token_does_not_move_the_end_of_a_text(backbones, tmp_path):
    """With `eos_token_id` 2, transformers would pool at the added token, whose id is the largest."""
    folder = exported(backbones["248 tokens"], "transformers", tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CLIPTextModel.from_pretrained(folder).eval()
    tokenizer.add_tokens(["<cat-toy>"])
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer(["a <cat-toy> on a table"], padding="max_length", return_tensors="pt").input_ids
    assert ids.max() > tokenizer.eos_token_id
    found = model(ids)
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    assert torch.equal(found.pooler_output[0], found.last_hidden_state[0, end])
    assert model.config.eos_token_id == tokenizer.eos_token_id
