"""Object stores: s3:// paths in and out, against moto's server; every bound of files holds for objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_bundle import CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos import remote
from flashcocos.cli import main
from flashcocos.errors import InputError
from flashcocos.files import atomic_path, require_distinct, require_file
from flashcocos.preprocess import load_label, save_label
from flashcocos.preprocess.images import open_image

REASON = "needs an object store: make test-cluster"
upath = pytest.importorskip("upath", reason=REASON)
server = pytest.importorskip("moto.server", reason=REASON)
MODEL = ["", "--warp=numpy", "--save=warped"]
URL = "s3://bucket/work"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """s3://bucket, empty."""
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_ENDPOINT_URL": "http://{}:{}".format(*running.get_host_and_port())}.items():
            patch.setenv(name, value)
        upath.UPath("s3://bucket").fs.mkdir("bucket")
        yield upath.UPath("s3://bucket")
    running.stop()


@pytest.fixture
def work(store: Any, tmp_path: Path) -> Path:
    """A folder of inputs, which is also in the store as s3://bucket/work."""
    MODEL[0] = f"--model={write_tiny_bundle(tmp_path / 'b.zip')}"
    (tmp_path / "pictures/sub").mkdir(parents=True)
    for seed, name in enumerate(("a", "b", "sub/c")):
        save_label(tmp_path / f"labels/{name}.png", random_label(CLASSES, 64, 64, seed))
        save_label(tmp_path / f"masks/{name}.png", random_label(CLASSES, 64, 64, seed + 10))
        Image.fromarray(random_picture(64, 64, seed)).save(tmp_path / f"pictures/{name}.jpg")
    (tmp_path / "labels/b.png").write_bytes(b"not an image")
    (tmp_path / "list.csv").write_text("labels/a.png,pictures/b.jpg,masks/b.png\nlabels/sub/c,pictures/a.jpg,masks/a\n")
    if (store / "work").exists():
        store.fs.rm("bucket/work", recursive=True)
    store.fs.put(str(tmp_path), "bucket/work", recursive=True)
    return tmp_path


def translate(root: object, output: object, *more: str) -> int:
    folders = (f"--input={root}/labels", f"--exemplar={root}/pictures", f"--exemplar-label={root}/masks")
    return main(["translate", *MODEL, *(more or folders), "-o", str(output)])


def content(folder: object) -> dict[str, bytes]:
    place = remote.to_path(str(folder))
    return {str(path.relative_to(place)): path.read_bytes() for path in remote.list_files(place)}


