"""The command: what a run repaired and scored is what others load."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from front_door import DATA, RUN, WORLD, refusal
from kinds import equal
from safetensors.torch import load_file
from transformers import CLIPModel

from clipfix.models.clip import Backbone, weights_hash
from clipfix.training.checkpoints import load_repair

TINY = Path(__file__).parents[2] / "src" / "clipfix" / "tiny" / "clip"
SLOW = ("pairs", "pairs_local", "probes", "retrieval_short", "retrieval_long")  # one benchmark is scores enough
QUICK = [*RUN, *DATA, *WORLD, "method.steps=2", *(f"~eval.benchmarks.{name}" for name in SLOW)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["method=longclip", "wise=0.5"], id="stretched", marks=pytest.mark.slow),
        pytest.param(
            [
                "method=diva",
                "trainable@method.trainable=lora",
                "condition@method.condition=visual_tokens",
                "patches@method.condition.patches=none",
                "method.condition.null_text=mean",
                "wise=0.5",
                "callbacks.reconstructions=null",
            ],
            id="lora",
        ),
    ],
)
def test_what_was_scored_is_what_is_exported(settings, clipfix, scenes):
    run, _ = clipfix(*settings, scenes, *QUICK, "method.optimizer.lr=0.1", "eval.selection=null")
    results = json.loads((run / "results.json").read_text())
    checkpoint = run / results["checkpoint"]
    # The checkpoint knows its backbone; WiSE and adapters are in its weights.
    _, printed = clipfix("run=export", f"checkpoint={checkpoint}", "to=[open_clip,transformers,timm]", "output=out")
    assert [line.split()[-1] for line in printed.splitlines()] == ["out/open_clip", "out/transformers", "out/timm"]
    exported = Backbone("out/open_clip").eval()
    assert weights_hash(exported.model) == results["weights"]["after"] != results["weights"]["before"]
    images, texts = torch.rand(2, 3, 48, 48), ["a red circle", "two dogs " * 100]
    tokens = exported.tokenize(texts)
    theirs = CLIPModel.from_pretrained("out/transformers").eval()(input_ids=tokens, pixel_values=images * 2 - 1)
    for mine, other in (
        (exported.encode_image(images), theirs.image_embeds),
        (exported.encode_text(tokens), theirs.text_embeds),
    ):
        torch.testing.assert_close(torch.nn.functional.normalize(mine, dim=-1), other, atol=1e-5, rtol=0)
    card, provenance = (Path("out/transformers", name).read_text() for name in ("README.md", "provenance.json"))
    told = json.loads(provenance)
    assert (told["scores"], told["weights"]) == (results["scores"], results["weights"]["after"])
    assert (told["method"], told["wise"], told["context_length"]) == (results["method"], 0.5, exported.context_length)
    assert f"| zeroshot/shape | {results['scores']['before']['eval/zeroshot/shape']:.1f} |" in card
    assert "license: apache-2.0" in card
    assert str(Path.cwd()) not in card + provenance, "where it lies on this machine is nobody's business"
    assert str(TINY) not in card + provenance
    message = refusal(clipfix, "run=export", f"checkpoint={checkpoint}", "to=timm", "output=out")
    assert "overwrite=true" in message
    clipfix("run=export", f"checkpoint={checkpoint}", "to=timm", "output=out", "overwrite=true", "dtype=fp16")
    assert load_file("out/timm/open_clip_model.safetensors")["visual.proj"].dtype == torch.float16


def test_scores_of_other_weights_are_not_told(clipfix, tmp_path):
    """A checkpoint beside a result file that is of another one, as last.ckpt beside best.ckpt's."""
    name = "model.visual.proj"
    weight = torch.rand_like(Backbone(str(TINY)).state_dict()[name])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    saved = {"state_dict": {f"backbone.{name}": weight}, "batches_seen": 1, "global_step": 1}
    torch.save(saved, checkpoint := tmp_path / "run" / "checkpoints" / "last.ckpt")
    scores = {"weights": {"after": "another"}, "scores": {"after": {"eval/zeroshot/shape": 99.0}}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(scores))
    clipfix("run=export", f"checkpoint={checkpoint}", "to=open_clip", "output=out")
    assert "no result file of these very weights" in Path("out/open_clip/README.md").read_text()
    backbone = Backbone(str(TINY))
    load_repair(backbone, str(checkpoint))
    model = open_clip.create_model("local-dir:out/open_clip")
    assert torch.equal(model.visual.proj, weight)


