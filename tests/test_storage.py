"""Local paths and S3 behind the same verbs: what holds on both, and how each failure is told."""

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from raylens import storage

SECRET = "hunter2-hunter2"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path) -> str:
    """A place of its own for a test, on each kind of storage."""
    return (
        str(tmp_path / "place")
        if request.param == "local"
        else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex[:8]}"
    )


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 70_000, "N and α"])
def test_what_is_written_is_read_back(root, content):
    """Shards, manifests and checkpoints all go this way."""
    uri = storage.join(root, "below", "file")

    storage.write(uri, content)

    assert storage.read(uri) == (content.encode() if isinstance(content, str) else content)
    assert storage.exists(uri)
    assert storage.names(storage.join(root, "below")) == {"file"}


def test_a_second_write_replaces_the_first(root):
    """A plan is rewritten when a dataset is extended, and an old listing must not hide it."""
    uri = storage.join(root, "file")
    storage.write(uri, b"old and long")

    storage.write(uri, b"new")

    assert storage.read(uri) == b"new"
    assert storage.names(root) == {"file"}


@pytest.mark.parametrize("standing", [None, b"damaged"])
def test_of_many_conditional_writers_at_once_one_succeeds(root, standing):
    """Two runs may make the same shard; which one stands must be settled, and both must know."""
    uri = storage.join(root, "file")
    contents = [bytes([k]) * 100_000 for k in range(8)]
    storage.write(storage.join(root, "other"), b"x")
    if standing is not None:
        storage.write(uri, standing)

    with ThreadPoolExecutor(8) as pool:
        succeeded = list(pool.map(lambda content: storage.write_if(uri, content, standing=standing), contents))

    assert sum(succeeded) == 1
    assert storage.read(uri) == contents[succeeded.index(True)]
    assert storage.names(root) == {"file", "other"}


def test_a_file_that_is_exchanged_is_never_missing(root):
    """Another run may read a dataset's plan at any moment, and may be killed at any moment."""
    uri = storage.join(root, "file")
    storage.write(uri, b"0")
    over = threading.Event()

    def look() -> set[bytes | None]:
        found = {storage.read_if_there(uri)}
        while not over.is_set():
            found.add(storage.read_if_there(uri))
        return found

    with ThreadPoolExecutor(2) as readers:
        looks = [readers.submit(look) for _ in range(2)]
        try:
            exchanged = [storage.write_if(uri, b"%d" % (k + 1), standing=b"%d" % k) for k in range(100)]
        finally:
            over.set()

    assert all(exchanged)
    assert set.union(*(look.result() for look in looks)) <= {b"%d" % k for k in range(101)}


def test_a_conditional_write_leaves_what_it_did_not_expect(root):
    """A sound shard that another run has put there is never replaced."""
    uri = storage.join(root, "file")
    storage.write(uri, b"sound")

    assert not storage.write_if(uri, b"mine", standing=None)
    assert not storage.write_if(uri, b"mine", standing=b"damaged")

    assert storage.read(uri) == b"sound"
    assert storage.names(root) == {"file"}


def test_a_file_that_is_gone_meanwhile_is_not_replaced(root):
    """Whoever took it away will say why; the writer looks again."""
    uri = storage.join(root, "file")
    storage.write(storage.join(root, "other"), b"x")

    assert not storage.write_if(uri, b"mine", standing=b"damaged")
    assert storage.read_if_there(uri) is None


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    """Not sooner: another run may be writing it just now."""
    left, fresh, kept = (
        tmp_path / name for name in (".part-00000.parquet.0123abcd.tmp", ".b.tmp", "part-00000.parquet")
    )
    for path in (left, fresh, kept):
        path.write_bytes(b"x")
    os.utime(left, (0, 0))
    os.utime(kept, (0, 0))

    storage.remove_unfinished(str(tmp_path))

    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, kept.name]


def test_names_are_those_directly_below(root):
    """Shards are counted by name: neither the folder itself nor what lies deeper is one of them."""
    for name in ("a", "b", "deeper/c"):
        storage.write(storage.join(root, name), b"x")

    assert storage.names(root) == {"a", "b", "deeper"}
    assert storage.names(root + "/") == {"a", "b", "deeper"}
    assert storage.names(storage.join(root, "deeper")) == {"c"}


def test_nothing_stands_where_nothing_was_written(root):
    """A first run asks for the plan, the shards and the manifest before there is any."""
    assert not storage.exists(root)
    assert not storage.exists(storage.join(root, "file"))
    assert storage.names(root) == set()


def test_reading_what_is_not_there_names_it(root):
    """The one line of the error is all that a person sees."""
    with pytest.raises(storage.StorageError) as failure:
        storage.read(storage.join(root, "file"))

    assert str(failure.value).startswith(storage.join(root, "file") + ": no such")


def test_a_removed_file_is_gone_and_removing_it_again_is_no_error(root):
    """A manifest is withdrawn before a dataset grows, also if the run before withdrew it already."""
    uri = storage.join(root, "file")
    storage.write(uri, b"x")
    storage.write(storage.join(root, "other"), b"x")

    storage.remove(uri)
    storage.remove(uri)

    assert storage.names(root) == {"other"}


def test_upload_copies_a_folder_over_what_stands(root, tmp_path):
    """TensorBoard's files grow, and S3 cannot append: they are put there anew."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"first")
    storage.upload(str(folder), root)
    (folder / "a").write_bytes(b"first and second")
    (folder / "b").write_bytes(b"new")

    storage.upload(str(folder), root)

    assert storage.names(root) == {"a", "b"}
    assert storage.read(storage.join(root, "a")) == b"first and second"


def test_checking_a_place_leaves_nothing_behind(root):
    """The check comes before the work; what is refused afterwards must not have begun a run folder."""
    place = storage.join(root, "not", "there", "yet")

    storage.check_writable(place)

    assert storage.names(place) == set()  # above it SeaweedFS keeps the folders, which in S3 are nothing


def test_checking_a_local_place_makes_no_folder_and_removes_none(tmp_path):
    """An empty folder that somebody made stays, and one that nobody made is not made."""
    (tmp_path / "empty").mkdir()

    storage.check_writable(str(tmp_path / "empty"))
    storage.check_writable(str(tmp_path / "other" / "deeper"))
    storage.check_writable(str(tmp_path / "empty" / "deeper"))

    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]


def test_two_runs_may_look_at_a_new_place_at_once(tmp_path):
    """Each makes a folder to see whether it can, and removes it; neither may trip over the other's."""
    with ThreadPoolExecutor(8) as pool:
        for k in range(50):
            place = tmp_path / f"new-{k}"
            list(pool.map(storage.check_writable, [str(place / "root")] * 8))
            assert not list(place.rglob(".raylens-*"))


def test_a_write_that_fails_half_way_leaves_neither_file_nor_temporary(tmp_path, full_disk):
    """A full disk must not leave half a shard under a shard's name, nor litter under another."""
    uri = str(tmp_path / "file")
    storage.write(uri, b"old")

    with full_disk(100_000), pytest.raises(storage.StorageError, match="file too large"):
        storage.write(uri, bytes(1_000_000))

    assert storage.names(str(tmp_path)) == {"file"}
    assert storage.read(uri) == b"old"


def test_a_write_that_fails_at_the_last_step_leaves_no_temporary(tmp_path):
    """Here all is written and only the name cannot be had: a folder has it."""
    (tmp_path / "name" / "inside").mkdir(parents=True)

    with pytest.raises(storage.StorageError, match="is a directory"):
        storage.write(str(tmp_path / "name"), b"x")

    assert storage.names(str(tmp_path)) == {"name"}


def test_a_reader_never_sees_half_a_file(root):
    """A trainer may open a dataset, and a second run may look at a shard, while somebody writes it."""
    uri = storage.join(root, "file")
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    storage.write(uri, contents[0])
    writer = threading.Thread(target=lambda: [storage.write(uri, contents[turn % 2]) for turn in range(20)])
    seen = []
    writer.start()
    while writer.is_alive():
        seen.append(storage.read(uri))
    writer.join()

    assert len(seen) > 1
    assert all(content in contents for content in seen)


@pytest.mark.parametrize("verb", [storage.check_writable, lambda uri: storage.write(uri, b"x")])
def test_a_local_place_that_cannot_be_written_is_refused(verb, tmp_path):
    """Before an hour of work, and in one line. Tests may run as root, whom permissions do not stop: a file does."""
    (tmp_path / "file").write_text("x")
    uri = str(tmp_path / "file" / "below")

    with pytest.raises(storage.StorageError) as failure:
        verb(uri)

    assert uri in str(failure.value)
    assert "\n" not in str(failure.value)
    assert storage.names(str(tmp_path)) == {"file"}
    assert (tmp_path / "file").read_text() == "x"


def test_proc_cannot_be_written():
    """Nothing can be made there, also by root; it stands for a read-only file system."""
    with pytest.raises(storage.StorageError, match=r"^/proc/raylens cannot be written: "):
        storage.check_writable("/proc/raylens")


@pytest.mark.parametrize("scheme", ["gs", "http", "file", "s4"])
def test_an_unknown_scheme_is_refused(scheme, tmp_path, monkeypatch):
    """Taken for a relative path, gs://bucket would become a folder in the working folder."""
    monkeypatch.chdir(tmp_path)

    for verb in (storage.exists, storage.read, storage.names, storage.remove, storage.check_writable):
        with pytest.raises(storage.StorageError, match=r"only local paths and s3:// are known"):
            verb(f"{scheme}://bucket/x")
    with pytest.raises(storage.StorageError, match=r"only local paths and s3:// are known"):
        storage.write(f"{scheme}://bucket/x", b"x")
    assert not list(tmp_path.iterdir())


def test_an_absolute_uri_means_the_same_elsewhere(tmp_path, monkeypatch):
    """Ray's workers run in another working folder."""
    monkeypatch.chdir(tmp_path)

    assert storage.absolute("data/") == str(tmp_path / "data")
    assert storage.absolute("~/data") == os.path.join(os.path.expanduser("~"), "data")
    assert storage.absolute("s3://bucket/data/") == "s3://bucket/data"


S3_VERBS = {
    "exists": lambda uri: storage.exists(uri),
    "read": lambda uri: storage.read(uri),
    "write": lambda uri: storage.write(uri, b"x"),
    "names": lambda uri: storage.names(uri),
    "check_writable": lambda uri: storage.check_writable(uri),
}


@pytest.mark.parametrize("verb", S3_VERBS)
def test_wrong_credentials_are_one_error_that_says_so(verb, s3, surroundings):
    """With the bucket named, the variables to check named, and no secret in a log for ever."""
    storage.write(f"{s3}/stands", b"x")
    surroundings(AWS_SECRET_ACCESS_KEY=SECRET)

    with pytest.raises(storage.StorageError) as failure:
        S3_VERBS[verb](f"{s3}/stands")

    assert_one_line(failure.value, f"{s3}/stands", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("verb", S3_VERBS)
def test_no_credentials_are_one_error_that_says_so(verb, s3, surroundings):
    """The commonest mistake on a new machine."""
    surroundings(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)

    with pytest.raises(storage.StorageError) as failure:
        S3_VERBS[verb](f"{s3}/x")

    assert_one_line(failure.value, f"{s3}/x", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("verb", ["read", "write", "check_writable"])
def test_a_missing_bucket_is_one_error_that_says_so(verb, s3):
    """Buckets are made by whoever pays for them, not by us."""
    with pytest.raises(storage.StorageError) as failure:
        S3_VERBS[verb]("s3://no-such-bucket/x")

    assert_one_line(failure.value, "s3://no-such-bucket/x", "no such bucket")


@pytest.mark.parametrize("verb", ["exists", "write"])
def test_an_endpoint_that_is_not_there_is_one_error_that_says_so(verb, s3, surroundings, dead_endpoint):
    """In seconds: botocore alone would try for minutes."""
    surroundings(AWS_ENDPOINT_URL=dead_endpoint, AWS_SECRET_ACCESS_KEY=SECRET)

    with pytest.raises(storage.StorageError) as failure:
        S3_VERBS[verb](f"{s3}/x")

    assert_one_line(failure.value, f"{s3}/x", f"no S3 server answers at {dead_endpoint}; check AWS_ENDPOINT_URL")


def test_an_endpoint_without_scheme_is_one_error_that_says_so(s3, surroundings):
    """host:port is what people type, and botocore calls it only invalid."""
    surroundings(AWS_ENDPOINT_URL="127.0.0.1:9000")

    with pytest.raises(storage.StorageError) as failure:
        storage.exists(f"{s3}/x")

    assert_one_line(failure.value, f"{s3}/x", "AWS_ENDPOINT_URL")


def assert_one_line(error: BaseException, uri: str, advice: str) -> None:
    message = str(error)
    assert message.startswith(uri)
    assert advice in message
    assert "\n" not in message
    assert SECRET not in message
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", SECRET) not in message
