"""A pretrained transformer becomes another member of its family: Deformable DETR, Sparse DETR."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.one_shot_weights import initial_one_shot
from finetune.transfer import initial_detector, resolve_model
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.placing import LoadReport
from models.patch_queries import PatchDetector, QueryPatches
from models.structures import Classes

COLOURS = Classes(("red", "blue", "mauve"), (1, 2, 5))
DEFORMABLE = {
    "backbone": {"name": "resnet18", "output": "layer4"},
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 3,
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "feedforward_dim": 24,
    "num_queries": 6,
    "class_scores": "sigmoid",
}
CONDITIONAL = {
    "encoder_attention": "dense",
    "decoder_attention": "conditional",
    "feature_levels": 1,
}
ATTENTION = {"encoder_attention": "deformable", "decoder_attention": "deformable"}
TWO_STAGE = {**ATTENTION, "two_stage": True, "box_refinement": True, "num_queries": 9}
SPARSE = {
    **TWO_STAGE,
    "rho": 0.3,
    "proposal_content": "memory",
    "proposal_classes": "all",
    "selection": {"encoder_auxiliary": True},
}


def settings_of(**given: object) -> DetectorSettings:
    return DetectorSettings.model_validate({**DEFORMABLE, **given})


def recipe(**given: object) -> DetectorSettings:
    """What a recipe says, and nothing else."""
    return DetectorSettings.model_validate({"backbone": {}, **given})


def pretrained(folder: Path, **given: object) -> tuple[str, dict[str, torch.Tensor]]:
    """A file of UP-DETR's task on such a transformer, and its detector's tensors."""
    settings = settings_of(num_classes=2, **given)
    patches = QueryPatches(num_patches=2)
    model = PatchDetector(settings, patches, torch.Generator().manual_seed(3))
    _stir(model)
    metadata = artefact_metadata("patch_detector", settings, None, PictureInput(), Provenance())
    save_file(model.state_dict(), folder / "pretrained.safetensors", metadata=metadata)
    return str(folder / "pretrained.safetensors"), model.detector.state_dict()


def finished(folder: Path, classes: Classes, **given: object) -> tuple[str, Detector]:
    settings = settings_of(num_classes=len(classes.names), **given)
    detector = Detector(settings, torch.Generator().manual_seed(4))
    _stir(detector)
    metadata = artefact_metadata("detector", settings, classes, PictureInput(), Provenance())
    save_file(detector.state_dict(), folder / "finished.safetensors", metadata=metadata)
    return str(folder / "finished.safetensors"), detector


def _stir(model: torch.nn.Module) -> None:
    """No two heads alike, none at its first values."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)