def test_a_model_as_it_is(clipfix):
    """No checkpoint: others' files (backbone.pretrained=longclip-L.pt) go on as any model does."""
    clipfix("run=export", "to=open_clip", "output=out", "licence=mit")
    assert weights_hash(Backbone("out/open_clip").model) == weights_hash(Backbone(str(TINY)).model)
    assert "license: mit" in Path("out/open_clip/README.md").read_text()


def test_the_authors_long_clip_goes_on(clipfix, backbones):
    """Their two position tables in, one table of 248 rows out."""
    known = backbones["248 tokens"]
    state, _ = known.as_open_clip()
    first, second = state["positional_embedding"].clone(), state["positional_embedding"].clone()
    first[20:], second[:20] = 9, 9  # under their masks
    torch.save(state | {"positional_embedding": first, "positional_embedding_res": second}, "longclip.pt")
    source = ["backbone=folder", f"backbone.name={known.folder}", "backbone.pretrained=longclip.pt"]
    clipfix("run=export", *source, "to=transformers", "output=out")
    tokens = known.tokenize(["a red circle", "two dogs " * 100])
    theirs = CLIPModel.from_pretrained("out/transformers").eval().get_text_features(tokens)
    equal(theirs if torch.is_tensor(theirs) else theirs.pooler_output, known.encode_text(tokens))


def test_the_authors_diva_goes_on(clipfix, backbones):
    """What DIVA's training saves, of which the CLIP is one part: in, and out to those who use CLIP."""
    known = backbones["quick gelu"]
    state, _ = known.as_open_clip()
    others = {f"{name}.weight": torch.rand(2) for name in ("vae.conv", "unet.conv_in", "visual_proj", "class_model.fc")}
    torch.save(others | {f"class_model.model.{key}": value for key, value in state.items()}, "diva.pt")
    source = ["backbone=folder", f"backbone.name={known.folder}", "backbone.pretrained=diva.pt"]
    clipfix("run=export", *source, "to=[transformers,open_clip]", "output=out")
    pixels, tokens = torch.rand(2, 3, 32, 32), known.tokenize(["a red circle", "two dogs " * 100])
    theirs = CLIPModel.from_pretrained("out/transformers").eval()
    image, text = theirs.get_image_features(pixels), theirs.get_text_features(tokens)
    equal(image if torch.is_tensor(image) else image.pooler_output, known.model.encode_image(pixels))
    equal(text if torch.is_tensor(text) else text.pooler_output, known.encode_text(tokens))
    drop_in = open_clip.create_model("local-dir:out/open_clip").eval()
    equal(drop_in.encode_image(pixels), known.model.encode_image(pixels))
    assert "diva.pt" in Path("out/open_clip/README.md").read_text()


def test_mistakes_are_told_before_any_work(clipfix, monkeypatch, tmp_path):
    def no_model(*_, **__):
        raise AssertionError("a model was built first")

    monkeypatch.setattr(Backbone, "__init__", no_model)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    Path("a-file").touch()
    for words, told in (
        (["to=comfui"], "choose from open_clip, transformers"),
        (["to=[]"], "export.to is empty"),
        (["to=null"], "export.to is empty"),
        (["output=null"], "export.output is null"),
        (["output=a-file"], "a-file"),
        (["overwrite=maybe"], 'export.overwrite is "maybe"'),
        (["dtype=int8"], "'fp32', 'fp16' or 'bf16'"),
        (["to=[timm,llava]", "push_to=me/model"], "export.to has 2"),
        (["to=timm", "push_to=me/model"], "needs a login at the hub"),
        (["output=/"], "checkpoint=nowhere.ckpt does not exist"),
    ):
        assert told in refusal(clipfix, "run=export", "checkpoint=nowhere.ckpt", *words)
