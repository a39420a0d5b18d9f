"""Ground truth for probes and zero-shot classification on the synthetic world."""

from clipfix.evals.embed import Sample


def labels(samples: list[Sample], factor: str) -> dict[int, str]:
    """Return {row: value of a factor} for the images with a single kind of thing that has this factor.

    Images with several kinds are left out: with a fish and a car, the colour of the thing would be ambiguous.
    """
    return {
        row: str(sample["json"]["factors"][factor])
        for row, sample in enumerate(samples)
        if len(sample["json"]["scene"]["things"]) == 1 and sample["json"]["factors"][factor] is not None
    }


def is_single_thing(sample: Sample) -> bool:
    """Return whether the image shows one thing rather than several copies of it."""
    return sample["json"]["factors"]["count"] == 1
