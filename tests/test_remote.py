"""Images in the network: fsspec's memory file system, and a web server on this machine."""

import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from indexing import Workshop, a_model, set_age, write_images

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage
from dinosearch.images.source import UNTRUSTED_TIME, ScanOptions
from dinosearch.images.sources import known_source, open_source, read_image, remote
from dinosearch.index.contents import index_info

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe(
        {"/b/x/a.jpg": b"a", "/b/x/sub/b.PNG": b"bb", "/b/x/.c.jpg": b"c", "/b/x/d.txt": b"d", "/b/xy/e.jpg": b"e"}
    )
    yield files
    files.store.clear()


@pytest.fixture
def website(tmp_path):
    """Its address, and the folder that it shows."""
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.endswith("endless.jpg"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"x" * 100_000)
            elif self.path.endswith("error.jpg"):
                self.send_error(500)
            else:
                super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    thread.join()
    server.server_close()


def opened(url):
    [source] = open_source(url)
    return source


def scanned(source, **options):
    return source.scan(ScanOptions(**options), note=lambda _: None)


def paths(source, **options):
    return [image.path for image in scanned(source, **options).images]


@pytest.mark.usefixtures("memory")
def test_a_prefix_holds_what_lies_below_it():
    source = opened("memory://b/x/")
    assert (source.kind, source.location, source.sequential) == ("remote", "memory://b/x", False)
    scan = scanned(source)
    assert [(image.path, image.size) for image in scan.images] == [("a.jpg", 1), ("sub/b.PNG", 2)]
    assert [source.shown_path(image) for image in scan.images] == ["memory://b/x/a.jpg", "memory://b/x/sub/b.PNG"]
    assert [source.read(image).data for image in scan.images] == [b"a", b"bb"]
    assert source.file_path(scan.images[0]) is None
    assert paths(source, include_hidden=True) == [".c.jpg", "a.jpg", "sub/b.PNG"]
    assert paths(source, exclude=("sub/",)) == ["a.jpg"]


@pytest.mark.usefixtures("memory")
def test_a_single_object_is_a_source_too():
    source = opened("memory://b/x/a.jpg")
    [image] = scanned(source).images
    assert (image.path, image.size, source.shown_path(image)) == ("", 1, "memory://b/x/a.jpg")
    assert source.read(image).data == b"a"
    assert read_image("memory://b/x/a.jpg").data == b"a"


def test_a_changed_object_of_equal_size_is_noticed(memory):
    source = opened("memory://b/x")
    before = scanned(source).images
    assert scanned(source).images == before
    memory.pipe("/b/x/a.jpg", b"z")
    after = scanned(source).images
    assert after[0].size == before[0].size
    assert after[0].mtime_ns != before[0].mtime_ns
    assert after[1] == before[1]


def test_an_object_that_is_gone_or_too_large_says_so(memory, monkeypatch):
    source = opened("memory://b/x")
    first, second = scanned(source).images
    memory.rm("/b/x/a.jpg")
    with pytest.raises(BadImage, match="unreadable: nothing is there"):
        source.read(first)
    monkeypatch.setattr(remote, "MAX_REMOTE_BYTES", 1)
    with pytest.raises(BadImage, match="too-large"):
        source.read(second)


@pytest.mark.usefixtures("memory")
def test_a_place_that_is_not_there_is_an_error():
    with pytest.raises(DinosearchError, match=r"cannot be listed \(nothing is there\)"):
        scanned(opened("memory://b/nowhere"))


@pytest.mark.usefixtures("memory")
def test_lists_may_name_urls(tmp_path):
    (tmp_path / "here.jpg").write_bytes(b"here")
    (tmp_path / "l.txt").write_text("memory://b/x/a.jpg\nhere.jpg\nmemory://b/gone.jpg\nftp://host/a.jpg\n")
    source = opened(str(tmp_path / "l.txt"))
    images = {image.path: image for image in scanned(source).images}
    assert list(images) == ["ftp://host/a.jpg", "here.jpg", "memory://b/gone.jpg", "memory://b/x/a.jpg"]
    a = images["memory://b/x/a.jpg"]
    assert (source.file_path(a), source.shown_path(a), source.read(a).data) == (None, a.path, b"a")
    for path, reason in {"memory://b/gone.jpg": "nothing is there", "ftp://host/a.jpg": "ftp:// is not among"}.items():
        assert images[path].mtime_ns == UNTRUSTED_TIME
        with pytest.raises(BadImage, match=reason):
            source.read(images[path])


