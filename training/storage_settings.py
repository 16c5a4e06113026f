"""How object stores are reached: the part of it that is no secret, for every process of a run.

What stands in a recipe is stored with its run and shown on pages, so credentials are refused here:
they come the stores' own ways (environment, profile, the machine's role). The options become
fsspec's own configuration, so that every URL that is opened in a process gets them, whoever opens
it, and the processes that it starts inherit them through the environment.
"""

import json
import os
import re
from typing import Self

import fsspec
from pydantic import Field, JsonValue, model_validator

from models.settings import Settings
from models.urls import holds_credentials

Options = dict[str, dict[str, JsonValue]]

SECRET = re.compile(
    r"secret|passw|credential|connectionstring|(access|account|customer|private|api|sas)key"
    r"|^key$|^login$|token$"
)
"""In the name of an option, in lower case and without underscores: its value may open a door."""

HARMLESS_TOKENS = ("anon", "cloud", "google_default", "browser", "cache")
"""Ways that gcsfs calls its token by and that are no token."""

PROTOCOLS = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "adl": "abfs", "az": "abfs"}
"""Second names of protocols."""


class StorageSettings(Settings):
    """How object stores are reached."""

    options: Options = Field(default_factory=dict)
    """What fsspec's file systems are made with, by protocol, without secrets, e.g.
    s3: {endpoint_url: "https://store:9000", profile: training}; wins over FSSPEC_* of the machine.
    """

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        for protocol, options in self.options.items():
            for name, value in _leaves(options, f"options.{protocol}"):
                if _is_secret(name, value):
                    raise ValueError(
                        f"{name} looks like a secret, and recipes are stored and shown; give it by "
                        "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                        "GOOGLE_APPLICATION_CREDENTIALS), by the machine's role, or by "
                        "storage.options.s3.profile=NAME"
                    )
        return self


class RunStorage(Settings):
    """The part of a recipe that is needed before the rest of it can be read."""

    storage: StorageSettings = StorageSettings()
    """As in a recipe."""


def apply_storage_options(settings: StorageSettings) -> None:
    """Makes the options those of every file system that this process and its children open.

    Before the first URL is opened; file systems that are open already keep what they had.
    """
    for protocol, options in settings.options.items():
        name = PROTOCOLS.get(protocol, protocol)
        fsspec.config.conf.setdefault(name, {}).update(options)
        for option in options:
            # In a child it would be laid over the recipe's.
            os.environ.pop(f"FSSPEC_{name.upper()}_{option.upper()}", None)
        variable = f"FSSPEC_{name.upper()}"
        os.environ[variable] = json.dumps({**_given(variable), **options})


def _given(variable: str) -> dict[str, JsonValue]:
    try:
        given = json.loads(os.environ.get(variable, "{}"))
    except json.JSONDecodeError:
        return {}
    return given if isinstance(given, dict) else {}


def _leaves(options: dict[str, JsonValue], place: str) -> list[tuple[str, JsonValue]]:
    """(dotted name, value) of everything that is no section."""
    found: list[tuple[str, JsonValue]] = []
    for name, value in options.items():
        match value:
            case dict():
                found += _leaves(value, f"{place}.{name}")
            case _:
                found.append((f"{place}.{name}", value))
    return found


def _is_secret(name: str, value: JsonValue) -> bool:
    last = name.rpartition(".")[2].lower().replace("_", "")
    if last == "token" and value in HARMLESS_TOKENS:
        return False
    if value is None or isinstance(value, bool):
        return False
    in_value = isinstance(value, str) and holds_credentials(value)
    return in_value or SECRET.search(last) is not None
