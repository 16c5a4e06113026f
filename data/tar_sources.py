"""WebDataset tars made by others as a source of pictures: all parts of a sample are kept.

Listing reads the tars' headers once (a tar that is not on a local disk is copied for it, one at a
time); each sample is then one ranged read, so that the new order can be any.
"""

import posixpath
from collections.abc import Iterator

from data.source_items import LeftOut, PictureInTar, Source, SourceError, unique_keys
from data.storage import Folder, local_copy
from data.tar_layout import TarLayout, TarPart, TarSample, merged_by_dots, picture_part, read_layout


def list_tars(place: Folder) -> Source:
    """Every sample with a picture, of one tar, of a folder's tars, or of a glob (`*`) of tars.

    Pictures that WebDataset would take for one sample, because of dots in their names
    (`a.v1.jpg`, `a.v2.jpg`), become samples of their own. DamagedTarError where a tar is.
    """
    folder, names = _tars(place)
    found, left_out = list[tuple[str, TarSample]](), list[LeftOut]()
    for name in names:
        with local_copy(folder, name) as local:
            layout = read_layout(local, f"{folder.url}/{name}")
        for sample in _split(layout):
            if picture_part(sample) is None:
                left_out.append(LeftOut(f"{name}/{sample.key}", "the sample holds no picture"))
            else:
                found.append((name, sample))
    keys = unique_keys(f"{sample.key}.picture" for _, sample in found)
    items = tuple(
        PictureInTar(key, f"{name}/{sample.key}", name, sample.parts)
        for key, (name, sample) in zip(keys, found, strict=True)
    )
    return Source(folder, "tars", items, tuple(left_out))


def read_from_tar(folder: Folder, item: PictureInTar) -> dict[str, bytes]:
    """The parts by extension, by one ranged read, the picture first; OSError where it is short."""
    start = min(part.start for part in item.parts)
    end = max(part.start + part.size for part in item.parts)
    data = folder.filesystem.cat_file(folder.at(item.tar), start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{folder.url}/{item.tar}: {len(data)} bytes of {end - start} came back")
    picture = picture_part(TarSample(item.key, start, item.parts))
    parts = sorted(item.parts, key=lambda part: part != picture)
    return {part.extension: data[part.start - start :][: part.size] for part in parts}


def _tars(place: Folder) -> tuple[Folder, list[str]]:
    if not place.path.endswith(".tar"):
        names = [path.rpartition("/")[2] for path in place.filesystem.ls(place.path, detail=False)]
        return place, sorted(name for name in names if name.endswith(".tar"))
    parent = Folder(posixpath.dirname(place.url), place.filesystem, posixpath.dirname(place.path))
    names = [path.rpartition("/")[2] for path in place.filesystem.glob(place.path)]
    if not names:
        raise SourceError(f"nothing at {place.url}: check the path, bucket and credentials")
    return parent, sorted(names)


def _split(layout: TarLayout) -> Iterator[TarSample]:
    for sample in layout.samples:
        if merged_by_dots(sample) is None:
            yield sample
            continue
        groups = dict[str, list[TarPart]]()
        for part in sample.parts:
            inner, _, extension = part.extension.rpartition(".")
            groups.setdefault(inner, []).append(TarPart(extension, part.start, part.size))
        for inner, parts in groups.items():
            yield TarSample(f"{sample.key}.{inner}", sample.start, tuple(parts))
