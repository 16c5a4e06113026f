"""Where pictures come from: each source gives its pictures once, in a defined order."""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data.pictures import BrokenPicture
from data.source_items import SourceError
from finetune.picture_sources import PictureRef, decoded, find_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "sub/c.JPEG", "sub/deep/d.webp", "notes.txt", "x [1].png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(*sources: str, listed: tuple[str, ...] = ()) -> list[str]:
    return [ref.name for ref in find_pictures(sources, listed)]


def test_a_folder_gives_every_picture_below_it(folder: Path) -> None:
    assert names(str(folder)) == ["a.jpg", "b.png", "sub/c.JPEG", "sub/deep/d.webp", "x [1].png"]
    assert names(f"{folder}/sub/") == ["c.JPEG", "deep/d.webp"]


def test_a_glob_gives_what_matches_and_names_start_where_it_does(folder: Path) -> None:
    assert names(f"{folder}/*.png") == ["b.png", "x [1].png"]
    assert names(f"{folder}/*.jpg", f"{folder}/**/*.webp") == ["a.jpg", "sub/deep/d.webp"]
    assert names(f"{folder}/?.*") == ["a.jpg", "b.png"]


def test_a_file_with_a_globs_signs_in_its_name_is_that_file(folder: Path) -> None:
    assert find_pictures([f"{folder}/x [1].png"]) == (
        PictureRef(f"{folder}/x [1].png", "x [1].png"),
    )


def test_a_picture_that_is_named_twice_comes_once(folder: Path) -> None:
    assert names(f"{folder}/b.png", f"{folder}/*.png", f"{folder}/b.png") == ["b.png", "x [1].png"]


def test_a_list_and_standard_input_name_a_source_a_line(folder: Path) -> None:
    lines = [f"{folder}/b.png\n", "\n", f"  {folder}/sub \n"]
    (folder / "pictures.txt").write_text("".join(lines))
    expected = ["b.png", "c.JPEG", "deep/d.webp"]
    assert names(f"{folder}/pictures.txt") == expected
    assert names("-", listed=tuple(lines)) == expected
    assert names("-") == []


def test_a_relative_path_is_taken_from_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names("b.png", "sub") == ["b.png", "c.JPEG", "deep/d.webp"]
    assert names("*.jpg") == ["a.jpg"]
    assert Path(find_pictures(["sub"])[0].url).exists()


def test_a_single_file_need_not_exist_yet_and_a_missing_folder_is_a_file() -> None:
    assert names("nowhere/a.jpg") == ["a.jpg"]


def test_a_url_is_a_picture_whatever_its_name() -> None:
    url = "https://example.org/pictures/7.jpg?token=secret/x"
    assert find_pictures([url]) == (PictureRef(url, "7.jpg"),)
    assert names("https://example.org/make_picture") == ["make_picture"]


def test_other_filesystems_are_listed_alike() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("one.png", "two.jpg"):
        memory.pipe_file(f"/listing/{name}", b"")
    assert names("memory://listing") == ["one.png", "two.jpg"]
    (ref,) = find_pictures(["memory://listing/*.jpg"])
    assert ref.name == "two.jpg"
    assert fsspec.open(ref.url).fs.exists("/listing/two.jpg")


@pytest.mark.parametrize("source", ["{folder}/*.bmp", "{folder}/empty"])
def test_a_source_without_a_picture_is_named(folder: Path, source: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(SourceError, match="no picture"):
        find_pictures([source.format(folder=folder)])


@contextmanager
def http_folder(folder: Path) -> Iterator[str]:
    """The folder behind a web server; gives its URL."""
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


def test_a_picture_comes_over_http(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (5, 3), (1, 2, 3)).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    with http_folder(tmp_path) as url:
        assert decoded(f"{url}/a.png").shape == (3, 5, 3)


def test_what_is_no_picture_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(os.urandom(50))
    with pytest.raises(BrokenPicture):
        decoded(path)
    with pytest.raises(FileNotFoundError):
        decoded(tmp_path / "b.jpg")
