"""Small copies of published data sets, in the layout of their authors. Picture i has the grey value i.

Each function writes a data set and returns the pictures that match each text. Texts that a benchmark must not use are
not among them, and the backbone of the tests refuses them.
"""

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from shards import encoded, pack

Truth = dict[str, list[int]]
# Folder: index among the 1000 classes.
WORDNET = {
    "n01440764": 0,
    "n01443537": 1,
    "n02123045": 281,
    "n03594945": 609,
    "n07920052": 967,
    "n12267677": 988,
}


def grey(path: Path, number: int, size: int = 8) -> Path:
    """Write a picture with a grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (number,) * 3).save(path, quality=95)
    return path


def put(path: Path, content: Any) -> Path:
    """Write a text, or other content as json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def mmvp(root: Path, pictures: str = "MLLM_VLM Images", blank: str = " ") -> Truth:
    patterns = ["Camera Perspective", "Camera Perspective", "Text"]
    rows = [(i + 1, patterns[i // 2], f"thing {i}, seen") for i in range(6)]
    folder = root / "MMVP_VLM"
    for i, (number, pattern, _) in enumerate(rows):
        grey(folder / pictures / pattern.replace(" ", blank) / f"{number}.jpg", i)
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])
    return {f"a photo of {statement}": [i] for i, (_, _, statement) in enumerate(rows)}


def urban1k(root: Path) -> Truth:
    for i in range(12):
        grey(root / "Urban1k" / "image" / f"{i + 1}.jpg", i)
        put(root / "Urban1k" / "caption" / f"{i + 1}.txt", f"street {i}\nnot a caption")
    return {f"street {i}": [i] for i in range(12)}


def sharegpt4v_1k(root: Path) -> Truth:
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": f"long\ncaption {i}"}] for i in range(13)]
    records = [{"id": i, "image": f"sam/images/sa_{i}.jpg", "conversations": turns[i]} for i in range(13)]
    put(root / "ShareGPT4V" / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(records, indent=1))
    for i in range(12):
        grey(root / "ShareGPT4V" / records[i]["image"], i)
    return {f"long caption {i}": [i] for i in range(12)}


def docci(root: Path) -> Truth:
    lines = []
    for i in range(14):
        split = "test" if i < 12 else "train"
        name = f"{split}_{i:05d}.jpg"
        lines.append({"example_id": name[:-4], "split": split, "image_file": name, "description": f"photo {i}"})
        grey(root / "DOCCI" / "images" / name, i)
    put(root / "DOCCI" / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, lines)))
    return {f"photo {i}": [i] for i in range(12)}


def dci(root: Path) -> Truth:
    folder = root / "densely_captioned_images"
    for i in range(12):
        record = {"image": f"sa_{i}.jpg", "short_caption": f"short {i}", "extra_caption": f"extra {i}", "mask_data": {}}
        put(folder / "annotations" / f"{i}.json", record)
        grey(folder / "photos" / f"sa_{i}.jpg", i)
    names = [f"{i}.json" for i in range(12)]
    put(folder / "splits.json", {"train": names[:6], "valid": names[6:9], "test": names[9:]})
    return {
        f"short {i} extra {i}": [i] for i in range(12)
    }  # separated by a line end; the tokenizer of the tests splits at white space


def captions_file(path: Path, names: list[str], captions: list[list[str]]) -> None:
    """Write captions in the format of COCO, whose annotations are in any order."""
    pairs = [(i, caption) for i, several in enumerate(captions) for caption in several]
    annotations = [{"id": n, "image_id": 100 + i, "caption": caption} for n, (i, caption) in enumerate(pairs)]
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(names)]
    put(path, {"images": images[::-1], "annotations": sorted(annotations, key=lambda annotation: annotation["id"] % 7)})


