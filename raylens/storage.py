"""A URI becomes a file system: local paths and s3:// behind the same few verbs.

S3's endpoint and credentials come from the standard AWS_* variables. A file is written whole or
not at all: in S3 an object appears when its upload completes; locally a file is written beside
its place and moved into it. Whatever goes wrong is one StorageError that says where and why.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import pyarrow.fs

# A server that is not there should be reported in seconds, and one that is busy should be asked again.
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}}

UNFINISHED = ".tmp"  # how the name of a file ends that is being written


class StorageError(OSError):
    """A place cannot be read or written; the message is one line that says what to do."""


def is_s3(uri: str) -> bool:
    """Return whether a URI names a place on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Return the URI of something below a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """Return a URI that means the same to a process in another working folder.

    Raises
    ------
    StorageError
        If it is neither a local path nor on S3.
    """
    if is_s3(uri):
        return uri.rstrip("/")
    if "://" in uri:
        raise StorageError(f"{uri}: only local paths and s3:// are known.")
    return os.path.abspath(os.path.expanduser(uri))


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


def read_if_there(uri: str) -> bytes | None:
    """Return the content of a file; None if there is none."""
    with _explained(uri):
        file_system, path = _file_system(uri)
        try:
            return file_system.cat_file(path)
        except FileNotFoundError:
            return None


def write(uri: str, content: bytes | str) -> None:
    """Write a file whole or not at all, making the folders above it."""
    data = content.encode() if isinstance(content, str) else content
    with _explained(uri):
        file_system, path = _file_system(uri)
        if is_s3(uri):
            file_system.pipe_file(path, data)
        else:
            with _beside(path, data) as beside:
                os.replace(beside, path)


def write_if(uri: str, content: bytes, *, standing: bytes | None) -> bool:
    """Write a file if what stands there is still `standing` (None: nothing), and return whether that was so.

    Of several processes that do this at the same time one succeeds.
    """
    with _explained(uri):
        file_system, path = _file_system(uri)
        if is_s3(uri):
            return _put_if(file_system, path, content, standing)
        with _beside(path, content) as beside:
            return (standing is None or _set_aside(path, standing)) and _link(beside, path)


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


def remove_unfinished(uri: str) -> None:
    """Remove what writers that were killed more than an hour ago have left in a folder."""
    if is_s3(uri):
        return  # there an object appears when it is whole
    with _explained(uri), os.scandir(uri) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.name.endswith(UNFINISHED) and time.time() - entry.stat().st_mtime > 3600:
                    os.remove(entry.path)


def upload(folder: str, uri: str) -> None:
    """Copy the files of a local folder to a URI, replacing those that stand there."""
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            write(join(uri, name), file.read())


def check_writable(uri: str) -> None:
    """Refuse a place that cannot be written, before any work is done for it."""
    uri = absolute(uri)
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


def file_system_type(path: str) -> str:
    """Return the kind of file system on which a local path lies or would lie, as the kernel names it."""
    path, kind, deepest = os.path.realpath(absolute(path)), "unknown", 0
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            point, found = line.split()[1:3]
            point = point.encode().decode("unicode_escape")  # spaces are written \040
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= deepest:
                kind, deepest = found, len(point)
    return kind


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
        return fsspec.filesystem("file"), absolute(uri)
    # Listings are not kept: another process may have written since.
    return fsspec.filesystem("s3", config_kwargs=_S3_CONFIG, use_listings_cache=False), uri.removeprefix("s3://")


def _topmost_missing(path: str) -> str | None:
    path, missing = absolute(path), None
    while not os.path.exists(path):
        missing, path = path, os.path.dirname(path)
    return missing


@contextmanager
def _beside(path: str, content: bytes) -> Iterator[str]:
    """Write a file beside its place, on the disk when this returns, and remove it in the end."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = _name_beside(path)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # A large dataset would push all else out of the memory, and memory new to a process is slow.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield beside
    finally:
        with suppress(FileNotFoundError):
            os.remove(beside)


def _name_beside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")


def _link(beside: str, path: str) -> bool:
    """Give a file its name if that is free, and return whether it was."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    return True


def _set_aside(path: str, standing: bytes) -> bool:
    """Take away a file if it is `standing`, and return whether it was; another process may have replaced it."""
    aside = _name_beside(path)
    try:
        os.rename(path, aside)  # only one process can have it
    except FileNotFoundError:
        return False
    try:
        with open(aside, "rb") as file:
            if file.read() == standing:
                return True
        _link(aside, path)
        return False
    finally:
        os.remove(aside)


def _put_if(file_system: Any, path: str, content: bytes, standing: bytes | None) -> bool:
    """Put an S3 object on a condition: that there is none, or that it is the one with the tag of `standing`."""
    bucket, _, key = path.partition("/")
    condition = {"IfNoneMatch": "*"}
    if standing is not None:
        try:
            condition = {"IfMatch": file_system.info(path)["ETag"]}
            if file_system.cat_file(path) != standing:
                return False
        except FileNotFoundError:
            return False
    try:
        file_system.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
            raise
        return False
    return True


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
