"""Nothing that is read can run code, write where it should not, or fill the memory.

Read from the syntax trees of the shipped code, each rule shown a breach; and tried with what
somebody with bad intentions would send: weights, runs, recipes, tars, pictures.
"""

import ast
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import querypatch
from data.index import ShardIndexError, read_index
from data.pictures import BrokenPicture, decode_picture
from data.storage import open_folder
from tests.data.tars import jpeg
from tests.test_style import PROJECT, Source, _floors, _sources
from training.recipe import RecipeError, override, parse_recipe
from training.snapshot import CheckpointError, read_files

Rule = Callable[[ast.Call], str | None]

RUNS_CODE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "joblib.load", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *("yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.package.PackageImporter"),
}


def runs_no_code(call: ast.Call) -> str | None:
    """Nothing that unpickles, evaluates or hands a line to a shell."""
    name = ast.unparse(call.func)
    is_shell = any(word.arg == "shell" for word in call.keywords)
    return f"{name}() runs what it is given" if name in RUNS_CODE or is_shell else None


def loads_weights_only(call: ast.Call) -> str | None:
    """torch.load says weights_only=True itself: its default has changed before."""
    if ast.unparse(call.func) != "torch.load":
        return None
    said = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return None if said.get("weights_only") == "True" else "torch.load() without weights_only=True"


def loads_plain_yaml(call: ast.Call) -> str | None:
    """yaml.load takes our loader, which knows plain values alone."""
    if ast.unparse(call.func) not in ("yaml.load", "yaml.load_all"):
        return None
    said = [ast.unparse(word.value) for word in call.keywords if word.arg == "Loader"]
    return None if said == ["_StrictLoader"] else "yaml.load() with a loader that is not ours"


def loads_plain_arrays(call: ast.Call) -> str | None:
    """numpy's files may hold pickles."""
    if any(word.arg == "allow_pickle" for word in call.keywords):
        return "allow_pickle"
    return None


def unpacks_no_tar(call: ast.Call) -> str | None:
    """Members of tars and zips are read where they lie, never written by the names they bring."""
    name = ast.unparse(call.func).rpartition(".")[2]
    return f"{name}()" if name in ("extract", "extractall", "unpack_archive") else None


def opens_known_pictures(call: ast.Call) -> str | None:
    """Pillow is told which formats: it would hand an EPS to another program."""
    if ast.unparse(call.func) != "Image.open":
        return None
    said = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return None if said.get("formats") == "FORMATS" else "Image.open() without formats=FORMATS"


RULES: tuple[Rule, ...] = (
    runs_no_code,
    loads_weights_only,
    loads_plain_yaml,
    loads_plain_arrays,
    unpacks_no_tar,
    opens_known_pictures,
)
BREACHES: tuple[tuple[Rule, str], ...] = (
    (runs_no_code, "pickle.load(file)"),
    (runs_no_code, "subprocess.run(line, shell=True)"),
    (loads_weights_only, "torch.load(file)"),
    (loads_weights_only, "torch.load(file, weights_only=False)"),
    (loads_plain_yaml, "yaml.load(text, Loader=yaml.Loader)"),
    (loads_plain_arrays, "numpy.load(file, allow_pickle=True)"),
    (unpacks_no_tar, "tar.extractall(folder)"),
    (opens_known_pictures, "Image.open(file)"),
)


def test_the_shipped_code_keeps_the_rules() -> None:
    shipped = [source for source in _sources() if source.floor in {*_floors(), "querypatch.py"}]
    broken = [
        f"{source.path}:{call.lineno}: {said}"
        for source in shipped
        for call in calls(source)
        for rule in RULES
        if (said := rule(call)) is not None
    ]
    assert len(shipped) > 100
    assert broken == []


@pytest.mark.parametrize(("rule", "text"), BREACHES)
def test_the_rule_sees_a_breach(rule: Rule, text: str) -> None:
    (call,) = calls(Source("data/x.py", text))
    assert rule(call) is not None


def calls(source: Source) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def bombs(folder: Path) -> Iterator[bytes]:
    """Files that make `folder` when they are unpickled: by torch.save, and by pickle."""
    for content in (Bomb(folder), {"model": {"weight": torch.zeros(2), "more": Bomb(folder)}}):
        for is_zip in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_zip)
            yield file.getvalue()
        # As torch writes it; of newer protocols it warns before it refuses.
        yield pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "model.safetensors"])
def test_weights_that_are_code_do_not_run(name: str, tmp_path: Path) -> None:
    fallen = tmp_path / "fallen"
    for content in bombs(fallen):
        (tmp_path / name).write_bytes(content)
        done = CliRunner().invoke(querypatch.app, ["weights", "show", str(tmp_path / name)])
        assert done.exit_code == 1
        assert not fallen.exists()
    (tmp_path / "proof").write_bytes(pickle.dumps(Bomb(fallen)))
    pickle.loads((tmp_path / "proof").read_bytes())
    assert fallen.exists(), "the bomb itself works"


