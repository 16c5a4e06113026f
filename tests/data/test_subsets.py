"""Seeded parts of a labelled set: nested, the same for all, and written down."""

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.annotations import parse_annotation
from data.detection_set import DetectionSet, open_detection_set
from data.shards import ShardSettings, write_shards
from data.source_items import SourceError
from data.sources import list_source
from data.subsets import (
    SubsetSettings,
    read_manifest,
    sample_names,
    subset_ids,
    subset_of,
    write_manifest,
)
from tests.data.labelled_files import Entry, box, image, write_json

CLASSES = {1: "ant", 4: "bee", 9: "cat"}


def _set(folder: Path, count: int) -> DetectionSet:
    """Picture n has an ant; every third a bee, and the first a cat that is a crowd."""
    entries = [box(n, n, 1, (1, 1, 2, 2)) for n in range(count)]
    entries += [box(100 + n, n, 4, (2, 2, 3, 3)) for n in range(0, count, 3)]
    crowd: Entry = {**box(300, 0, 9, (0, 0, 3, 3)), "iscrowd": 1}
    images = [image(n, f"{n:03}.jpg") for n in range(count)]
    path = write_json(folder / "a.json", images, [*entries, crowd], CLASSES)
    return open_detection_set(str(path))


def test_a_smaller_share_lies_inside_a_greater(tmp_path: Path) -> None:
    data = _set(tmp_path, 40)
    chosen = [
        set(subset_ids(data, SubsetSettings(share=share, seed=3))) for share in (0.01, 0.1, 0.5, 1)
    ]
    assert [len(ids) for ids in chosen] == [1, 4, 20, 40]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


def test_a_share_depends_on_seed_and_keys_alone(tmp_path: Path) -> None:
    half, more = SubsetSettings(share=0.5, seed=1), SubsetSettings(share=0.5, seed=2)
    data = _set(tmp_path, 12)
    assert subset_ids(data, half) == (1, 2, 5, 6, 7, 10)
    assert subset_ids(data, more) != subset_ids(data, half)


def test_the_subset_holds_the_chosen_pictures_in_their_order(tmp_path: Path) -> None:
    data = _set(tmp_path, 12)
    chosen = subset_of(data, subset_ids(data, SubsetSettings(share=0.5, seed=1)))
    assert sample_names(chosen) == ("001", "002", "005", "006", "007", "010")
    assert chosen.files is not None
    assert parse_annotation(chosen.files.item(4).annotation).image_id == 7
    assert chosen.classes == data.classes


def test_k_pictures_of_each_class_lie_inside_k_and_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = _set(tmp_path, 12)
    chosen = [set(subset_ids(data, SubsetSettings(per_class=k))) for k in (1, 2, 3)]
    assert chosen[0] < chosen[1] < chosen[2]
    for k, ids in enumerate(chosen, start=1):
        assert len(ids & {0, 3, 6, 9}) >= k
        assert k <= len(ids) <= 2 * k
    with caplog.at_level(logging.WARNING):
        assert subset_ids(data, SubsetSettings(per_class=12)) == tuple(range(12))
    assert "class bee has 4 pictures where per_class=12" in caplog.text
    assert "class cat has 0 pictures" in caplog.text, "a crowd is no object to learn from"


def test_shards_are_cut_down_too(tmp_path: Path) -> None:
    _set(tmp_path, 12)
    settings = ShardSettings(samples_per_shard=5)
    write_shards(list_source(str(tmp_path / "a.json")), str(tmp_path / "s"), settings)
    data = open_detection_set(str(tmp_path / "s"))
    assert sample_names(data)[4:6] == ("shard-000000.tar/4", "shard-000001.tar/0")
    small, large = (subset_ids(data, SubsetSettings(share=share)) for share in (0.25, 0.5))
    assert (len(small), len(large)) == (3, 6)
    assert set(small) < set(large)
    quarter = subset_ids(data, SubsetSettings(share=0.25))
    assert subset_of(data, quarter).index.num_samples == 3
    assert len(subset_ids(data, SubsetSettings(per_class=2))) <= 4


def test_a_manifest_gives_the_same_choice_back(tmp_path: Path) -> None:
    data, settings = _set(tmp_path, 12), SubsetSettings(share=0.5, seed=1)
    url = str(tmp_path / "half.json")
    write_manifest(url, data, subset_ids(data, settings), settings)
    assert subset_ids(data, SubsetSettings(manifest=url)) == (1, 2, 5, 6, 7, 10)
    assert '"010"' in (tmp_path / "half.json").read_text()


def test_a_manifest_of_another_set_is_refused(tmp_path: Path) -> None:
    """Peers' bug 15: another data set under an old choice would be other pictures, silently."""
    settings = SubsetSettings(share=0.5)
    one, other = _set(tmp_path / "one", 12), _set(tmp_path / "other", 13)
    url = str(tmp_path / "half.json")
    write_manifest(url, one, subset_ids(one, settings), settings)
    with pytest.raises(SourceError, match=r"was made of .*one/a.json, and .*other/a.json holds"):
        read_manifest(url, other)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x", "version": 1}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    data = _set(tmp_path, 2)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(SourceError, match=r"m\.json is no manifest of a subset"):
        read_manifest(str(tmp_path / "m.json"), data)
    with pytest.raises(SourceError, match=r"no manifest at .*gone\.json"):
        read_manifest(str(tmp_path / "gone.json"), data)


def test_a_subset_is_chosen_in_one_way() -> None:
    with pytest.raises(ValidationError, match="share and per_class is given"):
        SubsetSettings(share=0.1, per_class=3)
    with pytest.raises(ValidationError, match="none of share, per_class and manifest is given"):
        SubsetSettings()
