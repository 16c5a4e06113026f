"""Picture files as the stream sees them: packed, shared, read, and cut down to subsets."""

import multiprocessing
import pickle
from contextlib import closing
from dataclasses import replace
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from data.detection_content import DetectionContent
from data.detection_transforms import AugmentSettings
from data.held_out import read_samples
from data.index import index_digest
from data.loader import StreamSettings, StreamSource
from data.picture_files import FileItem, open_reader, pack_files, read_one, restricted
from data.reading import CacheSettings, ReadingSettings
from data.samples import SEGMENTS_PART, Sample, picture_bytes
from data.storage import StorageUnreachable, open_folder
from data.stream import ExactStream
from tests.data.faulty import FaultyFileSystem, faulty, timed_out
from tests.data.labelled import CLASSES, write_files
from tests.data.tars import write_shards

__all__ = ["faulty"]


def test_each_file_comes_back_with_its_annotation(tmp_path: Path) -> None:
    items = [
        FileItem("a", "deep/er/a.JPG", b'{"a":1}', 30, 20),
        FileItem("b", "b.jfif", b"", 0, 0),
        FileItem("é", "c.png", b"{}", 5, 7, segments="maps/c.png"),
    ]
    for name in ("deep/er/a.JPG", "b.jfif", "c.png", "maps/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    index, files = pack_files(open_folder(str(tmp_path)), items)
    assert index.num_samples == files.num_pictures == 3
    assert [files.item(id, item.width, item.height) for id, item in enumerate(items)] == items
    a, b, c = read_samples(index, [0, 1, 2], files=files)
    assert a == Sample(0, "a", "deep/er/a.JPG", {"json": b'{"a":1}', "jpg": b"deep/er/a.JPG"})
    assert b.parts == {"json": b"", "jpg": b"b.jfif"}
    assert c.parts == {"json": b"{}", "png": b"c.png", SEGMENTS_PART: b"maps/c.png"}
    assert picture_bytes(c) == b"c.png"


def test_segments_are_never_taken_for_the_picture() -> None:
    """A part "segments.png" ends like a picture's."""
    assert picture_bytes(Sample(0, "k", "s", {SEGMENTS_PART: b"map"})) is None
    assert picture_bytes(Sample(0, "k", "s", {"png": b"p", SEGMENTS_PART: b"map"})) == b"p"


def test_two_sets_are_told_apart_by_key_name_annotation_and_order(tmp_path: Path) -> None:
    """Peers' bug 15: a run must notice that it resumes on another set."""
    folder = open_folder(str(tmp_path))
    items = [FileItem("a", "a.jpg", b"{}", 3, 4), FileItem("b", "b.jpg", b"{}", 3, 4)]
    others = [
        [items[0], replace(items[1], key="c")],
        [items[0], replace(items[1], name="c.jpg")],
        [items[0], replace(items[1], annotation=b"{ }")],
        [items[0], replace(items[1], segments="b.png")],
        items[::-1],
        items[:1],
    ]
    digests = [index_digest(pack_files(folder, each)[0]) for each in (items, *others)]
    assert len(set(digests)) == len(digests)
    assert index_digest(pack_files(folder, items)[0]) == digests[0]


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    item = FileItem("a", "a.jpg", b"{}", 3, 4)
    with pytest.raises(ValueError, match="the key a comes twice"):
        pack_files(open_folder(str(tmp_path)), [item, replace(item, name="b.jpg")])
    with pytest.raises(ValueError, match="the picture a has no file name"):
        pack_files(open_folder(str(tmp_path)), [replace(item, name="")])


def test_annotations_are_shared_by_all_loader_processes_not_copied(tmp_path: Path) -> None:
    """Peers' bug 11: memory per loader process stays flat whatever the size of the set.

    After the first process has begun, the texts lie in shared memory; what travels is a handle.
    """
    index, files = write_files(tmp_path, 12)
    assert not files.texts.is_shared()
    source = StreamSource(
        index=index,
        seed=1,
        global_batch=4,
        content=DetectionContent(CLASSES, "keep", AugmentSettings(kind="none", short_sides=(32,))),
        files=files,
    )
    with closing(ExactStream(source, StreamSettings(processes=2)).from_step(0)) as batches:
        list(islice(batches, 3))
        assert files.texts.is_shared()
        assert files.bounds.is_shared()
    assert multiprocessing.active_children() == []
    large = pack_files(open_folder(str(tmp_path)), [FileItem("a", "a.jpg", bytes(10**6), 1, 1)])[1]
    assert len(pickle.dumps(large)) > 10**6
    assert len(bytes(ForkingPickler.dumps(large))) < 2000


def test_a_missing_picture_is_a_sample_that_says_so(tmp_path: Path) -> None:
    index, files = write_files(tmp_path, 3, missing=(1,))
    (tmp_path / "0002.jpg").unlink()
    (tmp_path / "0002.jpg").mkdir()
    present, missing, folder = read_samples(index, [0, 1, 2], files=files)
    assert present.fault is None
    assert missing.fault == "no such file: 0001.jpg"
    assert folder.fault is not None
    assert folder.fault.startswith("0002.jpg: IsADirectoryError")
    assert list(missing.parts) == ["json"]


def test_a_storage_that_does_not_answer_is_tried_again_and_counted(
    tmp_path: Path, faulty: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, files = write_files(tmp_path, 2)
    away = replace(index, url=f"faulty:/{index.url}")
    _give_whole_files(faulty, monkeypatch)
    faulty.faults = [timed_out, timed_out]
    reader = open_reader(away, files, {}, ReadingSettings(first_delay_s=0.0))
    assert read_one(away, reader, 1).parts["jpg"] == (tmp_path / "0001.jpg").read_bytes()
    counters = reader.take_counters()
    assert (counters.reads, counters.retries) == (1, 2)
    assert counters.bytes_read == (tmp_path / "0001.jpg").stat().st_size
    faulty.faults = [timed_out] * 3
    hasty = open_reader(away, files, {}, ReadingSettings(first_delay_s=0.0, attempts=3))
    with pytest.raises(StorageUnreachable, match=r"0000\.jpg: failed 3 times"):
        read_one(away, hasty, 0)


def test_picture_files_are_cached(
    tmp_path: Path, faulty: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, files = write_files(tmp_path / "pictures", 2)
    away = replace(index, url=f"faulty:/{index.url}")
    _give_whole_files(faulty, monkeypatch)
    reading = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    reader = open_reader(away, files, {}, reading)
    first, again = read_one(away, reader, 1), read_one(away, reader, 1)
    assert first == again
    counters = reader.take_counters()
    assert (counters.reads, counters.cache_hits) == (1, 1)


def test_a_subset_of_files_has_the_pictures_asked_for_in_their_order(tmp_path: Path) -> None:
    index, files = write_files(tmp_path, 9)
    few, few_files = restricted(index, files, [7, 2, 3])
    assert few.num_samples == 3
    keys = [sample.key for sample in read_samples(few, [0, 1, 2], files=few_files)]
    assert keys == ["p7", "p2", "p3"]
    (all_pictures,), (chosen,) = index.shards, few.shards
    assert chosen.widths.tolist() == all_pictures.widths[[7, 2, 3]].tolist()
    assert index_digest(few) != index_digest(restricted(index, files, [7, 3, 2])[0])


def test_a_subset_of_shards_reads_only_its_samples(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (5, 4, 6))
    ids = [13, 3, 4, 5, 6, 0, 9, 10]
    few, none = restricted(index, None, ids)
    assert none is None
    assert few.num_samples == 8
    samples = list(read_samples(few, range(8)))
    whole = list(read_samples(index, ids))
    assert [sample.id for sample in samples] == list(range(8))
    assert [sample.key for sample in samples] == [f"picture{id:05}" for id in ids]
    assert [sample.parts for sample in samples] == [sample.parts for sample in whole]
    widths = np.concatenate([shard.widths for shard in index.shards])[ids]
    assert np.concatenate([shard.widths for shard in few.shards]).tolist() == widths.tolist()


def test_subsets_of_shards_are_told_apart_and_the_whole_is_itself(tmp_path: Path) -> None:
    """Peers' bug 15, for low-label subsets."""
    index = write_shards(tmp_path, (5, 4))
    some, others = (restricted(index, None, ids)[0] for ids in ([0, 1, 2], [1, 2, 3]))
    assert index_digest(some) != index_digest(others)
    assert index_digest(restricted(index, None, range(9))[0]) == index_digest(index)
    of_part = restricted(restricted(index, None, [1, 2, 3])[0], None, [1, 2])[0]
    assert index_digest(of_part) == index_digest(restricted(index, None, [2, 3])[0])


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 9], "sample 9 is not one of the 9"), ([1, 1], "2 samples were chosen, 1 of them")],
)
def test_a_subset_of_unknown_or_repeated_samples_is_refused(
    tmp_path: Path, ids: list[int], message: str
) -> None:
    index = write_shards(tmp_path, (5, 4))
    with pytest.raises(ValueError, match=message):
        restricted(index, None, ids)


def test_one_sample_is_read_by_its_id(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (5, 4))
    reader = open_reader(index, None, {}, ReadingSettings())
    assert read_one(index, reader, 6).key == "picture00006"
    with pytest.raises(ValueError, match="holds 9"):
        read_one(index, reader, 9)


def _give_whole_files(faulty: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem of the shards' tests asks for ranges; picture files are read whole."""
    ranged = faulty.cat_file

    def whole(self: FaultyFileSystem, path: str) -> bytes:
        return ranged(self, path, 0, Path(path).stat().st_size)

    monkeypatch.setattr(faulty, "cat_file", whole)
