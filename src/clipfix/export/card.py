"""Description of an exported folder: README.md for people and the hub, provenance.json for programs."""

import html
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from clipfix.export.folder import PROVENANCE, Files
from clipfix.models.clip import Backbone

LIBRARIES = {
    "open_clip": "open_clip",
    "transformers": "transformers",
    "llava": "transformers",
    "diffusers": "diffusers",
    "diffusers_2": "diffusers",
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
}
TASKS = {  # the hub's names
    "open_clip": "zero-shot-image-classification",
    "transformers": "zero-shot-image-classification",
    "llava": "image-feature-extraction",
    "diffusers": "feature-extraction",
    "diffusers_2": "feature-extraction",
    "sentence_transformers": "sentence-similarity",
    "timm": "image-feature-extraction",
    "comfyui": "feature-extraction",
}
USE = {
    "open_clip": """model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
inputs = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")""",
    "llava": """# LLaVA: --vision_tower FOLDER, or "mm_vision_tower" in its config.json
tower = AutoModel.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")""",
    "diffusers": """text_encoder = CLIPTextModel.from_pretrained("FOLDER", subfolder="text_encoder")
tokenizer = CLIPTokenizer.from_pretrained("FOLDER", subfolder="tokenizer")
pipeline = StableDiffusionPipeline.from_pretrained(model, text_encoder=text_encoder, tokenizer=tokenizer)
# SDXL joins its two encoders token by token, so both must read LENGTH tokens""",
    "diffusers_2": """text_encoder = CLIPTextModelWithProjection.from_pretrained("FOLDER", subfolder="text_encoder_2")
tokenizer = CLIPTokenizer.from_pretrained("FOLDER", subfolder="tokenizer_2")
# SDXL joins its two encoders token by token, so both must read LENGTH tokens
pipeline = StableDiffusionXLPipeline.from_pretrained(model, text_encoder_2=text_encoder, tokenizer_2=tokenizer, ...)""",
    "sentence_transformers": """model = SentenceTransformer("FOLDER")  # 6 or later
features = model.encode(texts_or_pictures)""",
    "timm": """model = timm.create_model("local-dir:FOLDER", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))""",
    "comfyui": "# put the .safetensors into ComfyUI/models/text_encoders and choose it in DualCLIPLoader or CLIPLoader",
}


def files(backbone: Backbone, target: str, about: Mapping[str, Any]) -> Files:
    """`about`: `facts` of the export's verb, and `scores` where a result file is about these very weights."""
    about = {**about, "target": target, "context_length": backbone.context_length, "image_size": backbone.image_size}
    return {"README.md": readme(target, about), PROVENANCE: about}


def metadata(target: str, about: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata of the model card, as the hub reads it."""
    licence = about.get("licence")
    scores = results(target, about)
    return ModelCardData(
        base_model=about.get("base_model"),
        base_model_relation="finetune" if about.get("base_model") and about.get("method") else None,
        datasets=list(about.get("datasets") or ()) or None,
        eval_results=scores or None,
        language=about.get("language"),
        library_name=LIBRARIES.get(target),
        license=licence or "other",
        license_name=None if licence else "unknown",
        model_name=about["model"] if scores else None,
        pipeline_tag=TASKS[target],
        tags=["clip", "clipfix"],
    )


def results(target: str, about: Mapping[str, Any]) -> list[EvalResult]:
    """Return the scores for the hub's `model-index`, in percent. Those before training say so in their names."""
    listed = []
    for column, scores in (about.get("scores") or {}).items():
        for name, value in scores.items():
            benchmark, _, metric = name.removeprefix("eval/").partition("/")
            shown = metric.replace("_", " ")
            listed.append(
                EvalResult(
                    task_type=TASKS[target],
                    dataset_type=benchmark,
                    dataset_name=benchmark.replace("_", " "),
                    metric_type=metric,
                    metric_name=f"{shown}, before the repair" if column == "before" else shown,
                    metric_value=round(value, 2),
                )
            )
    return listed


def plain(value: Any) -> str:
    """Return a value as text for Markdown: a table's bars, html and newlines in a name stay text."""
    return " ".join(html.escape(str(value), quote=False).replace("|", "\\|").split())


def readme(target: str, about: Mapping[str, Any]) -> str:
    """Return the model card: origin, how to load it, scores, limits."""
    licence, method = about.get("licence"), about.get("method")
    lines = ["---", metadata(target, about).to_yaml(), "---", ""]
    lines += [f"# {plain(about['model'])}, {f'repaired by {plain(method)}' if method else 'as it was'}", ""]
    lines += ["Written by clipfix. How it loads:", "", "```python"]
    lines += [USE[target].replace("LENGTH", str(about["context_length"])), "```", ""]
    lines += ["## Where it comes from", ""]
    unknown = "not known here: look it up before you pass the model on"
    rows = {
        "base model on the hub": about.get("base_model"),
        "base model": " ".join(str(part) for part in (about["model"], about.get("pretrained")) if part),
        "licence of the base weights": licence or unknown,
        "method": " ".join(str(about[key]) for key in ("method", "control") if about.get(key)) or "none",
        "share of the trained weights (WiSE)": about.get("wise"),
        "trained on": ", ".join(about.get("trained_on") or ()) or None,
        "steps": about.get("step"),
        "seed": about.get("trained_with_seed"),
        "text": f"{about['context_length']} tokens",
        "pictures": f"{about['image_size']} x {about['image_size']}",
        "precision": about["dtype"],
        "SHA-256 of the weights": about["weights"],
    }
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {plain(value)} |" for name, value in rows.items() if value is not None),
        "",
    ]
    lines += ["The whole recipe is in provenance.json.", "", *scored(about), *limits(target, about)]
    return "\n".join(lines) + "\n"


def scored(about: Mapping[str, Any]) -> list[str]:
    """Return the table of scores before and after, if there are scores."""
    scores = about.get("scores")
    if not scores:
        return ["## Scores", "", "None: no result file of these very weights lay beside the checkpoint.", ""]
    names = list(next(iter(scores.values())))
    lines = ["## Scores", "", "In percent, in fp32, of these very weights.", ""]
    lines += [f"| | {' | '.join(scores)} |", "|---|" + "---:|" * len(scores)]
    for name in names:
        values = " | ".join(f"{column[name]:.1f}" for column in scores.values())
        lines.append(f"| {plain(name.removeprefix('eval/').replace('_', ' '))} | {values} |")
    return [*lines, ""]


def limits(target: str, about: Mapping[str, Any]) -> list[str]:
    """Return the limits of the model."""
    lines = ["## Limits", ""]
    lines.append("- It knows and judges as its base model does, with that model's biases; a repair mends one fault.")
    if about.get("scores"):
        lines.append("- One training run, scored once: how far seeds differ is not in these numbers.")
    if about["dtype"] != "fp32":
        lines.append(f"- Scores are of fp32 weights; these are rounded to {about['dtype']}.")
    if target in ("diffusers", "diffusers_2", "comfyui"):
        lines.append("- An image generator was trained with the base model's text encoder: look at what it draws.")
    if target in ("transformers", "sentence_transformers"):
        lines.append("- Texts are cleaned as open_clip does, but text in a wrong encoding is not mended.")
    if target == "timm":
        lines.append("- The visual tower alone: there is no text in it.")
    return lines
