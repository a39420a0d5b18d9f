"""The tokenizer files give the ids that open_clip gives."""

import random
import re
from pathlib import Path

import open_clip
import pytest
import torch
from kinds import SIGLIP, TEXTS, build, exported
from transformers import AutoTokenizer, CLIPTokenizer

CORPUS = """\
It’s “quoted” & plain naïve café ﬁne ＡＢＣ １２ 東京 タワー 서울 Москва ΟΔΟΣ ΣΟΦΟΣ, मुंबई ไทย العربية עברית 😀 👩‍👩‍👧 🇩🇪
don't we'll I'M can’t x² 3.14 #tag @me C++ ½ &amp; &lt;b&gt; &quot;q&quot; &amp;lt; İstanbul straße ß — – … • ™ ©
e\u0301 \u200b \u3000wide \x07bell ... !!! _under_ http://x.y/z?a=b&c=d ŉ ǆ ſ ﷺ ｶﾞ antidisestablishmentarianism"""
WORDS = [*re.split("[ \n]", CORPUS), "a\tb\nc"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return ["", " ", *(" ".join(draw.choices(WORDS, k=draw.randint(1, 120))) for _ in range(998))]


@pytest.mark.parametrize("kind", ["248 tokens", "quick gelu"])
def test_ids_are_open_clips(kind, backbones, texts, tmp_path):
    backbone = backbones[kind]
    length = backbone.context_length
    tokenizer = AutoTokenizer.from_pretrained(exported(backbone, "transformers", tmp_path))
    theirs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = open_clip.SimpleTokenizer(context_length=length)(texts)
    past_end = torch.arange(length) > ours.argmax(1, keepdim=True)
    assert past_end.any()
    assert torch.equal(theirs, ours.masked_fill(past_end, tokenizer.pad_token_id))
    assert int(theirs.max()) == 49407, "ids past the vocabulary, as marks of another name would get"


def test_ids_of_the_pipelines_tokenizer_are_open_clips_where_nothing_needs_cleaning(backbones, texts, tmp_path):
    """transformers' own class, which pipelines name, knows no ftfy: curly quotes, wide letters and html stay."""
    folder = exported(backbones["248 tokens"], "diffusers", tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    plain = [text.encode("ascii", "ignore").decode().replace("&", "and").replace("\x07", "") for text in texts]
    ours = open_clip.SimpleTokenizer(context_length=248)(plain)
    for row, expected in zip(tokenizer(plain, truncation=True).input_ids, ours, strict=True):
        assert row == expected[: int(expected.argmax()) + 1].tolist()


def test_siglips_ids_with_its_cleaning(backbones, texts, tmp_path):
    backbone = backbones["siglip, 40 tokens"]
    tokenizer = AutoTokenizer.from_pretrained(exported(backbone, "transformers", tmp_path))
    known = [*texts[:200], *TEXTS, "A RED, circle_above: (two) dogs!"]
    theirs = tokenizer(known, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, backbone.tokenize(known))
    assert tokenizer(known[-1]).input_ids == [2, 3, 4, 9, 5, 6, 0]


def test_a_model_whose_tokenizer_is_not_at_hand_says_so(tmp_path):
    backbone = build(tmp_path / "model", SIGLIP)
    for path in Path(backbone.folder or "").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="Cannot fetch of-the-hub"):
        exported(backbone, "transformers", tmp_path)
    exported(backbone, "llava", tmp_path)  # needs none
