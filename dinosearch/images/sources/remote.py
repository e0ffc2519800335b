"""Images in the network: s3://, gs:// and http(s)://, through fsspec.

An object's "time" is a hash of its entity tag, or of the time its server gives: another one means another content.
Nothing is kept on disk. Archives in the network are not opened: copy them here first.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage
from dinosearch.images.find import in_byte_order
from dinosearch.images.names import is_image_name, passed_over_test
from dinosearch.images.read import in_threads
from dinosearch.images.source import MOST_BYTES, UNTRUSTED_TIME, FoundImage, Scan, ScanOptions, StableBytes

PROTOCOLS = ("s3", "gs", "http", "https", "memory")
"""What may be asked for; memory:// is fsspec's own, within this process."""

MAX_REMOTE_BYTES = 256 * 2**20
"""An image in the network that is larger is not fetched."""

_CONNECT_SECONDS, _READ_SECONDS, _TOTAL_SECONDS = 15, 60, 600
_REQUESTS = 16
_MAX_FOLDERS = 10_000  # of a website, which may be endless
_CHUNK_BYTES = 2**20
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "updated", "modified", "created")
# What the libraries below fsspec raise besides OSError, if they are loaded.
_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)


class RemoteSource:
    """`location` is a URL without a slash at its end: of one image, or of a place with images below it.

    Below http(s):// that is what the pages link to that a server makes of its folders.
    """

    kind = "remote"
    sequential = False

    def __init__(self, location: str) -> None:
        self.location = location

    def stamp(self) -> str | None:
        return None

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:
        """Raises DinosearchError when the place cannot be listed."""
        files = open_files(self.location)
        note(f"listing {self.location}")
        try:
            found, unreadable = _listing(files, self.location)
        except remote_errors() as error:
            raise DinosearchError(
                f"{self.location} cannot be listed ({_reason(error)}). Check the address, your access and the network; "
                "what is indexed of it stays as it is"
            ) from error
        passed_over = passed_over_test(options)
        images = [each for each in found if not each.path or (is_image_name(each.path) and not passed_over(each.path))]
        return Scan(in_byte_order(images), sorted(unreadable))

    def file_path(self, image: FoundImage) -> str | None:  # noqa: ARG002
        return None

    def shown_path(self, image: FoundImage) -> str:
        return f"{self.location}/{image.path}" if image.path else self.location

    def read(self, image: FoundImage) -> StableBytes:
        return StableBytes(fetch(self.shown_path(image)), image.mtime_ns)

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:
        raise AssertionError(f"{len(list(images))} objects that can be read in any order are streamed")


def is_url(text: str) -> bool:
    return "://" in text and text.split("://")[0].replace("+", "").isalnum()


def find_urls(metadata: Mapping[str, str]) -> tuple[list[FoundImage], str | None]:
    """The images at some URLs, with what is said of each, and why if none of them answers.

    Of several, one that cannot be asked about fails when it is read.
    """

    def look(url: str) -> tuple[FoundImage, str | None]:
        if _protocol(url) not in PROTOCOLS:
            return _found(url, {}, metadata[url]), _no_protocol(url)
        files = open_files(url)
        try:
            return _found(url, files.info(url), metadata[url]), None
        except remote_errors() as error:
            return _found(url, {}, metadata[url]), _reason(error)

    found = list(in_threads(look, metadata, workers=_REQUESTS))
    silences = [reason for _, reason in found if reason]
    return [image for image, _ in found], silences[0] if found and len(silences) == len(found) else None


def read_url(image: FoundImage) -> StableBytes:
    """The bytes of an image whose path is a URL. Raises BadImage."""
    return StableBytes(fetch(image.path), image.mtime_ns)


def fetch(url: str) -> bytes:
    """What is at a URL, up to MAX_REMOTE_BYTES. Raises BadImage, and DinosearchError where the extra is missing."""
    if _protocol(url) not in PROTOCOLS:
        raise BadImage("unreadable", _no_protocol(url))
    files = open_files(url)
    # Web servers may send more than they announce, so theirs is read as a stream: of no known size, in no blocks.
    options = {"block_size": 0, "size": 1} if url.startswith("http") else {}
    data = bytearray()
    try:
        with files.open(url, "rb", **options) as file:
            while chunk := file.read(_CHUNK_BYTES):
                data += chunk
                if len(data) > MAX_REMOTE_BYTES:
                    raise BadImage("too-large", f"more than the {MAX_REMOTE_BYTES >> 20} MiB that are fetched")
    except remote_errors() as error:
        raise BadImage("unreadable", _reason(error)) from error
    return bytes(data)


def open_files(url: str) -> Any:
    """fsspec's file system for a URL. Raises DinosearchError for other protocols and without the extra."""
    protocol = _protocol(url)
    if protocol not in PROTOCOLS:
        raise DinosearchError(f"{url} is neither s3://, gs://, http:// nor https://. Copy its images to a folder first")
    try:
        import fsspec

        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=_TOTAL_SECONDS, connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        elif protocol == "s3":
            options = {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}}
        return fsspec.filesystem(protocol, use_listings_cache=False, **options)
    except ImportError as error:
        raise DinosearchError(f"{url} lies in the network. To read it: pip install 'dinosearch[remote]'") from error


def remote_errors() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _ERRORS if module in sys.modules]
    return (OSError, TimeoutError, ValueError, *loaded)


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _no_protocol(url: str) -> str:
    return f"{_protocol(url)}:// is not among {', '.join(PROTOCOLS[:4])}"


def _listing(files: Any, location: str) -> tuple[list[FoundImage], list[tuple[str, str]]]:
    """What is there, "" being the location itself, and folders that gave no listing, with the reason."""
    if location.startswith("http"):
        facts = files.info(location)
        if str(facts.get("mimetype")).startswith("image/"):
            return [_found("", facts)], []
        return _web_listing(files, f"{location}/")
    root = files._strip_protocol(location)
    found = files.find(root, detail=True)
    if not found:
        raise FileNotFoundError(root)
    return [_found(name[len(root) + 1 :], facts) for name, facts in found.items()], []


def _web_listing(files: Any, root: str) -> tuple[list[FoundImage], list[tuple[str, str]]]:
    folders, seen = [root], {root}
    urls: list[str] = []
    unreadable = []
    while folders:
        folder = folders.pop()
        try:
            links = files.ls(folder, detail=True)
        except remote_errors() as error:
            if folder == root:
                raise
            unreadable.append((folder[len(root) : -1], _reason(error)))
            continue
        for link in links:
            url = link["name"]
            if url in seen or not url.startswith(root):
                continue
            seen.add(url)
            (folders if link["type"] == "directory" else urls).append(url)
        if len(seen) - len(urls) > _MAX_FOLDERS:
            raise ValueError(f"it has more than {_MAX_FOLDERS} folders")
    images, _ = find_urls(dict.fromkeys(filter(is_image_name, urls), ""))
    return [replace(image, path=image.path[len(root) :]) for image in images], unreadable


def _found(path: str, facts: Mapping[str, Any], metadata: str = "") -> FoundImage:
    version = next((str(facts[key]) for key in _VERSION_KEYS if facts.get(key)), None)
    number = UNTRUSTED_TIME  # a server that says nothing of the kind
    if version is not None:
        number = int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest(), "big") >> 1
    return FoundImage(path, min(facts.get("size") or 0, MOST_BYTES), number, metadata=metadata)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):  # fsspec says so of whatever it could not ask about
        return _reason(error.__cause__) if error.__cause__ else "nothing is there"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
