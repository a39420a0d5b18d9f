"""A dozen wrong configs of the hundreds that `python tests/mutations.py 500` tries."""

from pathlib import Path

from mutations import attempts, attempts_of_verbs


def test_a_wrong_config_is_passed_or_stops_in_one_line() -> None:
    outcomes = list(attempts(12, seed=7))
    kinds = [outcome.kind for outcome in outcomes]
    failed = [f"{' '.join(outcome.words)}: {outcome.said}" for outcome in outcomes if outcome.kind == "traceback"]
    assert not failed
    assert kinds.count("passed") >= 1  # the checks let something through
    assert kinds.count("refused") >= 6


def test_wrong_settings_of_other_verbs_are_passed_or_stop_in_one_line() -> None:
    stored = Path(__file__).parents[1] / "benchmarks" / "results" / "diva-s0" / "results.json"
    outcomes = list(attempts_of_verbs(21, 3, stored))
    failed = [f"{' '.join(outcome.words)}: {outcome.said}" for outcome in outcomes if outcome.kind == "traceback"]
    assert not failed
    assert [outcome.kind for outcome in outcomes].count("refused") >= 8