def test_an_outage_does_not_empty_a_list_of_urls(memory, tmp_path):
    for path in write_images(tmp_path / "images", 3):
        memory.pipe(f"/b/y/{path.name}", path.read_bytes())
    (tmp_path / "l.txt").write_text("".join(f"memory://b/y/{number:04d}.png\n" for number in range(3)))
    shop = Workshop(tmp_path, tmp_path / "index", a_model(), None, [])
    sources = [opened(str(tmp_path / "l.txt"))]
    assert shop.sync(roots=sources).images == 3
    memory.store.clear()
    with pytest.raises(DinosearchError, match=r"none of the 3 addresses that .*l\.txt names answers"):
        shop.sync(roots=sources)
    assert index_info(shop.index).images == 3


@pytest.mark.usefixtures("memory")
def test_a_list_of_which_no_url_answers_is_an_error_and_makes_no_index(tmp_path):
    (tmp_path / "l.txt").write_text("memory://b/gone.jpg\nftp://host/a.jpg\n")
    shop = Workshop(tmp_path, tmp_path / "index", a_model(), None, [])
    with pytest.raises(DinosearchError, match=r"none of the 2 addresses .* answers \(nothing is there\)"):
        shop.sync(roots=[opened(str(tmp_path / "l.txt"))])
    assert not shop.index.exists()


def test_a_folder_of_a_website_is_what_its_pages_link_to(website):
    address, folder = website
    for name in ("a.jpg", "sub/b c.png", "sub/deep/d.jpg", ".e.jpg", "note.txt"):
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / name).write_bytes(name.encode())
        set_age(folder / "pictures" / name, 1000)
    (folder / "outside.jpg").touch()
    source = opened(f"{address}/pictures")
    scan = scanned(source)
    assert [(image.path, image.size) for image in scan.images] == [
        ("a.jpg", 5),
        ("sub/b%20c.png", 11),
        ("sub/deep/d.jpg", 14),
    ]
    assert [source.read(image).data for image in scan.images] == [b"a.jpg", b"sub/b c.png", b"sub/deep/d.jpg"]
    assert scanned(source).images == scan.images
    set_age(folder / "pictures/a.jpg", 500)
    assert scanned(source).images[0].mtime_ns != scan.images[0].mtime_ns


def test_a_url_of_one_image(website):
    address, folder = website
    (folder / "a.jpg").write_bytes(b"pixels")
    source = opened(f"{address}/a.jpg?size=large")
    [image] = scanned(source).images
    assert (image.path, image.size, source.read(image).data) == ("", 6, b"pixels")
    assert source.shown_path(image) == f"{address}/a.jpg?size=large"
    assert read_image(f"{address}/a.jpg").data == b"pixels"


def test_what_a_server_refuses_or_never_ends_is_one_image_with_a_reason(website, monkeypatch):
    address, _ = website
    monkeypatch.setattr(remote, "MAX_REMOTE_BYTES", 50_000)
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 10_000)
    for name, reason in {"gone": "nothing is there", "error": "500", "endless": "too-large"}.items():
        with pytest.raises(BadImage, match=reason):
            read_image(f"{address}/{name}.jpg")


@pytest.mark.parametrize("url", ["http://[", "http://", "http://127.0.0.1:99999/a.jpg", "http://no host/a.jpg"])
def test_an_address_that_is_none_is_one_image_with_a_reason(url, tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "here.jpg").write_bytes(b"here")
    (tmp_path / "list.txt").write_text(f"{url}\nhere.jpg\n")
    source = opened(str(tmp_path / "list.txt"))
    [image] = [each for each in scanned(source).images if each.path == url]
    with pytest.raises(BadImage, match="unreadable: ") as caught:
        source.read(image)
    assert "\n" not in caught.value.reason


def test_a_server_out_of_reach_is_an_error_with_its_reason():
    pytest.importorskip("aiohttp")
    source = known_source("remote", "http://127.0.0.1:9")
    with pytest.raises(DinosearchError, match=r"cannot be listed \(.*127.0.0.1.*\). Check") as caught:
        scanned(source)
    assert "\n" not in str(caught.value)


def test_a_website_without_end_is_given_up(monkeypatch, website):
    address, folder = website
    for number in range(6):
        (folder / f"{number}").mkdir()
    monkeypatch.setattr(remote, "_MAX_FOLDERS", 5)
    with pytest.raises(DinosearchError, match="more than 5 folders"):
        scanned(opened(address))


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DinosearchError, match=r"pip install 'dinosearch\[remote\]'"):
        open_source("s3://bucket/photos")