def coco(root: Path) -> Truth:
    """Write val2017, which uses the first five captions, and Karpathy's split, which uses all. Picture 0 has six."""
    of_2017 = [[f"scene {i} told {n}" for n in range(5)] for i in range(12)]
    of_2014 = [[f"view {i} told {n}" for n in range(6 if i == 0 else 5)] for i in range(12)]
    names_2017 = [f"{i:012d}.jpg" for i in range(12)]
    names_2014 = [f"COCO_val2014_{i:012d}.jpg" for i in range(12)]
    for i in range(12):
        grey(root / "coco" / "val2017" / names_2017[i], i)
        grey(root / "coco" / "val2014" / names_2014[i], 12 + i)
    captions_file(root / "coco" / "annotations" / "captions_val2017.json", names_2017, of_2017)
    captions_file(root / "coco" / "coco_test_karpathy.json", names_2014, of_2014)
    path = root / "coco" / "annotations" / "captions_val2017.json"
    annotated = json.loads(path.read_text())
    annotated["annotations"].append({"id": 999, "image_id": 100, "caption": "a sixth that is not used"})
    path.write_text(json.dumps(annotated))
    truth = {caption: [i] for i, several in enumerate(of_2017) for caption in several}
    return truth | {caption: [12 + i] for i, several in enumerate(of_2014) for caption in several}


def flickr30k(root: Path) -> Truth:
    """Write 24 pictures, of which the first 12 are the test split. Captions contain commas."""
    folder, truth, token, split = root / "flickr30k", {}, [], ["image,caption"]
    for i in range(24):
        grey(folder / "flickr30k-images" / f"{1000 + i}.jpg", i)
        for n in range(5):
            truth[f"people {i}, told {n} ."] = [i]
            token.append(f"{1000 + i}.jpg#{n}\tpeople {i}, told {n} .")
            split += [f"{1000 + i}.jpg,people {i}, told {n} ."] if i < 12 else []
    put(folder / "results_20130124.token", "\n".join(token))
    put(folder / "flickr30k_test_karpathy.txt", "\n".join(split))
    return truth


def prompts(of: dict[str, list[int]], templates: Any) -> Truth:
    """Return the prompts of each class with the pictures of the class."""
    return {template(name): numbers for name, numbers in of.items() for template in templates}


def imagenet(root: Path) -> Truth:
    """Write two pictures of each class. Folders of V2 are numbers, which sort differently as texts."""
    for folder in ("imagenet/val", "imagenet-a", "imagenet-r", "sketch"):
        for i, wordnet in enumerate(WORDNET):
            for n in range(2):
                grey(root / folder / wordnet / f"picture_{n}.JPEG", 2 * i + n)
    for i, number in enumerate(WORDNET.values()):
        for n in range(2):
            grey(root / "imagenetv2-matched-frequency-format-val" / str(number) / f"{n}.jpeg", 2 * i + n)
    put(root / "imagenet-r" / "README.txt", "not a class")
    of = {IMAGENET_CLASSNAMES[number]: [2 * i, 2 * i + 1] for i, number in enumerate(WORDNET.values())}
    return prompts(of, OPENAI_IMAGENET_TEMPLATES) | objectnet(root / "objectnet")


def objectnet(root: Path) -> Truth:
    """Write folders in another order than their labels; one folder shows a class that ImageNet does not have."""
    folders = {"zebra_crossing": "Crossing", "alarm_clock": "Alarm clock", "bed_sheet": "Bed sheet"}
    for i, folder in enumerate(sorted(folders)):
        for n in range(2):
            grey(root / "objectnet-1.0" / "images" / folder / f"{n}.png", 40 + 2 * i + n)
    put(root / "folder_to_objectnet_label.json", folders)
    put(root / "objectnet_to_imagenet_1k.json", {"Crossing": "crossing", "Alarm clock": "clock; watch"})
    put(root / "pytorch_to_imagenet_2012_id.json", {"7": 0, "8": 1, "9": 2})
    put(root / "imagenet_to_label_2012_v2", "crossing\nclock\nwatch\n")
    return prompts({"alarm clock": [40, 41], "crossing": [44, 45]}, OPENAI_IMAGENET_TEMPLATES)


