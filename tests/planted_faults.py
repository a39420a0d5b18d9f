"""Faults that the fast tests must catch: one-line patches of the source, each applied alone to a copy of it.

    python tests/planted_faults.py            all of them: some minutes
    python tests/planted_faults.py stream     those whose file or fault has this word

Prints a table of faults, and fails if one is not caught. `FAULTS`, not the number of tests, says what the tests are
worth: before tests are cut or marked as slow, all of these must still be caught. test_planted_faults.py keeps the list
in step with the source.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/clipfix"
LIMIT = 300  # seconds for the tests of one fault; ranks that wait for each other would wait for ever
COPIED = ("src", "conf", "sweeps", "tests", "examples", "benchmarks", "docs", "pyproject.toml", "README.md")
# All that takes long to import and is not patched: each run of tests is forked from a process that has it.
IMPORTS = ("torch", "lightning.pytorch", "open_clip", "diffusers", "transformers", "torchvision", "webdataset", "hydra")
IMPORTS += ("pytest", "beartype", "sklearn.pipeline", "matplotlib.pyplot", "torchmetrics", "peft", "wandb")


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in the file, becomes `new`; one of `tests` (pytest's ids below tests/) must fail."""

    what: str
    file: str  # below src/clipfix
    old: str
    new: str
    tests: tuple[str, ...]


