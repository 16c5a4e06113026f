"""Options of object stores: no secrets among them, and every process gets them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import fsspec
import pytest
from pydantic import ValidationError

from pretrain.recipe import recipe_of
from training.recipe import RecipeError
from training.storage_settings import StorageSettings, apply_storage_options

SECRETS = (
    {"s3": {"key": "AKIA"}},
    {"s3": {"secret": "x"}},
    {"s3": {"client_kwargs": {"aws_access_key_id": "x"}}},
    {"s3": {"client_kwargs": {"aws_session_token": "x"}}},
    {"s3": {"s3_additional_kwargs": {"SSECustomerKey": "x"}}},
    {"s3": {"endpoint_url": "http://me:x@host"}},
    {"gs": {"token": "ya29.x"}},
    {"abfs": {"account_key": "x"}},
    {"abfs": {"connection_string": "x"}},
    {"sftp": {"password": "x"}},
)
OPEN = {
    "s3": {
        "endpoint_url": "https://store:9000",
        "profile": "training",
        "anon": False,
        "client_kwargs": {"region_name": "eu-west-1"},
        "s3_additional_kwargs": {"SSEKMSKeyId": "alias/runs"},
    },
    "gs": {"token": "anon", "project": "p"},
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fsspec.config, "conf", dict(fsspec.config.conf))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("options", SECRETS, ids=str)
def test_a_secret_is_refused_and_not_repeated(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"looks like a secret.*AWS_ACCESS_KEY_ID") as caught:
        StorageSettings.model_validate({"options": options})
    assert [error["msg"].count("AKIA") for error in caught.value.errors()] == [0]


def test_what_is_no_secret_is_taken() -> None:
    assert StorageSettings.model_validate({"options": OPEN}).options == OPEN


def test_every_url_of_this_process_and_its_children_gets_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"profile": "old", "requester_pays": True}))
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://old")
    settings = StorageSettings(options={"s3a": {"endpoint_url": "http://new", "profile": "new"}})
    apply_storage_options(settings)
    for protocol in ("s3", "s3a"):
        filesystem, _ = fsspec.core.url_to_fs(f"{protocol}://bucket/a")
        assert filesystem.endpoint_url == "http://new"
    told = "import fsspec.config, json; print(json.dumps(fsspec.config.conf['s3']))"
    child = subprocess.run([sys.executable, "-c", told], capture_output=True, check=True)
    assert json.loads(child.stdout) == {
        "endpoint_url": "http://new",
        "profile": "new",
        "requester_pays": True,
    }


def test_a_recipe_takes_options_and_no_url_with_a_password() -> None:
    said = ["run=r", "data.shards=s", "model.backbone.weights=w"]
    recipe = recipe_of("tiny_cpu", [*said, "storage.options.s3.endpoint_url=http://store:9000"])
    assert recipe.storage.options == {"s3": {"endpoint_url": "http://store:9000"}}
    with pytest.raises(RecipeError, match=r"^storage: options.s3.secret looks like a secret"):
        recipe_of("tiny_cpu", [*said, "storage.options.s3.secret=x"])
    with pytest.raises(RecipeError) as caught:
        recipe_of("tiny_cpu", [*said, "data.held_out=s3://KEY:SECRET@bucket/set"])
    assert str(caught.value).startswith("data.held_out=s3://bucket/set was given with a password")
    assert "SECRET" not in str(caught.value).replace("AWS_SECRET", "")
