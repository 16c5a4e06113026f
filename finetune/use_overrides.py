"""How weights may be used other than they were trained: `querypatch evaluate W DATA model.rho=0.1`.

A token selection serves any share of the tokens (Sparse DETR, section 4.3, dynamic sparsification);
nothing else of a detector can be said anew without other weights.
"""

from collections.abc import Sequence
from dataclasses import replace

from models.artefact import Artefact
from models.detector_settings import DetectorSettings
from training.recipe import RecipeError, load_recipe

_SECTION = "model."
_KEYS = ("rho", "selection.legacy_dam", "selection.legacy_padding")


def is_of_model(override: str) -> bool:
    """Whether an override `key=value` is of the detector, not of its evaluation."""
    return override.strip().startswith(_SECTION)


def used_with(artefact: Artefact, overrides: Sequence[str]) -> Artefact:
    """The weights with `model.key=value` in place of what they were trained with.

    Raises:
        RecipeError: a key that only other weights can answer, a value that is none, or a rho for
            weights that have nothing to choose tokens by; one line.
    """
    if not overrides:
        return artefact
    for text in overrides:
        _check_key(text.strip().removeprefix(_SECTION).partition("=")[0].strip(), artefact)
    values = artefact.detector.model_dump(mode="json")
    told = [text.strip().removeprefix(_SECTION) for text in overrides]
    detector = load_recipe(DetectorSettings, values, told)
    if detector.rho is None:
        raise RecipeError(
            "model.rho=null would leave the token selection out, which is a part of these weights; "
            "use model.rho=1 to update all tokens"
        )
    return replace(artefact, detector=detector)


def _check_key(key: str, artefact: Artefact) -> None:
    if key not in _KEYS:
        allowed = ", ".join(f"{_SECTION}{name}" for name in _KEYS)
        raise RecipeError(
            f"{_SECTION}{key}: these weights were trained with a value of it and know no other; "
            f"what may change is {allowed}"
        )
    if artefact.detector.rho is None:
        raise RecipeError(
            f"{_SECTION}{key}: {artefact.source} has no token selection (it was trained with "
            "rho=null), so that all tokens are updated; give weights of a sparse detector"
        )