def fault(what: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(what, file, old, new, tests)


CONTRASTIVE, LONGCLIP, FFF = (
    f"functional/test_{name}.py" for name in ("contrastive", "longclip_formulas", "fff_formulas")
)
DIVA, CONTRACT, RANKS = (f"methods/test_{name}.py" for name in ("diva", "contract", "ranks"))
RESUME = "test_stream_resume.py"
ORDER = "test_order.py"

FAULTS = [
    # -- formulas
    fault(
        "contrastive targets ignore the rank",
        "functional/contrastive.py",
        "torch.arange(len(image), device=image.device) + first_row",
        "torch.arange(len(image), device=image.device)",
        f"{CONTRASTIVE}::test_ranks_average_to_the_joined_batch",
    ),
    fault(
        "label smoothing in one direction only",
        "functional/contrastive.py",
        "F.cross_entropy(scale * text @ all_image.T, targets, label_smoothing=label_smoothing)",
        "F.cross_entropy(scale * text @ all_image.T, targets)",
        f"{CONTRASTIVE}::test_equals_a_double_loop",
    ),
    fault(
        "autocast leaks into the contrastive logits",
        "functional/contrastive.py",
        "with torch.autocast(image.device.type, enabled=False):",
        "with torch.set_grad_enabled(torch.is_grad_enabled()):",
        f"{CONTRASTIVE}::test_autocast_does_not_round_the_logits",
    ),
    fault(
        "chunks overwrite each other's gradient",
        "functional/contrastive.py",
        "to_answers.addmm_(slopes.T, q[part])",
        "torch.mm(slopes.T, q[part], out=to_answers)",
        f"{CONTRASTIVE}::test_some_rows_at_a_time_equal_all_at_once",
    ),
    fault(
        "components of features that are not centred",
        "functional/components.py",
        "mean = exact.mean(0)",
        "mean = 0 * exact.mean(0)",
        f"{LONGCLIP}::test_components_equal_the_reference",
    ),
    fault(
        "gradient of the plane without the gaps of eigenvalues",
        "functional/components.py",
        "@ discarded * inverse_gaps) @ discarded.T",
        "@ discarded) @ discarded.T",
        f"{LONGCLIP}::test_gradient_equals_finite_differences",
    ),
    fault(
        "stretched positions off by a step",
        "functional/positions.py",
        "torch.arange(ratio, device=table.device, dtype=table.dtype) / ratio",
        "torch.arange(1, ratio + 1, device=table.device, dtype=table.dtype) / ratio",
        f"{LONGCLIP}::test_stretch_equals_the_reference",
    ),
    fault(
        "alike images promote pairs below the lower bar",
        "functional/positives.py",
        "likely & images, likely & texts)",
        "images.expand_as(pair), likely & texts)",
        f"{FFF}::test_positives_are_a_double_loop",
    ),
    fault(
        "captions are held against the bar of images",
        "functional/positives.py",
        "samples.mean_text.T > thresholds.text_text)",
        "samples.mean_text.T > thresholds.image_image)",
        f"{FFF}::test_positives_are_a_double_loop",
        f"{FFF}::test_each_condition_promotes_what_it_names",
    ),
    fault(
        "every rank takes the first rows for its own",
        "functional/positives.py",
        "torch.arange(queries, device=device)[:, None] + first_row",
        "torch.arange(queries, device=device)[:, None]",
        f"{FFF}::test_positives_are_a_double_loop",
        f"{FFF}::test_many_positives_are_a_double_loop_and_ranks_sum_to_the_joined_batch",
    ),
    fault(
        "thresholds of a part of the batch promote as if it were all",
        "functional/positives.py",
        "scale = samples * (samples - 1) / (among - 1)",
        "scale = samples",
        f"{FFF}::test_counts_become_cosines_that_promote_as_many",
    ),
    fault(
        "sign of positives in the sigmoid loss",
        "functional/sigmoid.py",
        "positive.to(entries.dtype).mul_(-2).add_(1)",
        "positive.to(entries.dtype).mul_(2).add_(-1)",
        f"{FFF}::test_one_positive_each_is_siglip",
    ),
    fault(
        "the bias learns from the last tile alone",
        "functional/sigmoid.py",
        "to_bias += slope.sum(dtype=torch.float64)",
        "to_bias = slope.sum(dtype=torch.float64)",
        f"{FFF}::test_one_positive_each_is_siglip",
    ),
    # -- data
    fault(
        "every rank reads all shards",
        "data/stream.py",
        "shards[consumer::consumers]",
        "shards[::1]",
        "test_stream.py::test_every_sample_once_a_pass",
    ),
    fault(
        "shuffling ignores the seed",
        "data/stream.py",
        "self.decoder, self.seed = shards, decoder, decoder.seed",
        "self.decoder, self.seed = shards, decoder, 0",
        "test_stream.py::test_shuffling_is_seeded_and_new_in_every_pass",
    ),
    fault(
        "shards keep one order in every pass",
        "data/stream.py",
        'random.Random(f"{self.seed} {number}").sample(',
        'random.Random(f"{self.seed}").sample(',
        "test_stream.py::test_without_shuffling_shards_change_places_but_keep_their_order",
    ),
    fault(
        "texts are drawn once for all passes",
        "data/stream.py",
        "random.Random(f\"{self.seed} {number} {sample['key']} {name}\")",
        "random.Random(f\"{self.seed} {sample['key']} {name}\")",
        "test_texts.py::test_random_captions_depend_on_seed_pass_and_sample_alone",
        "test_texts.py::test_other_sentences_are_drawn_anew_in_every_pass",
    ),
    fault(
        "a resumed stream repeats one sample",
        "data/stream.py",
        "consumers), start=1)",
        "consumers), start=0)",
        f"{RESUME}::test_a_stopped_stream_goes_on_with_exactly_the_next_batch",
    ),
    fault(
        "a resumed stream begins with the first worker",
        "data/stream.py",
        '(slot + start["turn"]) % workers',
        "slot % workers",
        f"{RESUME}::test_a_stopped_stream_goes_on_with_exactly_the_next_batch",
    ),
    fault(
        "skipped samples are not counted",
        "data/stream.py",
        'sum(sample["skipped"] for sample in batch)',
        'sum(sample["skipped"] for sample in batch[1:])',
        "test_stream.py::test_a_broken_sample_is_skipped_and_counted",
    ),
    fault(
        "the selection split reads the shards of training",
        "data/module.py",
        "self._stream(self.selection_shards, ",
        "self._stream(self.train_shards, ",
        "test_stream.py::test_selection_is_one_pass_in_stored_order_with_its_last_partial_batch",
    ),
    fault(
        "with other workers a run repeats its last pass",
        "data/module.py",
        "number = 1 + max(",
        "number = max(",
        f"{RESUME}::test_of_streamed_shards_another_number_of_workers_starts_the_next_pass",
    ),
    fault(
        "a rank begins at the samples of the first",
        "data/order.py",
        "mine = start + self.rank * self.batch_size",
        "mine = start",
        f"{ORDER}::test_joined_batches_are_the_same_on_any_number_of_ranks_and_workers",
    ),
    fault(
        "a worker forgets where the run stands",
        "data/order.py",
        'self.place["number"] + slot * joined',
        "slot * joined",
        f"{ORDER}::test_a_run_goes_on_at_any_number_of_ranks_and_workers_with_the_next_sample",
    ),
    fault(
        "what replaces a broken sample depends on the rank",
        "data/order.py",
        'f"{self.seed} {number} {place} instead"',
        'f"{self.seed} {number} {place} {self.rank}"',
        f"{ORDER}::test_joined_batches_are_the_same_on_any_number_of_ranks_and_workers",
    ),
    fault(
        "the first stripes lose their odd samples",
        "data/order.py",
        "+ np.minimum(stripe, longer) + row",
        "+ row",
        f"{ORDER}::test_an_order_takes_each_sample_once_a_pass",
    ),
    fault(
        "the other sentences may be none",
        "data/texts.py",
        "rng.randint(1, len(others))",
        "rng.randint(0, len(others))",
        "test_texts.py::test_other_sentences_are_some_of_those_after_the_first_in_any_order",
    ),
    fault(
        "pixels divided by 256",
        "data/decoding.py",
        "torch.full((), 255.0",
        "torch.full((), 256.0",
        "test_pictures.py",
    ),
    fault(
        "a wide picture is cropped from its left",
        "data/decoding.py",
        "left = round((width - size) / 2)",
        "left = 0",
        "test_pictures.py",
    ),
    # -- models
    fault(
        "tokens cut before the end of a text",
        "models/packed_text.py",
        "lengths = tokens.argmax(dim=1) + 1",
        "lengths = tokens.argmax(dim=1).clamp(min=1)",
        "test_packed.py::test_features_and_gradients_are_those_of_the_padded_tower",
    ),
    fault(
        "a text that fits exactly counts as cut",
        "models/tokenizer.py",
        "self.tokenizer(list(compress(texts, full)), self.context_length + 1)",
        "self.tokenizer(list(compress(texts, full)), self.context_length)",
        "test_backbone.py::test_texts_are_cut_at_their_end_token_and_counted",
    ),
    fault(
        "mean and deviation change places",
        "models/clip.py",
        "return (images - self.mean) / self.std",
        "return (images - self.std) / self.mean",
        "test_backbone.py::test_open_clip_folder_loads_as_open_clip_loads_it",
    ),
    fault(
        "adapters merged without their scale",
        "models/adapters.py",
        "base + layer.scaling[ADAPTER] * b @ a",
        "base + b @ a",
        "test_trained.py::test_adapters_start_at_the_plain_tower_then_equal_weights_put_together_by_hand",
    ),
    fault(
        "the autoencoder gets [0, 1] where it wants [-1, 1]",
        "models/diffusion.py",
        "self.vae.encode((2 * images - 1).to(",
        "self.vae.encode(images.to(",
        "test_diffusion.py::test_latents_are_the_scaled_posterior_mean",
    ),
    fault(
        "noise is the target of a model that predicts v",
        "models/diffusion.py",
        'if self.prediction_type == "v_prediction":',
        'if self.prediction_type == "velocity":',
        "test_diffusion.py::test_noise_and_target_follow_the_betas",
    ),
    # -- training
    fault(
        "WiSE mixes the wrong way round",
        "training/weight_averaging.py",
        "trained), trained, self.alpha)",
        "trained), trained, 1 - self.alpha)",
        "test_wise.py::test_one_is_the_trained_model",
        "test_wise.py::test_with_lora_the_change_is_scaled",
    ),
    fault(
        "WiSE scales both factors of LoRA",
        "training/weight_averaging.py",
        'parameter.requires_grad and ".lora_A." not in name',
        "parameter.requires_grad",
        "test_wise.py::test_with_lora_the_change_is_scaled",
    ),
    fault(
        "training goes on from the weights that WiSE mixed",
        "training/weight_averaging.py",
        "pl_module.get_parameter(name).copy_(self.trained.pop(name))",
        "self.trained.pop(name)",
        "test_wise.py::test_half_is_the_mean_and_training_does_not_notice[finetune]",
    ),
    fault(
        "a step that is not finite still decays the weights",
        "training/callbacks.py",
        "weight.grad = None",
        "weight.grad.zero_()",
        "test_callbacks.py::test_a_step_that_is_not_finite_changes_nothing",
    ),
    fault(
        "patience counts all bad steps, not those in a row",
        "training/callbacks.py",
        "            self.in_a_row = 0\n",
        "            pass\n",
        "test_callbacks.py::test_so_many_in_a_row_end_the_run_with_the_batch_that_spoiled_it",
    ),
    fault(
        "a checkpoint is written over the last good one",
        "training/checkpoints.py",
        'with atomic_write(path) as draft, draft.open("xb") as file:',
        'with path.open("wb") as file:',
        "test_resume.py::test_a_full_disk_keeps_the_last_good_checkpoint",
    ),
    fault(
        "stops in the midst of an accumulated step",
        "training/checkpoints.py",
        "step_done = seen % trainer.accumulate_grad_batches == 0",
        "step_done = True",
        "test_resume.py::test_asked_to_end_it_saves_and_goes_on",
    ),
    fault(
        "resumes the best checkpoint before the last",
        "training/checkpoints.py",
        'path.name == "last.ckpt", path.stat()',
        'path.name == "best.ckpt", path.stat()',
        "test_resume.py::test_what_is_cut_off_is_named_and_passed_over",
    ),
    # -- system and results
    fault(
        "the value of a secret variable is shown",
        "system/secrets.py",
        "SECRET_VARIABLE.search(name)",
        "SECRET_VARIABLE.match(name)",
        "test_secrets.py::test_a_run_keeps_tells_and_sends_no_secret",
    ),
    fault(
        "signatures of urls are shown",
        "system/secrets.py",
        "|signature|credential|sig)",
        "|credential)",
        "test_secrets.py::test_what_looks_like_a_secret_is_hidden_and_nothing_else",
    ),
    fault(
        "a link hides that a benchmark reads the shards of training",
        "results/provenance.py",
        "str(Path(url).resolve())",
        "str(Path(url).absolute())",
        "test_provenance.py::test_no_score_on_what_the_run_has_seen",
    ),
    fault(
        "difference of two groups the wrong way round",
        "results/compare/rows.py",
        "[b - a for a, b in zip(first, second, strict=True)]",
        "[a - b for a, b in zip(first, second, strict=True)]",
        "compare/test_same_seeds.py::test_a_difference_is_the_second_minus_the_first_seed_by_seed",
    ),
    fault(
        "intervals without what was right before",
        "results/compare/bootstrap.py",
        "gained -= before[name].ranks <= at",
        "pass",
        "compare/test_rows.py::test_draws_are_a_loop_over_patterns_and_pairs",
    ),
    fault(
        "intervals with one end at the coverage",
        "results/compare/bootstrap.py",
        "(1 + coverage) / 2])",
        "coverage])",
        "compare/test_same_seeds.py::test_an_interval_leaves_as_much_out_on_either_side",
    ),
    # -- benchmarks
    fault(
        "recall at k is recall at k - 1",
        "evals/outcomes.py",
        "np.average(self.ranks <= at,",
        "np.average(self.ranks < at,",
        "evals/test_retrieval.py::test_recall_is_clip_benchmarks",
    ),
    fault(
        "a tie with a wrong answer ranks first",
        "evals/ranking.py",
        "ahead = (scores > best) | ((scores == best) & (places < first))",
        "ahead = scores > best",
        "evals/test_retrieval.py::test_among_equals_the_stored_order_counts",
    ),
    fault(
        "a tie counts as a hit among pairs",
        "evals/pairs.py",
        "(own > other).all(dim=1)",
        "(own >= other).all(dim=1)",
        "evals/test_pairs.py::test_picks_is_a_double_loop_over_texts_and_images",
    ),
    fault(
        "a probe is fitted on the pictures that it is asked about",
        "evals/probes.py",
        "fit_images, fit_samples = features.images(self.fit_shards)",
        "fit_images, fit_samples = features.images(self.shards)",
        "evals/test_zeroshot_and_probes.py",
    ),
    fault(
        "autocast leaks into scoring",
        "evals/features.py",
        "torch.autocast(weights[0].device.type, enabled=False)",
        "ExitStack()",
        "evals/test_evaluate.py::test_autocast_and_dropout_do_not_reach_the_features",
    ),
    fault(
        "dropout leaks into scoring",
        "evals/features.py",
        "            model.eval()\n",
        "",
        "evals/test_evaluate.py::test_autocast_and_dropout_do_not_reach_the_features",
    ),
    # -- methods
    fault(
        "gathered rows without the gradients of other ranks",
        "training/ranks.py",
        "        dist.all_reduce(gradient)\n",
        "",
        f"{RANKS}::test_ranks_equal_one[finetune-2-ddp]",
    ),
    fault(
        "all ranks draw the same rows",
        "training/ranks.py",
        "joined[rows * self.rank : rows * (self.rank + 1)]",
        "joined[:rows]",
        f"{RANKS}::test_ranks_equal_one[diva-2-ddp]",
    ),
    fault(
        "every step draws the same",
        "training/ranks.py",
        "[self.seed % 2**63, batch_number]",
        "[self.seed % 2**63]",
        f"{CONTRACT}::test_loss_repeats_for_the_same_draws_and_differs_for_others",
    ),
    fault(
        "a phase begins one step early",
        "training/phases.py",
        "return self.first <= step < self.end",
        "return self.first - 1 <= step < self.end",
        f"{DIVA}::test_stage_one_moves_the_projection_alone_and_resumes_across_its_end",
    ),
    fault(
        "the schedule ends too early",
        "training/schedules.py",
        "return self.after_warmup(step - warmup, max(1, steps - warmup))",
        "return self.after_warmup(step, max(1, steps - warmup))",
        f"{CONTRACT}::test_schedule_warms_up_then_falls_along_a_cosine",
    ),
    fault(
        "weight decay moves frozen rows",
        "training/frozen_rows.py",
        "            local(table)[: len(here)] = here\n",
        "",
        "methods/test_longclip.py::test_kept_rows_do_not_move_under_any_optimizer",
    ),
    fault(
        "position tables decay",
        "training/phases.py",
        "parameter.ndim < 2 or is_table else decay",
        "parameter.ndim < 2 else decay",
        f"{CONTRACT}::test_norms_biases_scalars_and_tables_do_not_decay",
    ),
    fault(
        "draws of a resumed run begin anew",
        "methods/base.py",
        'self.batches_seen = checkpoint["batches_seen"]',
        "self.batches_seen = 0",
        f"{CONTRACT}::test_resumed_equals_uninterrupted",
    ),
    fault(
        "reduced images of the first rank on every rank",
        "methods/longclip.py",
        "joined[self.ranks.rank * len(image) :][: len(image)]",
        "joined[: len(image)]",
        f"{RANKS}::test_ranks_equal_one[longclip-2-ddp]",
    ),
    fault(
        "positives are looked up by the rows of the first rank",
        "methods/fff.py",
        "self.mining.samples(batch), self.ranks.rank * len(image)",
        "self.mining.samples(batch), 0",
        f"{RANKS}::test_ranks_equal_one[fff-2-ddp]",
    ),
    fault(
        "the shuffled control tells each image of itself",
        "parts/feedback.py",
        "joined.roll(-(len(joined) * part // parts), dims=0)",
        "joined.roll(0, dims=0)",
        f"{DIVA}::test_shuffled_condition_is_another_images_across_ranks",
    ),
    fault(
        "sign of the anchor",
        "functional/anchors.py",
        "return 1 - (features * original)",
        "return -1 + (features * original)",
        f"{DIVA}::test_anchors_equal_loops_and_are_zero_where_nothing_moved",
    ),
    fault(
        "similarities move towards the repaired ones",
        "functional/anchors.py",
        "F.kl_div(after, before,",
        "F.kl_div(before, after,",
        f"{DIVA}::test_anchors_equal_loops_and_are_zero_where_nothing_moved",
    ),
    fault(
        "a negative counts as a positive",
        "functional/denoising.py",
        "likelihoods[:, : positives.shape[1]].mean()",
        "likelihoods[:, : positives.shape[1] + 1].mean()",
        f"{DIVA}::test_contrastive_denoising_loss_equals_a_loop",
    ),
    fault(
        "one null token stands for the mean of all",
        "functional/patches.py",
        "return tokens + null.mean(0)",
        "return tokens + null[0]",
        f"{DIVA}::test_null_text_rules",
    ),
]


def copied(folder: Path) -> None:
    """The tree, without what is generated."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        else:
            shutil.copy(source, folder / name)


def outcome(folder: Path, tests: tuple[str, ...]) -> str:
    """`passed`, `failed`, or why the tests did not run; in a process forked from this one."""
    sys.stdout.flush()
    log = folder / "log.txt"
    if not (child := os.fork()):
        os.setpgid(0, 0)  # with the ranks that it starts
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.dont_write_bytecode = True  # a patch may leave a file's size and second as they were
        sys.path.insert(0, str(folder / "src"))
        os.environ["PYTHONPATH"] = str(folder / "src")
        import pytest

        ended = pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not slow", *(f"tests/{test}" for test in tests)])
        sys.stdout.flush()
        os._exit(int(ended))
    begun = time.monotonic()
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - begun > LIMIT:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "failed"  # they wait for each other
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(found[1])
    return {0: "passed", 1: "failed"}.get(code, f"did not run ({code}): {log.read_text()[-2000:]}")


def main(word: str = "") -> int:
    """The number of faults that are not caught, or whose patch or tests do not fit the source any more."""
    chosen = [each for each in FAULTS if word in each.what or word in each.file]
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    for name in IMPORTS:
        __import__(name)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        subprocess.run(["git", "init", "-q"], cwd=folder, check=False)
        every = tuple(dict.fromkeys(test for each in chosen for test in each.tests))
        if (found := outcome(Path(folder), every)) != "passed":
            log = (Path(folder) / "log.txt").read_text()
            sys.exit(f"Without a fault the tests {found}.\n{log[-4000:]}")
        for each in chosen:
            file = Path(folder, PACKAGE, each.file)
            source = file.read_text()
            begun = time.monotonic()
            if (count := source.count(each.old)) != 1:
                verdict = f"NOT PLANTED: {each.old!r} is there {count} times"
            else:
                file.write_text(source.replace(each.old, each.new))
                verdict = {"failed": "caught", "passed": "NOT CAUGHT"}.get(
                    found := outcome(Path(folder), each.tests), found
                )
                file.write_text(source)
            missed += verdict != "caught"
            print(f"{verdict:<10}  {time.monotonic() - begun:4.0f} s  {each.file:<30}  {each.what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught.")
    return missed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]) > 0)
