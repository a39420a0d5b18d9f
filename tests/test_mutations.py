"""A dozen wrong configs of the hundreds that `python tests/mutations.py 500` tries."""

from mutations import attempts


def test_a_wrong_config_is_passed_or_stops_in_one_line() -> None:
    outcomes = list(attempts(12, seed=7))
    kinds = [outcome.kind for outcome in outcomes]
    failed = [f"{' '.join(outcome.words)}: {outcome.said}" for outcome in outcomes if outcome.kind == "traceback"]
    assert not failed
    assert kinds.count("passed") >= 1  # the checks let something through
    assert kinds.count("refused") >= 6
