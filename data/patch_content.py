"""Pretraining's content of a batch: random query patches of every picture (UP-DETR, 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.batches import CutPicture, PackedPatchBatch, join, pack
from data.loader import Place, ReadSample, scale_generator
from data.packing import SkippedPicture
from data.patches import ColourOn, PatchSettings, cut_patches, draw_short_side
from data.pictures import BrokenPicture, decode_picture
from data.randomness import sample_generator
from data.samples import Sample, picture_bytes, why_no_picture


@dataclass(frozen=True)
class PatchContent:
    """Samples to pictures with query patches; a `data.loader.BatchContent`."""

    num_patches: int
    """Query patches of each picture."""
    patches: PatchSettings = field(default_factory=PatchSettings)
    colour_on: ColourOn = "cpu"

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,  # noqa: ARG002  (patches need no other picture)
        shared: bool,
    ) -> PackedPatchBatch:
        """The pictures with their patches; each at the scale of the batch, or one of its own."""
        cut = [
            self.cut(
                place, stream, sample,
                draw_short_side(self.patches, scale_generator(place, sample.id)),
            )
            for stream, sample in zip(streams, samples, strict=True)
        ]  # fmt: skip
        return self.packed(cut, place.step, shared)

    def join(self, parts: Sequence[PackedPatchBatch], pin: bool) -> PackedPatchBatch:
        """The parts of one step as one batch, see `data.batches.join`."""
        return join(parts, pin)

    def cut(
        self, place: Place, stream: int, sample: Sample, short_side: int
    ) -> CutPicture | SkippedPicture:
        """A picture with its query patches, or why there is none."""
        data = picture_bytes(sample)
        if data is None:
            return SkippedPicture(sample.id, sample.key, sample.shard, why_no_picture(sample))
        generator = sample_generator(place.seed, place.epoch, sample.id, "patches")
        try:
            cut = cut_patches(
                decode_picture(data), self.patches, self.num_patches, short_side, generator,
                self.colour_on,
            )  # fmt: skip
        except BrokenPicture as error:
            return SkippedPicture(sample.id, sample.key, sample.shard, str(error))
        return CutPicture(stream, sample.id, sample.key, cut)

    def packed(
        self, cut: Sequence[CutPicture | SkippedPicture], step: int, shared: bool = False
    ) -> PackedPatchBatch:
        """The pictures as one part of a batch, with the names of those that there are not."""
        pictures = [picture for picture in cut if isinstance(picture, CutPicture)]
        skipped = [picture for picture in cut if isinstance(picture, SkippedPicture)]
        return pack(pictures, skipped, step, self.num_patches, self.patches.patch_size, shared)
