"""A URI becomes a file system: local paths and s3:// behind the same few verbs.

S3's endpoint and credentials come from the standard AWS_* variables. A file is written whole or
not at all: in S3 an object appears when its upload completes; locally a file is written beside
its place and moved into it. Whatever goes wrong is one StorageError that says where and why.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow.fs

# A server that is not there should be reported in seconds, and one that is busy should be asked again.
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}}


class StorageError(OSError):
    """A place cannot be read or written; the message is one line that says what to do."""


def is_s3(uri: str) -> bool:
    """Return whether a URI names a place on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Return the URI of something below a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """Return a URI that means the same to a process in another working folder."""
    return uri.rstrip("/") if is_s3(uri) else os.path.abspath(os.path.expanduser(uri))


def exists(uri: str) -> bool:
    """Return whether a file or folder stands at a URI."""
    with _explained(uri):
        file_system, path = _file_system(uri)
        return file_system.exists(path)


def read(uri: str) -> bytes:
    """Return the content of a file."""
    with _explained(uri):
        file_system, path = _file_system(uri)
        return file_system.cat_file(path)


def write(uri: str, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file whole or not at all, making the folders above it.

    A durable one survives a power cut once this returns. Waiting for the disk costs a fifteenth of
    the time of a shard, which can be told sound and made again, so shards do not.
    """
    data = content.encode() if isinstance(content, str) else content
    with _explained(uri):
        file_system, path = _file_system(uri)
        if is_s3(uri):
            file_system.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.remove(beside)


def remove(uri: str) -> None:
    """Remove a file, if it stands."""
    with _explained(uri):
        file_system, path = _file_system(uri)
        if file_system.exists(path):
            file_system.rm_file(path)


def names(uri: str) -> set[str]:
    """Return the names of what stands directly in a folder; none, if there is no such folder."""
    with _explained(uri):
        file_system, path = _file_system(uri)
        file_system.invalidate_cache()
        try:
            entries = {entry.rstrip("/") for entry in file_system.ls(path, detail=False)}
            entries.discard(path.rstrip("/"))  # some S3 servers list the folder itself
            return {entry.rsplit("/", 1)[-1] for entry in entries}
        except FileNotFoundError:
            return set()


def upload(folder: str, uri: str) -> None:
    """Copy the files of a local folder to a URI, replacing those that stand there."""
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            write(join(uri, name), file.read())


def check_writable(uri: str) -> None:
    """Refuse a place that cannot be written, before any work is done for it."""
    probe = join(uri, f".raylens-{uuid.uuid4().hex[:8]}")
    made = None if is_s3(uri) else _topmost_missing(uri)
    try:
        write(probe, b"")
    except StorageError as error:
        raise StorageError(f"{uri} cannot be written: {str(error).removeprefix(probe + ': ')}") from error
    remove(probe)
    while made and os.path.isdir(uri) and not os.listdir(uri):  # leave no folder that was not there
        os.rmdir(uri)
        if uri == made:
            break
        uri = os.path.dirname(uri)


def arrow_file_system(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return Arrow's file system for a URI and the path in it, for the libraries that read through Arrow."""
    with _explained(uri):
        if not is_s3(uri):
            return pyarrow.fs.LocalFileSystem(), absolute(uri)
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        options: dict[str, Any] = {"connect_timeout": 5, "request_timeout": 60}
        if endpoint:
            scheme, _, host = endpoint.rpartition("://")
            options |= {"endpoint_override": host, "scheme": scheme or "https"}
        if region := os.environ.get("AWS_REGION"):
            options["region"] = region
        return pyarrow.fs.S3FileSystem(**options), uri.removeprefix("s3://").rstrip("/")


def _file_system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if not is_s3(uri):
        if "://" in uri:
            raise StorageError(f"{uri}: only local paths and s3:// are known.")
        return fsspec.filesystem("file"), absolute(uri)
    # Listings are not kept: another process may have written since.
    return fsspec.filesystem("s3", config_kwargs=_S3_CONFIG, use_listings_cache=False), uri.removeprefix("s3://")


def _topmost_missing(path: str) -> str | None:
    path, missing = absolute(path), None
    while not os.path.exists(path):
        missing, path = path, os.path.dirname(path)
    return missing


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn the many ways in which storage fails into one StorageError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        kind = type(error).__name__
        if is_s3(uri) and kind in ("NoCredentialsError", "PartialCredentialsError"):
            what = "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif is_s3(uri) and kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError"):
            endpoint = os.environ.get("AWS_ENDPOINT_URL", "the AWS endpoint")
            what = f"no S3 server answers at {endpoint}; check AWS_ENDPOINT_URL"
        elif is_s3(uri) and isinstance(error, PermissionError):
            what = (
                "S3 refuses these credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
            )
        elif is_s3(uri) and isinstance(error, FileNotFoundError):
            what = "no such bucket or object"
        elif is_s3(uri) and isinstance(error, ValueError) and "endpoint" in str(error):
            what = f"AWS_ENDPOINT_URL must look like http://host:port; got {os.environ.get('AWS_ENDPOINT_URL')}"
        elif isinstance(error, OSError):
            what = (error.strerror or str(error)).lower()
        else:
            raise
        raise StorageError(f"{uri}: {what}.") from error