def parts(report: LoadReport, names: tuple[str, ...]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_same_transformer_is_finetuned_with_proposals_as_queries(tmp_path: Path) -> None:
    source, theirs = pretrained(tmp_path)
    detector, report = initial_detector(recipe(**TWO_STAGE), source, COLOURS, seed=5)
    settings = detector.settings
    assert (settings.two_stage, settings.num_queries, settings.feature_levels) == (True, 9, 3)
    ours = detector.state_dict()
    for part in ("backbone.", "input_projections.", "encoder.", "decoder.", "level_embedding"):
        moved = [name for name in ours if name.startswith(part)]
        assert moved
        assert all(torch.equal(ours[name], theirs[name]) for name in moved)
    assert parts(report, report.new) == {
        *("class_head", "box_head", "proposal_tokens", "proposal_queries"),
        *("proposal_class_head", "proposal_box_head"),
    }
    assert parts(report, report.left_out) == {
        *("queries", "reference_points", "class_head", "box_head"),
        *("patch_projection", "reconstruction"),
    }
    unused = [name for name in report.left_out if name.startswith("box_head.")]
    assert set(unused) == {"box_head.layers.2.weight", "box_head.layers.2.bias"}
    for said in ("new: the heads of the proposals", "left out: the learned queries"):
        assert said in report.notes


def test_a_shared_box_head_serves_every_layer_and_moves_nothing_at_first(tmp_path: Path) -> None:
    """Its first two matrices go over; what moves a box begins with "stay"."""
    source, theirs = pretrained(tmp_path)
    for two_stage, moving in ((True, (0, 1)), (False, (1,))):
        said = {**TWO_STAGE, "two_stage": two_stage, "num_queries": 6}
        detector, report = initial_detector(recipe(**said), source, COLOURS, seed=5)
        ours = detector.state_dict()
        for layer in range(2):
            for part in ("layers.0.weight", "layers.1.bias"):
                assert torch.equal(ours[f"box_head.{layer}.{part}"], theirs[f"box_head.{part}"])
        for layer in moving:
            assert not ours[f"box_head.{layer}.layers.2.weight"].any()
            assert f"box_head.{layer}.layers.2.bias" in report.new
        if 0 not in moving:
            for kind in ("weight", "bias"):
                last = ours[f"box_head.0.layers.2.{kind}"]
                assert torch.equal(last, theirs[f"box_head.layers.2.{kind}"])
        assert f"box head: {len(moving)} of its last matrices are new" in "\n".join(report.notes)


def test_a_dense_encoder_becomes_a_sparse_one_and_a_sparse_one_keeps_its_scorer(
    tmp_path: Path,
) -> None:
    source, _ = pretrained(tmp_path)
    _, report = initial_detector(recipe(**SPARSE), source, COLOURS, seed=5)
    new = {"scorer", "encoder_class_head", "encoder_box_head", "proposal_tokens"}
    assert new <= parts(report, report.new)
    source, theirs = pretrained(tmp_path, rho=0.4, selection={"encoder_auxiliary": False})
    detector, report = initial_detector(recipe(**SPARSE), source, COLOURS, seed=5)
    assert detector.settings.rho == 0.3
    kept = {"scorer", "proposal_tokens"}
    assert kept <= parts(report, report.loaded)
    assert not kept & parts(report, report.new)
    assert "encoder_class_head" in parts(report, report.new)
    ours = detector.state_dict()
    name = "scorer.layers.0.weight"
    assert torch.equal(ours[name], theirs[name])


def test_a_sparse_file_is_finetuned_dense_where_the_recipe_says_so(tmp_path: Path) -> None:
    source, _ = pretrained(tmp_path, rho=0.4)
    said = {**TWO_STAGE, "rho": None}
    detector, report = initial_detector(recipe(**said), source, COLOURS, seed=5)
    assert detector.settings.rho is None
    assert {"scorer", "encoder_class_head"} <= parts(report, report.left_out)
    assert "proposal_tokens" in parts(report, report.loaded)
    kept = resolve_model(recipe(**TWO_STAGE), source, COLOURS)
    assert kept.rho == 0.4


def test_every_class_head_gets_its_rows_by_name(tmp_path: Path) -> None:
    """Sigmoid heads have no row of "no object"; two decoder layers, tokens, encoder layers."""
    source, theirs = finished(tmp_path, Classes(("blue", "teal", "red"), (1, 2, 3)), **SPARSE)
    detector, report = initial_detector(recipe(), source, COLOURS, seed=5)
    fresh = Detector(detector.settings, torch.Generator().manual_seed(5)).state_dict()
    ours, given = detector.state_dict(), theirs.state_dict()
    heads = ("class_head.0", "class_head.1", "proposal_class_head", "encoder_class_head.1")
    for head in heads:
        for kind in ("weight", "bias"):
            name = f"{head}.{kind}"
            wanted = torch.stack([given[name][2], given[name][0], fresh[name][2]])
            assert torch.equal(ours[name], wanted)
            assert name in report.reshaped
    assert report.new == ()
    assert "class head: 2 of 3 classes by name; new: mauve" in report.notes


def test_what_tells_objects_from_the_rest_does_so_whatever_the_classes(tmp_path: Path) -> None:
    said = {**SPARSE, "proposal_classes": "binary"}
    source, theirs = finished(tmp_path, Classes(("teal", "red"), (1, 2)), **said)
    detector, _ = initial_detector(recipe(), source, COLOURS, seed=5)
    name = "proposal_class_head.weight"
    assert torch.equal(detector.state_dict()[name][0], theirs.state_dict()[name][0])
    _, report = initial_detector(recipe(proposal_classes="all"), source, COLOURS, seed=5)
    assert {"proposal_class_head", "encoder_class_head"} <= parts(report, report.new)
    _, report = initial_detector(recipe(proposal_content="position"), source, COLOURS, seed=5)
    assert "proposal_queries" in parts(report, report.new) & parts(report, report.left_out)


def test_scores_of_another_kind_make_new_class_heads(tmp_path: Path) -> None:
    source, _ = finished(tmp_path, COLOURS, class_scores="softmax")
    _, report = initial_detector(recipe(class_scores="sigmoid"), source, COLOURS, seed=5)
    assert report.new == ("class_head.weight", "class_head.bias")
    assert "class head: new, the file has class_scores=softmax" in report.notes


def test_refined_heads_become_one_of_the_last_layer(tmp_path: Path) -> None:
    source, theirs = finished(tmp_path, COLOURS, box_refinement=True)
    detector, report = initial_detector(recipe(box_refinement=False), source, COLOURS, seed=5)
    ours, given = detector.state_dict(), theirs.state_dict()
    assert torch.equal(ours["class_head.weight"], given["class_head.1.weight"])
    assert torch.equal(ours["box_head.layers.0.weight"], given["box_head.1.layers.0.weight"])
    assert "box_head.0.layers.0.weight" in report.left_out


def test_dense_weights_are_refused_for_a_deformable_detector_in_one_line(tmp_path: Path) -> None:
    dense = {"encoder_attention": "dense", "decoder_attention": "dense", "feature_levels": 1}
    source, _ = pretrained(tmp_path, **dense)
    with pytest.raises(WeightsError, match="attends densely, as DETR, and no part of") as caught:
        resolve_model(recipe(**TWO_STAGE), source, COLOURS)
    assert "model.encoder_attention=deformable in the recipe, dense in the file" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_what_the_transformer_is_made_of_must_agree(tmp_path: Path) -> None:
    source, _ = pretrained(tmp_path)
    said = recipe(**{**ATTENTION, "feature_levels": 4, "decoder_points": 2, "num_queries": 9})
    with pytest.raises(WeightsError) as caught:
        resolve_model(said, source, COLOURS)
    for line in (
        "model.feature_levels=4 in the recipe, 3 in the file",
        "model.decoder_points=2 in the recipe, 4 in the file",
        "model.num_queries=9 in the recipe, 6 in the file",
    ):
        assert line in str(caught.value)
    two_stage, _ = finished(tmp_path, COLOURS, **TWO_STAGE)
    with pytest.raises(WeightsError, match="two_stage=true begins with boxes") as caught:
        resolve_model(recipe(box_refinement=False), two_stage, COLOURS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [4, 9])
def test_points_and_anchors_go_over_in_any_number(tmp_path: Path, count: int) -> None:
    """What transformers' issue 28865 asks for: other query counts gave NaN, or a crash, there."""
    anchors = {**CONDITIONAL, "query_kind": "anchor", "num_patterns": 2}
    source, theirs = finished(tmp_path, COLOURS, **anchors)
    asked = recipe(decoder_attention="conditional", num_queries=count, num_patterns=0)
    detector, report = initial_detector(asked, source, COLOURS, seed=5)
    known = min(count, 6)
    ours = detector.state_dict()["queries.weight"]
    assert len(ours) == count
    assert torch.equal(ours[:known], theirs.state_dict()["queries.weight"][:known])
    assert f"queries: the first {known} of the file's 6" in " ".join(report.notes)
    assert "left out: the patterns" in report.notes
    assert detector.settings.total_queries == count


def test_no_part_of_a_dense_decoder_becomes_a_conditional_one(tmp_path: Path) -> None:
    dense = {"encoder_attention": "dense", "decoder_attention": "dense", "feature_levels": 1}
    source, _ = finished(tmp_path, COLOURS, **dense)
    with pytest.raises(WeightsError, match=r"other queries or attention.*from_scratch=true"):
        resolve_model(recipe(decoder_attention="conditional"), source, COLOURS)


def test_resolving_a_choice_twice_changes_nothing(tmp_path: Path) -> None:
    source, _ = pretrained(tmp_path, rho=0.4)
    once = resolve_model(recipe(**SPARSE), source, COLOURS)
    assert once.selection.criterion == "dam"
    assert resolve_model(once, source, COLOURS) == once


def test_one_shot_detection_takes_a_deformable_transformer_and_all_of_its_parts(
    tmp_path: Path,
) -> None:
    source, theirs = pretrained(tmp_path, class_scores="softmax", rho=0.4)
    model, report = initial_one_shot(recipe(), source, seed=5)
    ours = model.detector.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert report.new == ()
