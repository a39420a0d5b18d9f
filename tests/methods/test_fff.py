"""FFF as a method: what becomes a positive, where the offset starts, and that its switches do what they say."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from small import batch, build

from clipfix.methods.fff import FFF
from clipfix.parts.objective import Sigmoid

NOTHING = {"image_text": 2.0, "supported": 2.0, "image_image": 2.0, "text_text": 2.0}
DOUBLES = {"image_text": 2.0, "supported": -1.0, "image_image": 0.99999, "text_text": 2.0}  # pictures that are equal


@pytest.fixture
def make(clip_folder, generator_folder):
    return lambda *groups, **settings: build_fff(clip_folder, generator_folder, *groups, **settings)


OF_MINING = ("reference", "thresholds", "compare", "same", "shuffled")
OF_OBJECTIVE = ("mean_over", "start_bias", "tile")


def build_fff(clip_folder: str, generator_folder: str, *groups: str, **settings) -> FFF:
    """FFF with settings of its parts and its own, which have different names."""
    parts = {"mining": OF_MINING, "objective": OF_OBJECTIVE}
    nested = {part: {key: settings.pop(key) for key in keys if key in settings} for part, keys in parts.items()}
    return build("fff", clip_folder, generator_folder, *groups, **nested, **settings)


def doubled(rows: int) -> dict:
    """A batch whose second half shows the pictures of the first, with captions of its own."""
    inputs = batch(rows)
    half = inputs["image"][: rows // 2]
    return inputs | {"image": torch.cat([half, half])}


def total(method: FFF, inputs: dict) -> torch.Tensor:
    method.seed_draws(0)
    return torch.stack(list(method.loss(inputs).values())).sum()


def features(method: FFF, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [b, d] and texts [b, k, d], an image and a caption at a time."""
    clip, k = method.backbone, len(inputs["captions"]) // len(inputs["image"])
    encode = lambda text: clip.encode_text(clip.tokenize([text]))[0]  # noqa: E731
    texts = [
        torch.stack([encode(text) for text in [*inputs["captions"][i * k : (i + 1) * k], raw]])
        for i, raw in enumerate(inputs["caption"])
    ]
    return F.normalize(clip.encode_image(inputs["image"]), dim=-1), F.normalize(torch.stack(texts), dim=-1)


@pytest.mark.parametrize("mean_over", ["images", "entries"])
def test_sigmoid_is_the_papers_sum(make, mean_over):
    """Own captions, and those of the same picture seen twice, are the positives."""
    method, inputs = make(thresholds=DOUBLES, mean_over=mean_over, start_bias=-3.0), doubled(6)
    image, text = features(method, inputs)
    logits = method.backbone.logit_scale.exp() * torch.einsum("id,jkd->ijk", image, text) - 3.0
    same = (torch.arange(6)[:, None] - torch.arange(6)) % 3 == 0
    sign = torch.where(same, 1.0, -1.0)[..., None]
    entries = F.softplus(-sign * logits)
    expected = entries.sum() / (6 if mean_over == "images" else 6 * 6 * 3)
    torch.testing.assert_close(total(method, inputs), expected)
    found = {"image_text": 0.0, "image_image": 1.0, "text_text": 0.0, "together": 1.0}
    assert method.notes == pytest.approx(
        {f"positives/{name}_per_image": count for name, count in found.items()}
        | {f"positives/{name}_percent": 100 * count / 5 for name, count in found.items()}
    )


def test_softmax_spreads_over_the_same_positives(make):
    method, inputs = make("objective=softmax", thresholds=DOUBLES), doubled(6)
    image, text = features(method, inputs)
    logits = method.backbone.logit_scale.exp() * torch.einsum("id,jkd->ijk", image, text)
    same = ((torch.arange(6)[:, None] - torch.arange(6)) % 3 == 0)[..., None].expand_as(logits)
    to_text = -logits.flatten(1).log_softmax(dim=1)[same.flatten(1)].view(6, -1).mean()
    to_image = -logits.log_softmax(dim=0)[same].mean()
    torch.testing.assert_close(total(method, inputs), (to_text + to_image) / 2)


def test_tiles_change_nothing(make):
    inputs = batch(7)
    settings = {"thresholds": {"image_text": 0.2, "supported": 0.0, "image_image": 0.3, "text_text": 0.3}}
    whole, tiled = make(**settings), make(tile=2, **settings)
    torch.testing.assert_close(total(whole, inputs), total(tiled, inputs))
    assert whole.notes == tiled.notes


def test_junk_captions_make_positives_only_where_raw_captions_are_compared(make):
    inputs = batch(6) | {"caption": ["img_0001.jpg"] * 6}
    bars = {"image_text": 2.0, "supported": -1.0, "image_image": 2.0, "text_text": 0.99999}
    found = {}
    for compare in ("captions", "caption"):
        method = make(thresholds=bars, compare=compare)
        total(method, inputs)
        found[compare] = method.notes["positives/text_text_per_image"]
    assert found == {"captions": 0.0, "caption": 5.0}  # every other sample


