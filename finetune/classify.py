"""Classification, as the section `classify` of a finetuning recipe sets it."""

from pydantic import Field

from data.classification_content import ClassAugmentSettings, ClassSizes
from models.settings import Settings


class MixSettings(Settings):
    """How pictures of a batch and their classes are mixed; the defaults are those of DAT and Swin.

    One draw for all pictures that are computed together: each is mixed with the one at the opposite
    place. Other workers, or passes, mix others.
    """

    mixup: float = Field(default=0.8, ge=0)
    """Parameter of the Beta distribution of the shares (Zhang et al., ICLR 2018); 0 does without.
    """
    cutmix: float = Field(default=1.0, ge=0)
    """The same where a rectangle is taken from the other picture (Yun et al., ICCV 2019)."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes."""


class ClassifySettings(Settings):
    """What task=classify asks for; of `model` the backbone alone counts."""

    augment: ClassAugmentSettings = ClassAugmentSettings()
    """How pictures change."""
    mix: MixSettings = MixSettings()
    """How they and their classes are mixed."""
    sizes: ClassSizes = ClassSizes()
    """The size at which the classifier is judged and used."""
