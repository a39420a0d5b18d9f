"""Every published benchmark, on its own layout in miniature and with planted answers."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

import layouts
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from planted import Planted
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch.nn.functional import normalize

import clipfix.__main__  # noqa: F401  what yaml may ask for
from clipfix.data.sets import Labelled, present
from clipfix.data.sets.mmvp import PATTERNS as MMVP_PATTERNS
from clipfix.data.sets.mmvp import SPELLINGS
from clipfix.evals.base import Benchmark, evaluate, percentages
from clipfix.evals.classification import Classification
from clipfix.evals.features import scoring
from clipfix.evals.foils import Foils
from clipfix.evals.groups import Groups
from clipfix.evals.multilabel import MultiLabel
from clipfix.results.compare.figures import PATTERNS as RADAR
from clipfix.results.provenance import data_hash

CONF = Path(__file__).parents[2] / "conf" / "eval"
PUBLISHED = OmegaConf.load(CONF / "published.yaml").defaults[:-1]
PICTURES, NOTHING = 48, 47  # a text that is true of nothing has the last axis
MINIATURE = {"records": 12}  # what the layouts have less of than the published sets


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch):
    """torchvision knows the checksums of the real files."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def benchmarks(root: Path, *names: str) -> dict[str, Benchmark]:
    """The benchmarks of these yamls, for as many samples as there are."""
    found = {}
    for name in names:
        cfg = OmegaConf.create({"eval": OmegaConf.load(CONF / f"{name}.yaml")})
        cfg.eval.root = str(root)
        for benchmark in cfg.eval.benchmarks.values():
            benchmark.shards.samples = None
            for key, value in MINIATURE.items():
                if key in benchmark.shards:
                    benchmark.shards[key] = value
        found |= instantiate(cfg.eval.benchmarks)
    return found


def there(found: dict[str, Benchmark]) -> dict[str, Benchmark]:
    """Those whose data is there."""
    return present(found, {name: benchmark.shards for name, benchmark in found.items()})


def planted(truth: layouts.Truth, sign: int = 1, images: torch.Tensor | None = None) -> Planted:
    """Picture i lies on axis i, and a text on the axes of the pictures that it is true of, or opposite to them."""
    eye = torch.eye(PICTURES)
    texts = {text: sign * eye[numbers].sum(0) if numbers else eye[NOTHING] for text, numbers in truth.items()}
    return Planted(eye if images is None else images, texts)


