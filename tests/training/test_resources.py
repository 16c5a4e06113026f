"""Workers as a number or a range."""

import pytest
from pydantic import ValidationError

from training.resources import Resources


@pytest.mark.parametrize(
    ("said", "fewest", "most", "is_elastic"),
    [(1, 1, 1, False), (5, 5, 5, False), ("2..8", 2, 8, True), ("3..3", 3, 3, False)],
)
def test_workers_are_a_number_or_a_range(
    said: int | str, fewest: int, most: int, is_elastic: bool
) -> None:
    resources = Resources(workers=said)
    assert (resources.min_workers, resources.max_workers) == (fewest, most)
    assert resources.is_elastic == is_elastic


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (0, "0: a run needs 1 worker or more"),
        ("0..2", "0..2: a run needs 1 worker or more"),
        ("8..2", "8..2: the fewest come first, say 2..8"),
        ("2-8", "'2-8' is neither a number nor a range; say e.g. 4 or 2..8"),
        ("2..", "'2..' is neither a number nor a range; say e.g. 4 or 2..8"),
    ],
)
def test_workers_that_cannot_be_are_refused(said: int | str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Resources(workers=said)
    assert reason in str(caught.value)