def test_raw_captions_can_be_left_out(make):
    with_raw, without = make(), make(texts=["captions"])
    assert with_raw.texts(batch(4)).shape[1] == 3
    assert without.texts(batch(4)).shape[1] == 2
    changed = batch(4) | {"caption": ["something else"] * 4}
    assert total(make(texts=["captions"]), batch(4)) == total(without, changed)
    assert total(make(), batch(4)) != total(with_raw, changed)


def test_offset_starts_where_the_loss_is_least(make):
    method, inputs = make(thresholds=NOTHING), batch(8)
    method.start([inputs])
    best, start = total(method, inputs), method.objective.bias.item()
    assert start < -1  # most entries are negatives
    for step in (-0.05, 0.05):
        method.objective.bias.data.fill_(start + step)
        assert total(method, inputs) > best
    assert make(start_bias=-4.0).objective.bias.item() == -4.0


def test_counts_become_cosines_of_the_reference(make):
    """Asked for so many positives an image by each condition, alone it promotes as many."""
    inputs = batch(20)
    for condition, asked in (("image_text", 0.5), ("image_image", 1.0), ("text_text", 2.0)):
        extra = {"image_text": 0.0, "supported": 19.0, "image_image": 0.0, "text_text": 0.0} | {condition: asked}
        method = make("thresholds=counts", thresholds=extra)
        method.start([inputs])
        total(method, inputs)
        found = {
            name: method.notes[f"positives/{name}_per_image"] for name in ("image_text", "image_image", "text_text")
        }
        # an image or text that is alike brings all its captions, less those below the lower bar of the pair
        assert found.pop(condition) == pytest.approx(asked, abs=0.05 + asked * 0.07)
        assert max(found.values()) <= 0.01


def test_known_labels_are_positives_with_and_without_mining(make):
    """Equal labels join samples 0 and 3, 1 and 4, 2 and 5, and no reference is asked."""
    inputs = batch(6) | {"cluster": ["a", "b", "c"] * 2}
    alone = make(thresholds=None, same="cluster", start_bias=-3.0)
    assert alone.mining.reference is None
    assert set(alone.needs.texts) == {"captions", "caption", "cluster"}
    image, text = features(alone, inputs)
    logits = alone.backbone.logit_scale.exp() * torch.einsum("id,jkd->ijk", image, text) - 3.0
    sign = torch.where((torch.arange(6)[:, None] - torch.arange(6)) % 3 == 0, 1.0, -1.0)[..., None]
    torch.testing.assert_close(total(alone, inputs), F.softplus(-sign * logits).sum() / (6 * 6 * 3))
    assert alone.notes["positives/same_per_image"] == alone.notes["positives/together_per_image"] == 1.0
    together = make(thresholds=NOTHING, same="cluster", start_bias=-3.0)
    assert torch.equal(total(together, inputs), total(alone, inputs))
    mined = make(thresholds=DOUBLES, start_bias=-3.0)
    twice = doubled(6)
    assert torch.equal(total(mined, twice), total(alone, twice | {"cluster": ["a", "b", "c"] * 2}))


def test_one_text_without_mining_under_softmax_is_plain_fine_tuning(make, clip_folder, generator_folder):
    """The control of all else: the very loss of method=finetune."""
    inputs, plain = batch(6), build("finetune", clip_folder, generator_folder)
    control = make("objective=softmax", texts=["caption"], thresholds=None)
    torch.testing.assert_close(total(control, inputs), total(plain, inputs))


def test_features_of_the_shards_serve_as_well_as_the_reference(make):
    inputs, asked = doubled(6), make(thresholds=DOUBLES, start_bias=-3.0)
    image, texts = asked.mining.reference_features(inputs)
    stored = {"image": image, **{name: several.flatten(0, 1) for name, several in texts.items()}}
    read = make(reference=None, thresholds=DOUBLES, start_bias=-3.0)
    assert torch.equal(total(read, inputs | {"features": stored}), total(asked, inputs))
    assert read.notes == asked.notes
    with pytest.raises(ValueError, match=r"data\.features .* data\.texts\.captions: .*annotator\.keys"):
        total(read, inputs | {"features": {"image": image}})
    assert read.needs.features
    assert not asked.needs.features
    plain = total(make(thresholds=NOTHING, start_bias=-3.0).eval(), inputs)
    assert torch.equal(total(read.eval(), inputs), plain), "nothing is mined in validation, whose shards have none"


def test_promotions_say_what_was_mined_and_why(make):
    """Samples 0 and 3 show the same picture: each is promoted to all three captions of the other, by its picture."""
    inputs, method = doubled(6), make(thresholds=DOUBLES)
    found = method.mining.promoted(inputs, at_most=100)
    assert {(p.image, p.sample) for p in found} == {(i, (i + 3) % 6) for i in range(6)}
    assert len(found) == 6 * 3
    first = found[0]
    assert (first.image, first.sample, first.caption, first.reasons) == (0, 3, inputs["captions"][6], ("image_image",))
    assert first.image_image == pytest.approx(1.0, abs=1e-5)
    image, texts = method.mining.reference_features(inputs)
    assert first.image_text == pytest.approx((image[0] @ texts["captions"][3, 0]).item(), abs=1e-5)
    assert found[2].caption == inputs["caption"][3]
    few = method.mining.promoted(inputs, at_most=5)
    assert len(few) == 5
    assert set(few) < set(found)
    assert make(thresholds=None).mining.promoted(inputs, at_most=100) == []


