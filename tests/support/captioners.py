"""Tiny captioners of several kinds with random weights, written to disk in the format of the hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, WIDTH = 16, 8, 16
WORDS = [f"word{number}" for number in range(40)] + ["a", "photo", "of", "what", "is", "this", "user", "bot"]
KINDS = ("blip", "blip2-opt", "blip2-t5", "git", "llava")
TOWER = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": SIDE, "patch_size": PATCH}


def tokenizer(begin: str, end: str, opens: bool, closes: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that adds a start token if `opens`, and an end token if `closes`."""
    special = ["[PAD]", "[UNK]", begin, end, "<image>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(special)
    single = " ".join([begin] * opens + ["$A"] + [end] * closes)
    words.post_processor = TemplateProcessing(single=single, special_tokens=[(begin, 2), (end, 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token=begin, eos_token=end,
        cls_token=begin, sep_token=end,
    )  # fmt: skip


def captioner(kind: str, folder: Path) -> str:
    """Write a captioner and return its folder."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vocabulary = {"vocab_size": 5 + len(WORDS)} | ids
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    clip_pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    if kind == "blip":
        text = TOWER | vocabulary | {"sep_token_id": 3, "encoder_hidden_size": WIDTH, "max_position_embeddings": 64}
        model = BlipForConditionalGeneration(BlipConfig(vision_config=VISION, text_config=text))
        processor = BlipProcessor(pictures, tokenizer("[CLS]", "[SEP]", True, True))
    elif kind in ("blip2-opt", "blip2-t5"):
        opt = {"model_type": "opt", "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 32, "dropout": 0.0}
        opt |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        t5 = {"model_type": "t5", "d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        t5 |= {"decoder_start_token_id": 0, "is_encoder_decoder": True}
        former = TOWER | {"encoder_hidden_size": WIDTH, "vocab_size": 8, "cross_attention_frequency": 1}
        config = Blip2Config(
            vision_config=VISION, qformer_config=former, text_config=vocabulary | (opt if kind == "blip2-opt" else t5),
            num_query_tokens=3, image_token_index=4,
        )  # fmt: skip
        model = Blip2ForConditionalGeneration(config)
        words = tokenizer("<s>", "</s>", kind == "blip2-opt", kind == "blip2-t5")
        processor = Blip2Processor(pictures, words, num_query_tokens=3)
    elif kind == "git":
        config = GitConfig(vision_config=VISION, **TOWER, **vocabulary, max_position_embeddings=64)
        model = GitForCausalLM(config)
        processor = GitProcessor(clip_pictures, tokenizer("[CLS]", "[SEP]", True, True))
    else:
        text = {"model_type": "llama", **TOWER, **vocabulary, "max_position_embeddings": 64}
        vision = {"model_type": "clip_vision_model", "projection_dim": WIDTH, **VISION}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
        model = LlavaForConditionalGeneration(config)
        part = "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
        template = "<s> user {% for part in messages[0]['content'] %}" + part + " {% endfor %}bot"
        processor = LlavaProcessor(
            clip_pictures, tokenizer("<s>", "</s>", True, False), patch_size=PATCH,
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that captions depend on the picture and beams differ
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