# What a model scores that sees no difference between pictures. A tie is no answer where two are compared; among
# many, all queries find the same one.
SIX = {"acc1": 100 / 6, "mean_per_class_recall": 100 / 6, "acc5": 500 / 6}
TWELVE = {"image_to_text_R@1": 100 / 12}
ONE_EACH = TWELVE | {"text_to_image_R@1": 100 / 12, "text_to_image_R@10": 1000 / 12, "image_to_text_R@10": 1000 / 12}
BLIND = {
    "mmvp": {"mmvp": {"mean": 0, "text": 0, "viewpoint_and_perspective": 0, "ties": 6}},
    "urban1k": {"urban1k": ONE_EACH},
    "sharegpt4v_1k": {"sharegpt4v_1k": ONE_EACH},
    "docci": {"docci": ONE_EACH},
    "dci": {"dci": ONE_EACH},
    "coco": {"coco_val2017": TWELVE | {"text_to_image_R@1": 100 / 12}, "coco_karpathy": TWELVE},
    "flickr30k": {"flickr30k_1k": TWELVE, "flickr30k_full": {"image_to_text_R@1": 100 / 24}},
    "imagenet": {
        **dict.fromkeys(("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"), SIX),
        "objectnet": {"acc1": 50, "mean_per_class_recall": 50},
    },
    "cifar": {"cifar10": SIX, "cifar100": SIX},
    "vtab": {"pets": SIX},
    "sugarcrepe": {"sugarcrepe": {"mean": 0, "add_att": 0, "swap_obj": 0, "ties": 21}},
    "winoground": {"winoground": {"text": 0, "image": 0, "group": 0, "ties": 16}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_planted_answers(name, tmp_path):
    truth = getattr(layouts, name)(tmp_path)
    found = there(benchmarks(tmp_path, name))
    assert set(BLIND[name]) == set(found) - {"mmvp_local"}  # by a rule of its own: tests/evals/test_pairs.py
    perfect = percentages(evaluate(planted(truth), found))
    reversed_ = percentages(evaluate(planted(truth, sign=-1), found))
    blind = percentages(evaluate(planted(truth, images=torch.ones(PICTURES, PICTURES)), found))
    assert all(Path(file).is_file() for benchmark in found.values() for file in benchmark.shards.files())
    for benchmark, expected in BLIND[name].items():
        metrics = {key for key in perfect if key.startswith(f"eval/{benchmark}/") and not key.endswith("/ties")}
        assert metrics >= {f"eval/{benchmark}/{metric}" for metric in expected if metric != "ties"}
        assert {key: perfect[key] for key in metrics} == dict.fromkeys(metrics, pytest.approx(100))
        assert {key: reversed_[key] for key in metrics} == dict.fromkeys(metrics, 0)
        assert {metric: blind[f"eval/{benchmark}/{metric}"] for metric in expected} == pytest.approx(expected)
        assert perfect.get(f"eval/{benchmark}/ties", 0) == reversed_.get(f"eval/{benchmark}/ties", 0) == 0


def test_several_classes_a_picture(tmp_path):
    """A blind model scores the share of pictures that show a class, and a reversed one as little as there is."""
    truth = layouts.voc2007(tmp_path)
    (ask,) = there(benchmarks(tmp_path, "vtab")).values()
    (shown,) = {len(pictures) for pictures in truth.values()}

    def score(model):
        return ask(model)["mean_average_precision"]

    assert score(planted(truth)) == pytest.approx(100)
    assert score(planted(truth, images=torch.ones(PICTURES, PICTURES))) == pytest.approx(100 * shown / 12)
    last = [(n + 1) / (12 - shown + n + 1) for n in range(shown)]  # precision where each of them is found
    uneven = torch.eye(PICTURES)
    uneven[:, NOTHING] += torch.arange(PICTURES) / 100  # no two pictures score the same
    assert score(planted(truth, sign=-1, images=uneven)) == pytest.approx(100 * sum(last) / shown)


def test_patterns_are_named_as_the_radar_names_them():
    assert [name.lower().replace(" ", "_") for name in MMVP_PATTERNS.values()] == list(RADAR)


@pytest.mark.parametrize("name", ["docci", "vtab"])
def test_one_changed_picture_is_another_hash(name, tmp_path):
    getattr(layouts, name)(tmp_path)
    (benchmark, *_) = there(benchmarks(tmp_path, name)).values()
    before = data_hash(benchmark.sources())
    last = Path(benchmark.shards.files()[-1])
    last.write_bytes(last.read_bytes() + b"\0")
    after = data_hash(benchmark.sources())
    assert before["files"] == after["files"] > 1
    assert before["sha256"] != after["sha256"]


@pytest.mark.parametrize("pictures", SPELLINGS)
@pytest.mark.parametrize("blank", [" ", "_"])
def test_mmvp_has_many_spellings(pictures, blank, tmp_path):
    truth = layouts.mmvp(tmp_path, pictures, blank)
    assert benchmarks(tmp_path, "mmvp")["mmvp"](planted(truth))["mean"] == 100


def test_pictures_that_several_sets_share_are_embedded_once(tmp_path):
    truth = layouts.sugarcrepe(tmp_path) | layouts.coco(tmp_path) | layouts.flickr30k(tmp_path)
    backbone = planted(truth)
    scores = percentages(evaluate(backbone, there(benchmarks(tmp_path, "coco", "flickr30k", "sugarcrepe"))))
    assert {score for name, score in scores.items() if not name.endswith("ties")} == {100}
    assert backbone.seen == 12 + 12 + 24


def test_the_figures_show_pictures_from_their_files(tmp_path):
    truth = layouts.mmvp(tmp_path) | layouts.coco(tmp_path)
    found = there(benchmarks(tmp_path, "mmvp", "coco"))
    scored = evaluate(planted(truth), found)
    assert len(found["mmvp"].figure(["score"], [scored["mmvp"]]).axes) >= 4
    assert len(found["coco_val2017"].figure(["score"], [scored["coco_val2017"]]).axes) == 12


# -- what is not there, or not as it should be -------------------------------------------------------------------------


def test_a_missing_set_is_skipped_with_what_to_fetch_and_none_at_all_is_an_error(tmp_path, capsys):
    everything = benchmarks(tmp_path, *PUBLISHED)
    with pytest.raises(ValueError, match=r"no data to score in eval\.root.*Questions.csv.*\d+ more") as error:
        there(everything)
    assert len(str(error.value).splitlines()) == 1
    layouts.urban1k(tmp_path)
    assert set(there(everything)) == {"urban1k"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(everything) - 1
    assert all(line.startswith("Skipped ") and str(tmp_path) in line for line in lines)
    flickr = next(line for line in lines if "flickr30k_full" in line)
    assert "flickr30k-images" in flickr
    assert "4.4 GB" in flickr
    with pytest.raises(ValueError, match=r"urban1k: there is no .*Urban1k/image.*Fetch Urban1k\.zip"):
        there(benchmarks(tmp_path / "elsewhere", "urban1k"))


def test_published_is_all_of_them_under_one_root():
    """And chooses checkpoints on shards that are none of them."""
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        cfg = compose("config", overrides=["eval=published", "eval.root=/data", "~eval.benchmarks.dci"]).eval
    names = {benchmark for name in PUBLISHED for benchmark in OmegaConf.load(CONF / f"{name}.yaml").benchmarks}
    assert set(cfg.benchmarks) == names - {"dci"}
    assert cfg.benchmarks.mmvp_local.shards.root == "/data/MMVP_VLM"
    assert list(cfg.selection) == ["retrieval"]


def test_every_line_says_how_large_it_is_and_every_name_is_there_once():
    names = [list(OmegaConf.load(CONF / f"{name}.yaml").benchmarks) for name in PUBLISHED]
    flat = [name for several in names for name in several]
    assert len(flat) == len(set(flat))
    for name in PUBLISHED:
        for benchmark in OmegaConf.load(CONF / f"{name}.yaml").benchmarks.values():
            fetch = OmegaConf.to_container(benchmark, resolve=False)["shards"]
            if isinstance(fetch, dict):
                assert any(word in fetch["fetch"] for word in ("GB", "MB", "pictures", "test split"))


def test_another_number_of_samples_is_refused(tmp_path):
    truth = layouts.urban1k(tmp_path)
    cfg = OmegaConf.create({"eval": OmegaConf.load(CONF / "urban1k.yaml")})
    cfg.eval.root = str(tmp_path)
    with pytest.raises(ValueError, match="12 of 1000 samples"):
        evaluate(planted(truth), instantiate(cfg.eval.benchmarks))


def test_a_broken_picture_and_another_layout_are_one_line(tmp_path):
    truth = layouts.urban1k(tmp_path) | layouts.docci(tmp_path)
    broken = tmp_path / "Urban1k" / "image" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    threads = set(threading.enumerate())
    with pytest.raises(ValueError, match=r"Urban1k/image/3\.jpg cannot be read") as held:
        evaluate(planted(truth), benchmarks(tmp_path, "urban1k"))
    assert held.tb  # though the error is still held, the progress bar is gone, which the next one would wait for
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=10)
    assert set(threading.enumerate()) <= threads
    layouts.put(tmp_path / "DOCCI" / "docci_descriptions.jsonlines", '{"split": "test"}')
    with pytest.raises(ValueError, match=r"DOCCI cannot be read .*image_file.*fetch it again"):
        evaluate(planted(truth), benchmarks(tmp_path, "docci"))


def test_a_json_cut_off_is_refused(tmp_path):
    truth = layouts.sharegpt4v_1k(tmp_path)
    (path,) = (tmp_path / "ShareGPT4V").glob("*.json")
    assert len(json.loads(path.read_text())) == 13
    path.write_text(path.read_text()[:400])
    with pytest.raises(ValueError, match="ShareGPT4V cannot be read"):
        evaluate(planted(truth), benchmarks(tmp_path, "sharegpt4v_1k"))


# -- against clip_benchmark --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows(Labelled):
    """Records whose picture i is grey i, without files."""

    records: list[dict] = field(compare=False)

    def needs(self):
        return []

    def read(self):
        for i, record in enumerate(self.records):
            yield {"key": str(i), "image": Image.new("RGB", (8, 8), (i,) * 3), "txt": "", "json": record}

    def classes(self):
        return [f"class {i}" for i in range(9)]

    def templates(self):
        return ["a {c}"]


def rows(*records):
    return Rows("", "", None, list(records))


def random_model(seed, texts):
    generator = torch.Generator().manual_seed(seed)
    return Planted(
        torch.randn(200, 6, generator=generator), {text: torch.randn(6, generator=generator) for text in texts}
    )


def test_classification_is_clip_benchmarks():
    """Its classifier, and sklearn for its metrics: its own accuracy fails with this year's numpy."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    labels = [i % 7 for i in range(60)]  # of nine classes two have no picture
    source = rows(*({"label": label} for label in labels))
    backbone = random_model(0, [f"a class {i}" for i in range(9)]).eval()
    heads = theirs.zero_shot_classifier(
        backbone, backbone.tokenize, source.classes(), source.templates(), "cpu", amp=False
    )
    scores = (normalize(backbone.images[:60], dim=-1) @ heads).detach().numpy()
    expected = {
        "acc1": accuracy_score(labels, scores.argmax(1)),
        "acc5": top_k_accuracy_score(labels, scores, k=5, labels=range(9)),
        "mean_per_class_recall": theirs.balanced_accuracy_score(labels, scores.argmax(1)),
    }
    assert Classification(source)(backbone) == pytest.approx({name: 100 * score for name, score in expected.items()})
    assert 0 < expected["acc1"] < expected["acc5"] < 1


def test_mean_average_precision_is_clip_benchmarks_without_ties():
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification").average_precision_per_class
    labels = torch.randint(0, 2, (60, 9), generator=torch.Generator().manual_seed(3))
    source = rows(*({"label": label} for label in labels.tolist()))
    backbone = random_model(3, [f"a class {i}" for i in range(9)]).eval()
    scores = normalize(backbone.images[:60], dim=-1) @ normalize(backbone.vectors, dim=-1).T
    expected = 100 * theirs(scores, labels).mean().item()
    assert MultiLabel(source)(backbone)["mean_average_precision"] == pytest.approx(expected)
    assert 40 < expected < 65  # half of the pictures show a class


def test_vtab_plus_is_whole():
    """Every data set that clip_benchmark counts in, by its own name or that of another eval of the same set."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    wanted = {name.rpartition("/")[2].replace("-", "_") for name in builder.dataset_collection["vtab+"]}
    others = {"imagenet1k": "imagenet", "imagenetv2": "imagenet_v2"}
    evals = {
        name for group in ("vtab", "imagenet", "cifar") for name in OmegaConf.load(CONF / f"{group}.yaml").benchmarks
    }
    assert {others.get(name, name) for name in wanted} == evals


def selection(backbone, pictures: list[list[int]], texts: list[list[str]]) -> dict[str, float]:
    """clip_benchmark's scores of so many pictures and texts an example."""
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    images = [torch.tensor(several).view(-1, 1, 1, 1) / 255 for several in pictures]
    loader = [(torch.stack(images).expand(-1, -1, 3, 8, 8), texts)]
    return theirs.evaluate(backbone.eval(), loader, backbone.tokenize, "cpu", amp=False)


def test_foils_are_clip_benchmarks_text_acc_without_ties():
    records = [{"caption": f"{i}", "foil": f"not {i}", "subset": "one"} for i in range(100)]
    backbone = random_model(1, [text for i in range(100) for text in (f"{i}", f"not {i}")])
    found = Foils(rows(*records))(backbone)
    theirs = selection(backbone, [[i] for i in range(100)], [[f"{i}", f"not {i}"] for i in range(100)])
    assert found == pytest.approx({"mean": 100 * theirs["text_acc"], "one": 100 * theirs["text_acc"], "ties": 0})
    assert 30 < found["mean"] < 70  # a random model's chance is 50


def test_groups_are_clip_benchmarks_without_ties():
    records = [{"pair": i // 2, "pattern": "Both", "statement": f"{i}"} for i in range(200)]
    backbone = random_model(2, [f"{i}" for i in range(200)])
    found = Groups(rows(*records), prefix="")(backbone)
    theirs = selection(
        backbone, [[2 * i, 2 * i + 1] for i in range(100)], [[f"{2 * i}", f"{2 * i + 1}"] for i in range(100)]
    )
    expected = {"text": theirs["text_acc"], "image": theirs["image_acc"], "group": theirs["acc"]}
    assert found == pytest.approx({name: 100 * score for name, score in expected.items()} | {"ties": 0})
    assert 10 < found["text"] < 40  # chance is 25
    assert found["group"] < min(found["text"], found["image"])


def test_a_source_is_read_by_features_like_shards(tmp_path):
    truth = layouts.docci(tmp_path)
    (ask,) = benchmarks(tmp_path, "docci").values()
    with scoring(planted(truth)) as features:
        rows, kept = features.images(ask.shards)
        again, _ = features.images(ask.shards)
    assert again is rows
    assert torch.equal(rows, torch.eye(PICTURES)[:12])
    assert [sample["txt"] for sample in kept] == [f"photo {i}" for i in range(12)]