def test_shuffled_control_promotes_as_many_pairs_of_others(make):
    """Samples 0 and 3, 1 and 4, 2 and 5 are doubles; the control promotes the samples after them."""
    inputs = doubled(6) | {"cluster": ["c", "a", "b", "x", "a", "b"]}
    inputs["image"][5] = batch(6)["image"][5]  # so 2 and 5 are not
    shuffled, known = make(thresholds=DOUBLES, shuffled=True), make(thresholds=None, same="cluster")
    shuffled.objective.bias.data.fill_(-3.0)
    known.objective.bias.data.fill_(-3.0)
    assert torch.equal(total(shuffled, inputs), total(known, inputs))


def test_reference_stays_as_it_was(make):
    method = make().eval()
    before = method.mining.reference.encode_image(batch(2)["image"])
    optimizer = method.configure_optimizers()["optimizer"]
    total(method, batch(4)).backward()
    optimizer.step()
    assert torch.equal(method.mining.reference.encode_image(batch(2)["image"]), before)
    assert not torch.equal(method.backbone.encode_image(batch(2)["image"]), before)
    assert not any("reference" in name for name in method.trained_names())


@pytest.mark.parametrize(
    ("construct", "key", "value"),
    [
        (lambda: Sigmoid("all", None, 256), "method.objective.mean_over", "all"),
        (lambda: Sigmoid("images", None, 0), "method.objective.tile", "0"),
    ],
)
def test_wrong_settings_of_parts_are_named_by_key_and_value(construct, key, value):
    with pytest.raises(ValueError, match=rf"^{key} is {value}: ."):
        construct()


def test_no_text_is_refused(make):
    with pytest.raises(Exception, match=r"method\.texts is empty"):
        make(texts=[])


# -- ranks: the double of a picture may lie on another one ------------------------------------------------------------


def worker(rank: int, clip_folder: str, generator_folder: str, folder: str) -> None:
    """Four ranks, then two of them alone: starting a process takes longer than all they compute."""
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
            for objective in ("sigmoid", "softmax"):
                found = one_step(rank, world, build_doubles(objective, clip_folder, generator_folder))
                torch.save(found, f"{folder}/{objective}-{world}-{rank}.pt")
            dist.destroy_process_group()


def build_doubles(objective: str, clip_folder: str, generator_folder: str) -> FFF:
    return build_fff(clip_folder, generator_folder, f"objective={objective}", thresholds=DOUBLES)


def one_step(rank: int, world: int, method: FFF) -> dict:
    inputs, rows = doubled(8), 8 // world
    part = {key: value[rank * rows * (len(value) // 8) :][: rows * (len(value) // 8)]
            for key, value in inputs.items() if key != "skipped"}  # fmt: skip
    method.start([part])
    start = moved_from_best(method)
    step = torch.nn.parallel.DistributedDataParallel(Step(method))
    loss = step(part)
    loss.backward()
    dist.all_reduce(mean := loss.detach() / world)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return {"loss": mean, "bias": start, "notes": method.notes, "gradients": gradients}


def moved_from_best(method: FFF) -> torch.Tensor:
    """Where the offset started; it is moved away from its best, where its gradient is a rounding."""
    bias = getattr(method.objective, "bias", torch.zeros(()))  # softmax has none
    start = bias.detach().clone()
    bias.data -= 1
    return start


class Step(torch.nn.Module):
    def __init__(self, method: FFF):
        super().__init__()
        self.method = method

    def forward(self, inputs: dict) -> torch.Tensor:
        return total(self.method, inputs)


def test_doubles_on_other_ranks_are_found(clip_folder, generator_folder, tmp_path):
    mp.start_processes(worker, (clip_folder, generator_folder, str(tmp_path)), nprocs=4, start_method="fork")
    for objective in ("sigmoid", "softmax"):
        alone, inputs = build_doubles(objective, clip_folder, generator_folder), doubled(8)
        alone.start([inputs])
        start = moved_from_best(alone)
        loss = total(alone, inputs)
        loss.backward()
        assert alone.notes["positives/image_image_per_image"] == 1.0
        for world, rank in [(4, 0), (4, 1), (4, 2), (4, 3), (2, 0), (2, 1)]:
            together = torch.load(tmp_path / f"{objective}-{world}-{rank}.pt", weights_only=True)
            assert together["notes"] == alone.notes
            torch.testing.assert_close(together["loss"], loss.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together["bias"], start, rtol=1e-4, atol=1e-4)
            for name, p in alone.named_parameters():
                if p.requires_grad:
                    atol = 1e-4 * float(p.grad.abs().max()) + 1e-8
                    torch.testing.assert_close(together["gradients"][name], p.grad, rtol=1e-4, atol=atol)
