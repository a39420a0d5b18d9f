"""Pseudo-captions by any image-to-text or vision-language model of `transformers`, into the json of each sample."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from clipfix.annotate import Annotator, Raw, Sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Captions(Annotator):
    """Write `captions` texts of each picture, the likeliest first, to `key` of its json; the rest of it is unchanged.

    Beam search is deterministic: the same model writes the same shards. The model continues or answers `prompt`; a chat
    model gets it with the picture in its own chat template.
    """

    def __init__(
        self,
        output: str,
        batch_size: int,
        model: str,
        revision: str | None,
        trust_remote_code: bool,
        dtype: str,
        prompt: str | None,
        key: str,
        captions: int,
        beams: int,
        min_new_tokens: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(output, batch_size)
        if captions < 1:
            raise ValueError(f"annotator.captions={captions} must be 1 or more.")
        if beams < captions:
            raise ValueError(
                f"annotator.beams={beams} is too few for annotator.captions={captions}, which are the best beams: "
                f"set annotator.beams={captions} or more"
            )
        if dtype not in DTYPES:
            raise ValueError(f"annotator.dtype={dtype}: choose {' or '.join(DTYPES)}")
        self.key, self.captions, self.floats = key, captions, DTYPES[dtype]
        self.search: dict[str, Any] = {
            "num_beams": beams,
            "num_return_sequences": captions,
            "min_new_tokens": min_new_tokens,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
        }
        options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        try:
            if not Path(
                model
            ).is_dir():  # first, because without a network it fails at once and the others after minutes
                snapshot_download(model, revision=revision, allow_patterns="config.json")
            self.processor = AutoProcessor.from_pretrained(model, **options)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=self.floats, **options)
        except (OSError, ValueError) as error:
            way_out = "name an image-to-text model of the hub, or a folder that holds one and its processor"
            if "custom code" in str(error):
                way_out = "read that code, and set annotator.trust_remote_code=true if you trust it"
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"annotator.model={model} cannot be loaded ({reason}): {way_out}") from error
        self.model.requires_grad_(False)
        self.model.generation_config.max_length = (
            None  # set together with max_new_tokens it causes a warning in every batch
        )
        self.prepare = partial(read, self.processor, self.model.config.model_type, asked(self.processor, prompt, model))
        try:
            self.prepare([{"image": Image.new("RGB", (64, 64))}])
        except Exception as error:  # every processor has its own errors
            raise ValueError(
                f"annotator.model={model} does not take a picture with annotator.prompt={prompt} ({error})"
            ) from error

    def annotate(self, raws: list[Raw], inputs: dict[str, Tensor]) -> list[dict[str, bytes]]:
        inputs = {name: x.to(self.floats) if x.is_floating_point() else x for name, x in inputs.items()}
        # A copy of the prompt, because BLIP changes the one that it gets.
        prompt = inputs["input_ids"].clone() if "input_ids" in inputs else None
        output = self.model.generate(**inputs, **self.search)
        found = self.processor.batch_decode(without_prompt(output, prompt), skip_special_tokens=True)
        texts = [text.strip() for text in found]
        several = [texts[i : i + self.captions] for i in range(0, len(texts), self.captions)]
        return [
            {"json": with_key(raw.get("json", b"{}"), self.key, captions)}
            for raw, captions in zip(raws, several, strict=True)
        ]


def asked(processor: Any, prompt: str | None, model: str) -> str | None:
    """Return the prompt in the form in which this model was trained."""
    if not getattr(processor, "chat_template", None):
        return prompt
    if prompt is None:
        raise ValueError(
            f"annotator.model={model} is a chat model: set annotator.prompt='Describe the picture in one "
            "sentence.' or the like"
        )
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def read(processor: Any, model_type: str, prompt: str | None, samples: list[Sample]) -> dict[str, Tensor]:
    """Return the model inputs for these samples: their pixels, each with the prompt."""
    images = [sample["image"] for sample in samples]
    if prompt is None:
        return dict(processor(images=images, return_tensors="pt"))
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # generation appends on the right
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {"text": [prompt] * len(images), "padding": True, "return_tensors": "pt"}
    if getattr(processor, "chat_template", None):
        images = [[image] for image in images]  # assigns pictures to chats
        if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
            options["add_special_tokens"] = False  # the template contains them
    inputs = dict(processor(images=images, **options))
    if model_type == "git":  # the tokenizer appends an end token, but the caption continues the text
        inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
    return inputs


def without_prompt(output: Tensor, prompt: Tensor | None) -> Tensor:
    """Return the new tokens, [b * k, l], for prompts [b, n].

    Decoder-only models return the prompt too: LLaVA, GIT and BLIP-2 with OPT unchanged, BLIP with another first token
    and without its last. Models with an encoder, such as BLIP-2 with T5, return new tokens only. The tokens decide.
    """
    if prompt is None:
        return output
    prompt = prompt.repeat_interleave(len(output) // len(prompt), dim=0)
    last = prompt.shape[1] - 1
    if not torch.equal(output[:, 1:last], prompt[:, 1:last]):
        return output
    return output[:, last + 1 :] if torch.equal(output[:, last], prompt[:, last]) else output[:, last:]


def with_key(data: bytes, key: str, value: Any) -> bytes:
    """Return a json object with this key set. All other bytes are unchanged, which parsing would not guarantee."""
    encoding = json.detect_encoding(data)
    text, scan = data.decode(encoding, "surrogatepass"), json.JSONDecoder().raw_decode
    entry = f"{json.dumps(key)}: {json.dumps(value)}"
    first = end = text.index("{") + 1
    while text[start := between(text, end)] != "}":
        name, end = scan(text, start)
        _, end = scan(text, between(text, end))
        if name == key:
            text = text[:start] + entry + text[end:]
            break
    else:
        text = text[:end] + (", " if end > first else "") + entry + text[end:]
    return text.encode(encoding, "surrogatepass")


def between(text: str, place: int) -> int:
    """Return the position of the next name (after a comma) or value (after a colon)."""
    while text[place] in " \t\n\r,:":
        place += 1
    return place
