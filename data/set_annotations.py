"""The annotations of a labelled set, picture by picture.

Where the pictures are files of their own the texts are at hand, and no picture is read. Shards have
them beside the pictures, so they are read as a whole, once: as long as an epoch's reading takes.
"""

from collections.abc import Iterator

from data.annotations import AnnotationError, BoxAnnotation, parse_annotation
from data.detection_set import DetectionSet
from data.held_out import read_samples
from data.picture_files import PictureFiles
from data.reading import ReadingSettings


def set_annotations(
    data: DetectionSet, reading: ReadingSettings
) -> Iterator[tuple[int, BoxAnnotation]]:
    """Sample id and annotation of every picture, by rising id.

    Raises:
        AnnotationError: a sample without an annotation, by name.
        Of shards also what reading them raises.
    """
    if data.files is not None:
        yield from _of_files(data.files)
        return
    ids = range(data.index.num_samples)
    for sample in read_samples(data.index, ids, data.storage_options, reading):
        if "json" not in sample.parts:
            raise AnnotationError(
                f"{sample.key} in {sample.shard} has no json part with its boxes; write the shards "
                "from a COCO json, a VOC root or a YOLO data.yaml"
            )
        yield sample.id, parse_annotation(sample.parts["json"])


def _of_files(files: PictureFiles) -> Iterator[tuple[int, BoxAnnotation]]:
    for id in range(files.num_pictures):
        yield id, parse_annotation(files.item(id).annotation)
