"""The header that says what weights are."""

import json
import math

import pytest

from models.artefact import (
    METADATA_KEY,
    Artefact,
    PictureInput,
    Provenance,
    artefact_metadata,
    parse_artefact_metadata,
)
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.structures import Classes
from tests.models.test_detector import settings

SPARSE = Classes(("cat", "dog", "zebra crossing"), (1, 4, 17))


def header(
    provenance: Provenance | None = None, detector: DetectorSettings | None = None
) -> dict[str, str]:
    return artefact_metadata(
        "detector",
        detector or settings(),
        SPARSE,
        PictureInput(short_side=480, max_size=640),
        provenance or Provenance(),
    )


def parsed(metadata: dict[str, str]) -> Artefact:
    artefact = parse_artefact_metadata(metadata, {}, "weights")
    assert artefact is not None
    return artefact


def test_sparse_category_ids_come_back_with_their_names() -> None:
    """Peers' bug 8: ids 1, 4, 17 were renumbered on the way."""
    assert parsed(header()).classes == SPARSE


def test_architecture_input_and_origin_come_back() -> None:
    told = Provenance(run="s3://b/r", init=("a.pth", "b.pth"), data="voc", metrics={"eval/ap": 0.5})
    artefact = parsed(header(told))
    assert artefact.detector == settings()
    assert artefact.input == PictureInput(short_side=480, max_size=640)
    assert artefact.provenance.model_copy(update={"version": ""}) == told
    assert artefact.provenance.version


def test_the_step_of_a_checkpoint_is_read_beside_the_header() -> None:
    assert parsed(header() | {"step": "12"}).provenance.step == 12
    assert parsed(header(Provenance(step=3)) | {"step": "12"}).provenance.step == 3


def test_no_credentials_get_into_a_header() -> None:
    told = Provenance(
        run="s3://KEY:SECRET@bucket/run",
        init=("https://me:SECRET@host/w.pth?token=SECRET",),
        data="https://host/set?sig=SECRET#val",
    )
    backbone = settings().backbone.model_copy(update={"weights": "https://h/r.pth?key=SECRET"})
    metadata = header(told, settings().model_copy(update={"backbone": backbone}))
    assert "SECRET" not in metadata[METADATA_KEY]
    artefact = parsed(metadata)
    assert artefact.provenance.run == "s3://bucket/run"
    assert artefact.provenance.init == ("https://host/w.pth",)
    assert artefact.provenance.data == "https://host/set#val"


def test_a_number_that_does_not_exist_leaves_the_header_readable() -> None:
    """AP of small objects where there are none: JSON would hold a null in its place."""
    told = parsed(header(Provenance(metrics={"eval/ap": 0.5, "eval/ap_small": math.nan})))
    assert told.provenance.metrics == {"eval/ap": 0.5}


def test_files_of_others_have_no_header() -> None:
    assert parse_artefact_metadata({"format": "pt"}, {}, "weights") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, r"w: its header is not one of this querypatch \(format: .*; use the"),
        ({"kind": "segmenter"}, r"w: its header is not one of this querypatch \(kind"),
        ({"class_ids": [1, 1, 2]}, "w: its header is damaged: the id 1 stands for two classes"),
    ],
)
def test_a_foreign_header_is_refused_in_one_line(change: dict[str, object], complaint: str) -> None:
    content = json.loads(header()[METADATA_KEY]) | change
    with pytest.raises(WeightsError, match=complaint) as caught:
        parse_artefact_metadata({METADATA_KEY: json.dumps(content)}, {}, "w")
    assert "\n" not in str(caught.value)


def test_a_header_that_is_no_json_is_refused() -> None:
    with pytest.raises(WeightsError, match="its header is not one of this querypatch"):
        parse_artefact_metadata({METADATA_KEY: "{"}, {}, "w")
