"""Settings of Deformable and Sparse DETRs: what does not go together, and what it says."""

import pytest
from pydantic import ValidationError

from models.detector_settings import DetectorSettings
from tests.models.deformable_small import DEFORMABLE, REFINED, SPARSE, TWO_STAGE, small


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"feature_levels": 4}, "feature_levels=4 with encoder_attention=dense .*=deformable"),
        (DEFORMABLE | {"pre_norm": True}, "pre_norm=true goes with dense .*use pre_norm=false"),
        (
            {"decoder_attention": "deformable", "pre_norm": True},
            "pre_norm=true goes with dense .*use pre_norm=false",
        ),
        (DEFORMABLE | {"position": "learned"}, "position=learned .*dense alone; use position=sine"),
        ({"box_refinement": True}, "box_refinement=true moves .*use decoder_attention=deformable"),
        (DEFORMABLE | {"two_stage": True}, "two_stage=true begins with .*use box_refinement=true"),
        ({"rho": 0.3, "encoder_layers": 0}, "rho=0.3 chooses .*encoder_layers=0 .*rho=null"),
        ({"rho": 0.0}, "rho\n.*greater than 0"),
        ({"rho": 1.5}, "rho\n.*less than or equal to 1"),
        ({"feature_levels": 9}, "feature_levels\n.*less than or equal to 8"),
        ({"selection": {"criterion": "best"}}, "selection.criterion\n.*'dam', 'objectness' or"),
    ],
)
def test_what_does_not_go_together_names_the_key_the_value_and_the_way_out(
    changes: dict[str, object], complaint: str
) -> None:
    """Public bug 7.1.1 is one of them: two stages without refinement break in the decoder."""
    with pytest.raises(ValidationError, match=complaint):
        small(changes)


@pytest.mark.parametrize(
    "kind",
    [
        DEFORMABLE,
        REFINED,
        TWO_STAGE,
        SPARSE,
        {"rho": 0.3},
        DEFORMABLE | {"rho": 0.3},
        DEFORMABLE | {"feature_levels": 1, "encoder_layers": 0},
    ],
)
def test_a_selection_needs_neither_two_stages_nor_deformable_attention(
    kind: dict[str, object],
) -> None:
    """Public bug 7.2.1 wants both for rho."""
    assert small(kind).rho == kind.get("rho")


def test_settings_that_say_nothing_of_it_are_those_of_detr() -> None:
    """So that what was saved before these keys existed is read as it was meant."""
    read = DetectorSettings.model_validate({"backbone": {}})
    assert (read.encoder_attention, read.decoder_attention) == ("dense", "dense")
    assert (read.feature_levels, read.class_scores, read.rho) == (1, "softmax", None)
    assert not read.box_refinement
    assert not read.two_stage
    assert not read.learns_selection


@pytest.mark.parametrize(("levels", "given"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_the_backbone_gives_three_maps_at_the_most(levels: int, given: int) -> None:
    assert small(DEFORMABLE, feature_levels=levels).backbone_levels == given