def test_a_store_gives_what_folders_give(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(work, work / "plain") == 1  # one label is damaged
    plain = content(work / "plain")
    assert sorted(plain) == ["a.png", "a.warped.png", "sub/c.png", "sub/c.warped.png"]
    capsys.readouterr()
    assert translate(URL, f"{URL}/out") == 1
    assert "s3://bucket/work/labels/b.png: not a readable image" in capsys.readouterr().err
    assert content(f"{URL}/out") == plain
    assert translate(URL, work / "from") == translate(work, f"{URL}/to") == 1
    assert content(work / "from") == content(f"{URL}/to") == plain


def test_resume_and_lists(work: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(URL, f"{URL}/out", f"--pairs={URL}/list.csv") == 0
    whole = content(f"{URL}/out")
    assert len(whole) == 4
    store.fs.rm_file("bucket/work/out/labels/a.warped.png")
    assert translate(URL, f"{URL}/out", f"--pairs={URL}/list.csv", "--resume") == 0
    assert "1 translated, 1 skipped, 0 failed" in capsys.readouterr().out
    assert content(f"{URL}/out") == whole


def test_labels_are_prepared_in_a_store(work: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (work / "raw", store / "work/raw"):
        for name in ("images/one.jpg", "images/sub/two.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((work / "pictures/a.jpg").read_bytes())
            (folder / name.replace("images", "labels")).parent.mkdir(parents=True, exist_ok=True)
            (folder / name.replace("images", "labels").replace("jpg", "png")).write_bytes(
                (work / "labels/a.png").read_bytes()
            )
    (work / "names.txt").write_text("one.jpg\nthree.jpg\n")
    (store / "work/names.txt").write_text("one.jpg\nthree.jpg\n")
    for more in ([], ["--list"]):
        said = []
        for root in (work, URL):
            names = [*more, f"{root}/names.txt"][: 2 * len(more)]
            code = main(["prepare", "ade20k", f"{root}/raw", "-o", f"{root}/prepared{len(more)}", *names])
            said.append((code, capsys.readouterr().err.replace(str(root), "")))
        assert said[0] == said[1]
        assert content(f"{URL}/prepared{len(more)}") == content(work / f"prepared{len(more)}")
    assert sorted(content(work / "prepared0")) == ["one.png", "sub/two.png"]


def test_few_questions_are_asked(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    call = upath.UPath(URL).fs._call_s3

    async def counted(method: str, *arguments: Any, **more: Any) -> Any:
        asked.append(method)
        return await call(method, *arguments, **more)

    upath.UPath(URL).fs.invalidate_cache()
    monkeypatch.setattr(upath.UPath(URL).fs, "_call_s3", counted)
    translate(URL, work / "out")
    assert asked.count("get_object") == 9  # three labels, three pictures and their labels
    assert len(asked) < 9 + 12, asked  # a question for each name that a file may have would be dozens


def test_hostile_objects_are_refused(work: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = b"P5 12000 6000 255\n"
    for name, data, reason in (
        ("bomb.pgm", bomb, "12000 x 6000 pixels; expected at least 1 x 1, at most 16384 a side"),
        ("cut.png", (work / "labels/a.png").read_bytes()[:60], "not a readable image"),
        ("label.jpg", (work / "pictures/a.jpg").read_bytes(), "image mode 'RGB'; expected class ids"),
    ):
        (store / "work" / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{URL}/{name}: {reason}") as local:
            load_label(CLASSES, store / "work" / name)
        (work / name).write_bytes(data)
        with pytest.raises(InputError) as here:
            load_label(CLASSES, work / name)
        assert str(here.value) == str(local.value).replace(URL, str(work))
    monkeypatch.setattr(remote, "MAX_BYTES", 100)
    with pytest.raises(InputError, match=r"a\.jpg: more than 0 MiB"):
        open_image(store / "work/pictures/a.jpg")
    for missing in ("s3://bucket/work/nothing.png", "s3://elsewhere/a.png"):
        with pytest.raises(InputError, match=f"{missing} does not exist"):
            require_file(remote.to_path(missing))


@pytest.mark.parametrize(
    "url", ["http://bucket/a", "file:///etc/passwd", "s3://b/a::file:///etc/passwd", "simplecache::s3://b/a"]
)
def test_no_other_url_is_a_path(url: str) -> None:
    with pytest.raises(InputError, match=f"{url}: expected a path of this machine, s3://BUCKET/NAME or gs://"):
        remote.to_path(url)


def test_the_names_of_a_list_stay_in_the_store(work: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    secret = work / "labels/a.png"
    for name in (str(secret), f"file://{secret}", f"../../../..{secret}"):
        (store / "work/list.csv").write_text(f"{name},pictures/a.jpg,masks/a.png\n")
        assert translate(URL, work / "out", f"--pairs={URL}/list.csv") == 1
        assert not (work / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_writes_are_whole_or_not_at_all(
    work: Path, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = store / "work/new.png"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk"), atomic_path(target) as path:
        path.write_bytes(b"half")
        raise OSError("disk")
    assert not target.exists()
    with atomic_path(target) as path:
        path.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    with pytest.raises(InputError, match=r"s3://elsewhere/a\.png: "), atomic_path("s3://elsewhere/a.png") as path:
        path.write_bytes(b"lost")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="would overwrite the input"):
        require_distinct("s3://bucket/work/new.png", "s3://bucket/work/x/../new.png")


def test_a_store_that_is_down_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fs = upath.UPath("s3://bucket").fs

    async def down(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("Could not connect to the endpoint URL")

    fs.invalidate_cache()
    monkeypatch.setattr(fs, "_call_s3", down)
    assert translate("s3://bucket/work", "s3://bucket/work/out") == 1
    assert capsys.readouterr().err.endswith("Could not connect to the endpoint URL\n")