def test_a_run_s_state_that_is_code_does_not_run(tmp_path: Path) -> None:
    fallen = tmp_path / "fallen"
    for content in bombs(fallen):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(CheckpointError):
            read_files(tmp_path / "model.safetensors", tmp_path / "state.pt", "run")
        assert not fallen.exists()


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir ['{folder}']",
        "run: !!python/object/new:os.mkdir ['{folder}']",
        "!!python/name:os.mkdir x: 1",
        "a: &a !!python/module:os\nb: *a",
    ],
)
def test_recipes_are_data(text: str, tmp_path: Path) -> None:
    fallen = tmp_path / "fallen"
    with pytest.raises(RecipeError):
        parse_recipe(text.replace("{folder}", str(fallen)))
    value = text.partition(": ")[2].replace("{folder}", str(fallen))
    if value.startswith("!!"):
        with pytest.raises(RecipeError):
            override({}, [f"run={value}"])
    assert not fallen.exists()


def test_values_of_recipes_are_taken_as_they_are() -> None:
    values = ["$HOME", "`id`", "$(id)", "{{ 1 + 1 }}", "__import__('os')"]
    for value in values:
        assert override({}, [f"run='{value.replace(chr(39), chr(39) * 2)}'"]) == {"run": value}


def test_members_of_a_tar_are_written_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shards = tmp_path / "a" / "shards"
    shards.mkdir(parents=True)
    (outside / "secret.jpg").write_bytes(jpeg(9, 8, 1))
    with tarfile.open(shards / "000.tar", "w") as tar:
        for name in ("good.jpg", "../../outside/evil.jpg", f"{outside}/absolute.jpg"):
            data = jpeg(20, 30, len(name))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            link.type, link.linkname = kind, str(outside / "secret.jpg")
            tar.addfile(link)
    for words in (["index", shards], ["check", shards], ["write", shards, tmp_path / "b"]):
        done = CliRunner().invoke(querypatch.app, ["shards", *map(str, words)])
        assert done.exit_code in (0, 1), done.output
    assert sorted(file.name for file in outside.iterdir()) == ["secret.jpg"]
    found = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")}
    assert found <= {"a", "b", "outside"}
    (index,) = read_index(str(shards)).shards
    assert index.num_samples == 3, "links are no samples"


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/outside.tar", "a/../../outside.tar"])
def test_an_index_names_no_shard_outside_its_folder(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        data = jpeg(20, 30, 3)
        member = tarfile.TarInfo("a.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    CliRunner().invoke(querypatch.app, ["shards", "index", str(tmp_path)])
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace("000.tar", name))
    with pytest.raises(ShardIndexError, match="outside the folder"):
        read_index(str(tmp_path))


def png(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    )


def test_a_picture_that_unpacks_to_gigabytes_is_refused_by_its_header() -> None:
    with pytest.raises(BrokenPicture, match=r"60000 x 60000 is more than|DecompressionBomb"):
        decode_picture(png(60_000, 60_000))
    giant = bytearray(jpeg(20, 30, 5))
    start = giant.index(b"\xff\xc0")
    giant[start + 5 : start + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BrokenPicture, match="60000 x 60000 is more than"):
        decode_picture(bytes(giant))


def test_pictures_that_are_programs_are_no_pictures(tmp_path: Path) -> None:
    """An EPS is a program for ghostscript, an SVG one that may fetch."""
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(fallen) (w) file\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://host/"/></svg>',
    ):
        with pytest.raises(BrokenPicture):
            decode_picture(content)


def test_nothing_that_is_installed_listens_for_the_outside_unasked() -> None:
    """Ray's own default is loopback; where we say more it is in a pod, behind a token."""
    said = [
        source.path
        for source in _sources()
        if source.floor in {*_floors(), "querypatch.py"} and "0.0.0.0" in source.text
    ]
    assert said == ["cluster/render/k8s.py"]
    assert PROJECT.joinpath("cluster/render/k8s.py").read_text().count("0.0.0.0") == 1


def test_folders_are_opened_by_urls_and_never_by_a_shell(tmp_path: Path) -> None:
    """WebDataset's `pipe:` runs a command; here it is a path that does not exist."""
    fallen = tmp_path / "fallen"
    with pytest.raises((OSError, ValueError)):
        read_index(f"pipe:mkdir {fallen}")
    assert not fallen.exists()
    assert open_folder(str(tmp_path)).path == str(tmp_path)
