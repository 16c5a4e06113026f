"""The base of every settings object: strict, frozen data with a sentence under each field."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen values, checked where they are made; an unknown key or a wrong type is an error.

    A sentence under a field, with its unit, becomes the field's description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )
