"""A URI becomes a file system: local paths and s3:// behind the same few verbs.

S3's endpoint and credentials come from the standard AWS_* variables. A file is written whole or
not at all: in S3 an object appears when its upload completes; locally a file is written beside
its place and moved into it. An S3 server that fails is asked again for a while. Whatever goes wrong
in the end is one StorageError that says where and why, and holds no secret.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import fsspec
import pyarrow.fs

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# A request is tried three times, which takes some 2 s, and a verb again until this is over [s]. One in six
# requests may fail, or one in two, and a run of thousands goes on; a server that is not there is told of in
# 5 to 10 s, one that fails always in 30 s, and one that is silent in 60 s.
_PATIENCE = 30
_PATIENCE_UNREACHABLE = 5
_S3_CONFIG = {"connect_timeout": 3, "read_timeout": 20, "retries": {"total_max_attempts": 3, "mode": "standard"}}
# Arrow's pauses begin at 25 ms and double: together 13 s, and two minutes before a silent server.
_ARROW_CONFIG = {"connect_timeout": 3, "request_timeout": 10}
_ARROW_RETRIES = 9

# What a server does that may be well again in a moment, by the exceptions of botocore and aiohttp.
_UNREACHABLE = ("EndpointConnectionError", "ConnectTimeoutError")
_FAILURES = {
    "ConnectionClosedError": "closes connections without an answer",
    "ReadTimeoutError": "does not answer",
    "ClientPayloadError": "breaks off in the middle of its answers",
    "ResponseStreamingError": "breaks off in the middle of its answers",
    "ResponseParserError": "answers what S3 does not",
    "HTTPClientError": "does not speak HTTP as S3 does",
}

_MOST_JSON = 2**26  # bytes, where strangers may have written them; the manifest of the largest dataset has 14 MB

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
        If it is neither a local path nor on S3, or holds credentials.
    """
    _require_no_credentials(uri)
    if is_s3(uri):
        return uri.rstrip("/")
    if "://" in uri:
        raise StorageError(f"{uri}: only local paths and s3:// are known.")
    return os.path.abspath(os.path.expanduser(uri))


def _persistent(verb: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Let a verb try again what may pass, and turn the many ways in which storage fails into one StorageError."""

    @wraps(verb)
    def persisting(uri: str, *args: P.args, **kwargs: P.kwargs) -> T:
        _require_no_credentials(uri)
        begun = time.monotonic()
        while True:
            try:
                return verb(uri, *args, **kwargs)
            except StorageError:
                raise
            except Exception as error:
                tried = time.monotonic() - begun
                if not is_s3(uri) or tried > _patience(error):
                    explained = _explained(uri, error, tried)
                    if explained is None:
                        raise
                    raise explained from error
                logger.info("trying again  uri=%s seconds=%.1f error=%s", uri, tried, error)
            time.sleep(0.5)

    return persisting


@_persistent
def exists(uri: str) -> bool:
    """Return whether a file or folder stands at a URI."""
    file_system, path = _file_system(uri)
    return file_system.exists(path)


@_persistent
def read(uri: str) -> bytes:
    """Return the content of a file."""
    file_system, path = _file_system(uri)
    return file_system.cat_file(path)


@_persistent
def size(uri: str) -> int:
    """Return the number of bytes of a file."""
    file_system, path = _file_system(uri)
    return file_system.size(path)


def read_json(uri: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    ValueError
        If it holds anything else, or more than any file of raylens does.
    """
    if (num_bytes := size(uri)) > _MOST_JSON:
        raise ValueError(f"{uri} has {num_bytes:,} bytes; what raylens writes there has at most {_MOST_JSON:,}.")
    try:
        values = json.loads(read(uri))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{uri} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{uri} does not hold a JSON object.")
    return values


@_persistent
def read_if_there(uri: str) -> bytes | None:
    """Return the content of a file; None if there is none."""
    file_system, path = _file_system(uri)
    try:
        return file_system.cat_file(path)
    except FileNotFoundError:
        return None


@_persistent
def write(uri: str, content: bytes | str) -> None:
    """Write a file whole or not at all, making the folders above it."""
    data = content.encode() if isinstance(content, str) else content
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
    return _write_if(uri, content, standing, writer=uuid.uuid4().hex)


@_persistent
def _write_if(uri: str, content: bytes, standing: bytes | None, writer: str) -> bool:
    file_system, path = _file_system(uri)
    if is_s3(uri):
        return _put_if(file_system, path, content, standing, writer)
    with _beside(path, content) as beside:
        return _link(beside, path) if standing is None else _exchange(beside, path, standing)


@_persistent
def remove(uri: str) -> None:
    """Remove a file, if it stands."""
    file_system, path = _file_system(uri)
    if file_system.exists(path):
        file_system.rm_file(path)


@_persistent
def names(uri: str) -> set[str]:
    """Return the names of what stands directly in a folder; none, if there is no such folder."""
    file_system, path = _file_system(uri)
    file_system.invalidate_cache()
    try:
        entries = {entry.rstrip("/") for entry in file_system.ls(path, detail=False)}
        entries.discard(path.rstrip("/"))  # some S3 servers list the folder itself
        return {entry.rsplit("/", 1)[-1] for entry in entries}
    except FileNotFoundError:
        return set()


@_persistent
def remove_unfinished(uri: str) -> None:
    """Remove what writers that were killed more than an hour ago have left in a folder."""
    if is_s3(uri):
        return  # there an object appears when it is whole
    with os.scandir(uri) as entries:
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
    with suppress(OSError):  # another run has written there meanwhile
        while made and len(uri) >= len(made):  # leave no folder that was not there
            os.rmdir(uri)
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


@_persistent
def arrow_file_system(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return Arrow's file system for a URI and the path in it, for the libraries that read through Arrow."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), absolute(uri)
    options: dict[str, Any] = {
        **_ARROW_CONFIG,
        "retry_strategy": pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=_ARROW_RETRIES),
    }
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    if region := os.environ.get("AWS_REGION"):
        options["region"] = region
    return pyarrow.fs.S3FileSystem(**options), uri.removeprefix("s3://").rstrip("/")


def _file_system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if not is_s3(uri):
        return fsspec.filesystem("file"), absolute(uri)
    # Listings are not kept: another process may have written since. A file is one request, of which all can be
    # asked for again.
    file_system = fsspec.filesystem("s3", config_kwargs=_S3_CONFIG, use_listings_cache=False, max_concurrency=1)
    file_system.retries = 1  # s3fs would try again what botocore has tried, and we again what s3fs has
    return file_system, uri.removeprefix("s3://")


def _require_no_credentials(uri: str) -> None:
    """Refuse s3://key:secret@bucket, without repeating it: a URI is written to manifests and logs."""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if is_s3(uri) and re.search("[:@]", bucket) and not bucket.startswith("arn:"):
        raise StorageError(
            "an s3:// URI holds credentials, which would be written to manifests and logs; write s3://bucket/prefix, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )


def _topmost_missing(path: str) -> str | None:
    path, missing = absolute(path), None
    while not os.path.exists(path):
        missing, path = path, os.path.dirname(path)
    return missing


@contextmanager
def _beside(path: str, content: bytes) -> Iterator[str]:
    """Write a file beside its place, on the disk when this returns, and remove it in the end."""
    beside = _name_beside(path)
    file = _create(beside)
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # A large dataset would push all else out of the memory, and memory new to a process is slow.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield beside
    finally:
        with suppress(FileNotFoundError):
            os.remove(beside)


def _create(path: str) -> BinaryIO:
    """Open a new file, in a folder that is made if it is not there."""
    for _ in range(20):
        # Another run may remove a folder that it had made to see whether it can.
        with suppress(FileNotFoundError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "wb")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return open(path, "wb")


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


def _exchange(beside: str, path: str, standing: bytes) -> bool:
    """Put a file in the place of `standing`, and return whether that stood there; readers find one or the other.

    The file that is to go is itself the lock, so that a process that is killed leaves none behind.
    """
    try:
        with open(path, "r+b") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)) or file.read() != standing:
                return False
            os.replace(beside, path)
    except FileNotFoundError:
        return False
    return True


def _put_if(file_system: Any, path: str, content: bytes, standing: bytes | None, writer: str) -> bool:
    """Put an S3 object on a condition: that there is none, or that it is the one with the tag of `standing`.

    If the answer to the first attempt is lost, the next one meets what that has put; so each object
    says who put it.
    """
    bucket, _, key = path.partition("/")
    condition = {"IfNoneMatch": "*"}
    if standing is not None:
        try:
            condition = {"IfMatch": file_system.info(path)["ETag"]}
            if file_system.cat_file(path) != standing:
                return _writer(file_system, bucket, key) == writer
        except FileNotFoundError:
            return False
    try:
        file_system.call_s3(
            "put_object", Bucket=bucket, Key=key, Body=content, Metadata={"writer": writer}, **condition
        )
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
            raise
        return _writer(file_system, bucket, key) == writer
    return True


def _writer(file_system: Any, bucket: str, key: str) -> str | None:
    """Return who put an S3 object on a condition."""
    try:
        return file_system.call_s3("head_object", Bucket=bucket, Key=key)["Metadata"].get("writer")
    except FileNotFoundError:
        return None


def _patience(error: Exception) -> float:
    """Return how long to try again what has failed so [s]."""
    if type(error).__name__ in _UNREACHABLE:
        return _PATIENCE_UNREACHABLE
    return _PATIENCE if _failure(error) else -1


def _failure(error: Exception) -> str | None:
    """Return what a server does that has failed, and may be well again in a moment; None for any other error."""
    answer = getattr(error.__cause__, "response", {})
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500 or status == 429:
        return f"answers {status} {answer['Error'].get('Message', '')}".strip().removesuffix(".")
    return _FAILURES.get(type(error).__name__)


def _explained(uri: str, error: Exception, tried: float) -> StorageError | None:
    """Return an error of storage as a StorageError; None for any other."""
    kind = type(error).__name__
    # Some put a user's name and password here.
    endpoint = re.sub("//.*@", "//", os.environ.get("AWS_ENDPOINT_URL", "the AWS endpoint"))
    if is_s3(uri) and kind in ("NoCredentialsError", "PartialCredentialsError"):
        what = "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif is_s3(uri) and kind in _UNREACHABLE:
        what = f"no S3 server answers at {endpoint}; check AWS_ENDPOINT_URL"
    elif is_s3(uri) and (failure := _failure(error)):
        what = f"the S3 server at {endpoint} {failure}, for {tried:.0f} s now; run the same command again later"
    elif is_s3(uri) and isinstance(error, PermissionError):
        what = "S3 refuses these credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
    elif is_s3(uri) and isinstance(error, FileNotFoundError):
        what = "no such bucket or object"
    elif is_s3(uri) and isinstance(error, ValueError) and "endpoint" in str(error):
        what = f"AWS_ENDPOINT_URL must look like http://host:port; got {endpoint}"
    elif isinstance(error, OSError):
        what = (error.strerror or str(error)).lower()
    else:
        return None
    return StorageError(f"{uri}: {what}.")
