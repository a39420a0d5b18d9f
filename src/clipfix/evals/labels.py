"""Ground truth for probes and zero-shot: which pictures have a definite answer, and what it is."""

from clipfix.evals.embed import Sample


def labels(samples: list[Sample], factor: str) -> dict[int, str]:
    """Row -> value of one factor, for the pictures with a single kind of thing that carries it.

    With a fish and a car in the picture, "which colour?" has two right answers; such pictures are left out.
    """
    return {
        row: str(sample["json"]["factors"][factor])
        for row, sample in enumerate(samples)
        if len(sample["json"]["scene"]["things"]) == 1 and sample["json"]["factors"][factor] is not None
    }


def alone(sample: Sample) -> bool:
    """Whether the picture's one kind of thing is there once, not as a group of copies."""
    return sample["json"]["factors"]["count"] == 1