def cifar(root: Path) -> Truth:
    truth: Truth = {}
    for name, folder, file, labels, meta, names in (
        ("cifar10", "cifar-10-batches-py", "test_batch", "labels", "batches.meta", "label_names"),
        ("cifar100", "cifar-100-python", "test", "fine_labels", "meta", "fine_label_names"),
    ):
        things = [f"{name} thing {i}" for i in range(6)]
        data = np.repeat(np.arange(12, dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
        where = root / name / folder
        where.mkdir(parents=True)
        (where / file).write_bytes(pickle.dumps({"data": data, labels: [i // 2 for i in range(12)]}))
        (where / meta).write_bytes(pickle.dumps({names: things}))
        kinds = (
            "photo",
            "blurry photo",
            "black and white photo",
            "low contrast photo",
            "high contrast photo",
            "bad photo",
        )
        templates = [f"a {kind} of a {{}}." for kind in (*kinds, "good photo")]
        templates += ["a photo of a small {}.", "a photo of a big {}."]
        both = [t.replace(" of a ", article).format for t in templates for article in (" of a ", " of the ")]
        truth |= prompts({thing: [2 * i, 2 * i + 1] for i, thing in enumerate(things)}, both)
    return truth


def vtab(root: Path, name: str = "pets") -> Truth:
    folder, pets = root / f"wds_vtab-{name}", ["abyssinian", "beagle", "boxer", "pug", "sphynx", "siamese"]
    samples = {f"s{i:07d}": {"png": encoded(Image.new("RGB", (8, 8), (i,) * 3)), "cls": str(i // 2)} for i in range(12)}
    keys = list(samples)
    for shard, part in enumerate((keys[:7], keys[7:])):
        pack(folder / "test" / f"{shard}.tar", {key: samples[key] for key in part})
    put(folder / "test" / "nshards.txt", "2\n")
    put(folder / "classnames.txt", "\n".join(pets) + "\n")
    put(folder / "zeroshot_classification_templates.txt", "a photo of a {c}.\na {c}, a pet.\n")
    return prompts(
        {pet: [2 * i, 2 * i + 1] for i, pet in enumerate(pets)}, ["a photo of a {}.".format, "a {}, a pet.".format]
    )


def voc2007(root: Path) -> Truth:
    """Write pictures with several labels: picture i shows thing i // 2, and if i is odd, the next thing as well."""
    folder, things = root / "wds_voc2007_multilabel", [f"thing {i}" for i in range(6)]
    shown = [{i // 2, (i // 2 + i % 2) % 6} for i in range(12)]
    samples = {}
    for i in range(12):
        labels = io.BytesIO()
        np.save(labels, np.array([thing in shown[i] for thing in range(6)], np.float32))
        samples[f"s{i:07d}"] = {"png": encoded(Image.new("RGB", (8, 8), (i,) * 3)), "npy": labels.getvalue()}
    pack(folder / "test" / "0.tar", samples)
    put(folder / "test" / "nshards.txt", "1\n")
    put(folder / "dataset_type.txt", "multilabel\n")
    put(folder / "classnames.txt", "\n".join(things) + "\n")
    put(folder / "zeroshot_classification_templates.txt", "a photo of a {c}.\n")
    return {f"a photo of a {name}.": [i for i in range(12) if t in shown[i]] for t, name in enumerate(things)}


def sugarcrepe(root: Path) -> Truth:
    """Write examples whose foils match no picture, with gaps in their numbers and pictures in several subsets."""
    truth: Truth = {}
    for s, subset in enumerate(
        ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    ):
        examples = {}
        for i in range(3):
            name, caption, foil = f"{s + i:012d}.jpg", f"{subset} {i} is so", f"{subset} {i} is not so"
            grey(root / "coco" / "val2017" / name, s + i)
            examples[str(3 * i)] = {"filename": name, "caption": caption, "negative_caption": foil}
            truth |= {caption: [s + i], foil: []}
        put(root / "sugar-crepe" / "data" / f"{subset}.json", examples)
    return truth


def winoground(root: Path) -> Truth:
    folder, lines = root / "winoground" / "data", []
    for i in range(4):
        names = [f"ex_{i}_img_{side}" for side in (0, 1)]
        captions = [f"the {i} above the other", f"the other above the {i}"]
        lines.append({"id": i, "image_0": names[0], "image_1": names[1], "caption_0": captions[0],
                      "caption_1": captions[1], "collapsed_tag": "Relation"})  # fmt: skip
        for side in (0, 1):
            grey(folder / "images" / f"{names[side]}.png", 2 * i + side)
    put(folder / "examples.jsonl", "\n".join(map(json.dumps, lines)))
    return {line[f"caption_{side}"]: [2 * i + side] for i, line in enumerate(lines) for side in (0, 1)}
