"""A sample's random numbers depend on (seed, epoch, sample, purpose) and on nothing else."""

from itertools import product

import numpy as np
import pytest

from data.randomness import sample_generator

WORDS = [12470480746904483321, 6582689245661364502, 15756991196033396928]


def test_the_numbers_are_written_down_so_that_no_release_changes_a_run() -> None:
    drawn = sample_generator(seed=42, epoch=3, sample_id=1_281_166).random(3)
    words = sample_generator(seed=42, epoch=3, sample_id=1_281_166).bit_generator.random_raw(3)
    assert words.tolist() == WORDS
    assert drawn.tolist() == [(word >> 11) / 2**53 for word in WORDS]


def test_the_layout_of_a_draw_does_not_change_its_numbers() -> None:
    one_by_one = sample_generator(1, 2, 3)
    at_once = sample_generator(1, 2, 3).random((2, 3))
    assert [one_by_one.random() for _ in range(6)] == at_once.ravel().tolist()


def test_every_argument_makes_another_stream() -> None:
    arguments = list(product((0, 1, 2), (0, 1, 2), (0, 1, 2), ("", "scale")))
    first = {sample_generator(*four).random() for four in arguments}
    assert len(first) == len(arguments)


def test_neighbouring_samples_are_not_correlated() -> None:
    drawn = np.array([sample_generator(7, 0, sample).random() for sample in range(4000)])
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(len(drawn))
    assert abs(drawn.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(drawn))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    sample_generator(1, 2, 3).random(5)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (0, -1, 0), (0, 0, 2**64)])
def test_a_number_out_of_range_is_named(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"=(-1|18446744073709551616) is outside"):
        sample_generator(*numbers)
