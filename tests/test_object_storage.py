"""Object storage as it is: it fails, goes away, and is no place for secrets.

The faults come from a proxy before the real server (`faulty_proxy`). Ray runs in processes of its
own where the environment leads to the proxy, since workers have the one in which Ray was started.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray.data
import s3fs
from conftest import Ran
from faulty_proxy import Faults, FaultyProxy, faulty_proxy

from raylens import dataset, generate, shards, storage
from raylens.config import Experiment
from raylens.dataset import Dataset

NUM_SHARDS, SHARD_SIZE = 12, 8
NUM_IMAGES = NUM_SHARDS * SHARD_SIZE

# Nearly one request in five fails, and some are late; with this seed each kind is among the first 25.
FAULTS = Faults(unavailable=0.10, dropped=0.03, lost=0.03, cut=0.02, stalled=0.03, seed=17)
KINDS = ("unavailable", "dropped", "lost", "cut", "stalled")


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> str:
    """Tiny images, in many shards."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(Experiment(name="tiny", simulation=tiny).as_dict()))
    return str(path)


def command(recipe: str, root: str) -> tuple[str, ...]:
    return "simulate", recipe, "--to", root, "--num-images", str(NUM_IMAGES), "--shard-size", str(SHARD_SIZE)


@dataclass(frozen=True)
class Observed:
    """A run of the command line, and all that it wrote and showed."""

    ran: Ran
    ended: float  # time.monotonic()
    ray_folder: str
    traces: dict[str, list[bytes]]


def observe(cli, *arguments: str, **environment: str) -> Observed:
    """Run the command line with a folder of its own for Ray, and keep what it leaves there."""
    folder = tempfile.mkdtemp(prefix="raylens-", dir="/tmp")  # the path of a socket holds 107 characters
    try:
        with process_list() as processes:
            ran = cli(*arguments, timeout=400, RAY_TMPDIR=folder, **environment)
        ended = time.monotonic()
        files = [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
    finally:
        shutil.rmtree(folder)
    output = [ran.stdout.encode(), ran.stderr.encode()]
    return Observed(ran, ended, folder, {"output": output, "processes": list(processes), "Ray's files": files})


@contextmanager
def process_list() -> Iterator[set[bytes]]:
    """Collect the command lines of all processes that run while the body does."""
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # it has ended
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def where(text: str, traces: dict[str, list[bytes]]) -> set[str]:
    """Return in which of the traces a text occurs."""
    return {name for name, contents in traces.items() if any(text.encode() in content for content in contents)}


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory, ray_cluster) -> str:
    """The dataset as a run makes it on disk, where nothing fails."""
    root = str(tmp_path_factory.mktemp("local"))
    return generate.simulate(tiny, root, recipe="tiny", num_images=NUM_IMAGES, shard_size=SHARD_SIZE).dataset


@pytest.fixture(scope="module")
def through_faults(s3, cli, recipe) -> tuple[Observed, FaultyProxy]:
    """A run in which one request in five fails or is late, with all that --debug says."""
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], FAULTS) as proxy:
        return observe(cli, *command(recipe, f"{s3}/faulty"), "--debug", AWS_ENDPOINT_URL=proxy.endpoint), proxy


@pytest.fixture(scope="module", params=["vanished", pytest.param("unavailable", marks=pytest.mark.slow)])
def interrupted(request, s3, cli, recipe) -> tuple[Observed, FaultyProxy]:
    """A run whose server goes away when some shards are made."""
    faults = Faults(num_before_gone=25, gone=request.param)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
        return observe(cli, *command(recipe, f"{s3}/{request.param}"), AWS_ENDPOINT_URL=proxy.endpoint), proxy


def contents(uri: str) -> dict[str, bytes]:
    return {name: storage.read(storage.join(uri, name)) for name in sorted(dataset.standing_shards(uri))}


def test_a_server_that_fails_now_and_then_does_not_change_the_dataset(through_faults, local):
    """Object storage throttles and drops connections; a night's run must not end for that, nor make other data."""
    run, proxy = through_faults

    assert run.ran.returncode == 0, run.ran.stderr[-3000:]
    assert set(proxy.counts) == {"passed", *KINDS}
    assert run.ran.facts["num_made"] == NUM_SHARDS  # also those that were put when the answer was lost
    uri = run.ran.facts["dataset"]
    assert dataset.verify(uri) == []
    assert contents(uri) == contents(local)
    assert storage.read(storage.join(uri, "manifest.json")) == storage.read(storage.join(local, "manifest.json"))


def test_a_dataset_verifies_through_a_server_that_fails_now_and_then(through_faults, local, surroundings):
    """A broken answer is asked for again: it is no damage of the shard, which another run would then make anew."""
    uri = through_faults[0].ran.facts["dataset"]
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], replace(FAULTS, cut=0.15)) as proxy:
        surroundings(AWS_ENDPOINT_URL=proxy.endpoint)

        assert dataset.verify(uri) == []
        found = Dataset.open(uri).read(["index", "subhalo_mass"])

    assert proxy.counts["cut"] > 0
    for name, values in Dataset.open(local).read(list(found)).items():
        np.testing.assert_array_equal(found[name], values)


def test_a_conditional_write_whose_answer_is_lost_is_known_to_have_succeeded(s3, surroundings):
    """The next attempt meets what the first has put, which must not look like another run's."""
    uris = [f"{s3}/{uuid.uuid4().hex}" for _ in range(8)]
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], Faults(lost=0.4)) as proxy, ThreadPoolExecutor(8) as pool:
        surroundings(AWS_ENDPOINT_URL=proxy.endpoint)

        made = list(pool.map(lambda uri: storage.write_if(uri, b"sound", standing=None), uris))
        replaced = list(pool.map(lambda uri: storage.write_if(uri, b"better", standing=b"sound"), uris))
        refused = list(pool.map(lambda uri: storage.write_if(uri, b"better", standing=None), uris))

    assert all(made)
    assert all(replaced)
    assert not any(refused)
    assert proxy.counts["lost"] > 8


def test_a_server_that_goes_away_ends_the_run_soon_and_in_one_line(interrupted, s3):
    """Whoever comes back in the morning wants to know what failed, not that all hangs."""
    run, proxy = interrupted

    assert run.ran.returncode == 1
    assert run.ran.errors == run.ran.stderr.splitlines()[-1:]
    assert re.match(rf"error: {s3}/\S+: (no S3|the S3) server .*{proxy.endpoint} ?.*\.$", run.ran.errors[0])
    assert "Traceback" not in run.ran.stderr
    assert len(run.ran.errors[0]) < 300
    assert run.ended - proxy.gone_since < 60


def test_an_interrupted_run_is_finished_when_the_server_is_back(interrupted, s3, main, recipe, local, ray_cluster):
    """The same command goes on; what the first run has put is not made twice."""
    root = f"{s3}/{interrupted[1].faults.gone}"
    uri = f"{root}/{Path(local).name}"
    num_standing = len(dataset.standing_shards(uri))

    ran = main(*command(recipe, root))

    assert 0 < num_standing < NUM_SHARDS
    assert ran.returncode == 0, ran
    assert (ran.facts["num_skipped"], ran.facts["num_made"]) == (num_standing, NUM_SHARDS - num_standing)
    assert dataset.verify(uri) == []
    assert contents(uri) == contents(local)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (Faults(unavailable=1), r"answers 503"),
        (Faults(dropped=1), r"closes connections without an answer"),
        (Faults(lost=1), r"closes connections without an answer"),
        (Faults(cut=1), r"breaks off in the middle of its answers"),
        (Faults(stalled=1, stall=300), r"does not answer"),
    ],
    ids=KINDS,
)
def test_a_server_that_only_fails_is_told_of_with_what_it_does(faults, told, s3, surroundings):
    """Within a minute or so: all of them would otherwise be a run that hangs, or `OSError: please try again`."""
    storage.write(f"{s3}/stands", b"what stands")
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
        surroundings(AWS_ENDPOINT_URL=proxy.endpoint)
        begun = time.monotonic()

        with pytest.raises(
            storage.StorageError, match=f"^{s3}/stands: the S3 server at {proxy.endpoint} {told}.*later.$"
        ):
            storage.read(f"{s3}/stands")

    assert 20 < time.monotonic() - begun < 90


def read_with_arrow(uri: str) -> pa.Table:
    file_system, path = storage.arrow_file_system(uri)
    folder = file_system.get_file_info(pa.fs.FileSelector(path))
    return pq.read_table([file.path for file in folder if file.extension == "parquet"], filesystem=file_system)


def read_with_s3fs(uri: str) -> pa.Table:
    file_system = s3fs.S3FileSystem()
    return pq.read_table(file_system.glob(f"{uri}/*.parquet"), filesystem=file_system)


def read_with_ray(uri: str) -> pa.Table:
    file_system, path = storage.arrow_file_system(uri)
    rows = ray.data.read_parquet(path, filesystem=file_system)
    return pa.concat_tables(ray.get(rows.to_arrow_refs()))


@pytest.mark.parametrize("reader", [read_with_arrow, read_with_s3fs, read_with_ray])
def test_other_readers_see_in_s3_the_rows_and_images_that_stand_on_disk(reader, through_faults, local, ray_cluster):
    """A dataset is read by more than raylens, and the folder is all that one should have to name."""
    there = reader(through_faults[0].ran.facts["dataset"]).sort_by("index")
    here = read_with_arrow(local).sort_by("index")

    assert there.column_names == here.column_names
    assert there.drop(["image"]).equals(here.drop(["image"]))
    np.testing.assert_array_equal(shards.images(there), shards.images(here))


VERBS = {
    "simulate": ("simulate", "smoke", "--to", "{place}"),
    "simulate again": ("simulate", "{place}", "--to", "{root}"),
    "show": ("show", "{place}"),
    "show file": ("show", "{place}/recipe.json"),
    "verify": ("verify", "{place}"),
    "train on": ("train", "n-cnn", "--data", "{place}", "--to", "{root}/run"),
    "train to": ("train", "n-cnn", "--data", "{data}", "--to", "{place}", "--recipe", "smoke"),
    "evaluate": ("evaluate", "--n-cnn", "{place}", "--alpha-cnn", "{place}", "--data", "{data}", "--to", "{root}/r"),
    "predict": ("predict", "--n-cnn", "r", "--alpha-cnn", "r", "--images", "{place}", "--to", "{root}/p.parquet"),
    "export run": ("export", "{place}", "--to", "{root}/some.onnx"),
    "export": ("export", "{place}", "--index", "0:2", "--to", "{root}/images.fits"),
    "export to": ("export", "{data}", "--index", "0:2", "--to", "{place}/images.fits"),
    "report": ("report", "{place}/results.json", "--to", "{root}/report.html"),
    "reproduce": ("reproduce", "smoke", "--to", "{place}"),
}  # fmt: skip


def try_at(place: str, verb: str, main, local: str, root: Path) -> Ran:
    """Run a verb at a place where it must fail, and see that it does in one line and leaves nothing."""
    ran = main(*(word.format(place=place, data=local, root=root) for word in VERBS[verb]))

    assert ran.returncode == 1, ran
    assert len(ran.stderr.splitlines()) == len(ran.errors) == 1, ran.stderr
    assert not list(root.iterdir())
    return ran


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_credentials_are_one_line_that_names_the_place(verb, main, local, s3, surroundings, tmp_path):
    """Whichever verb meets them first; and the line does not hold them."""
    wrong = f"planted-{uuid.uuid4().hex}"
    surroundings(AWS_SECRET_ACCESS_KEY=wrong)

    ran = try_at(f"{s3}/new", verb, main, local, tmp_path)

    assert f"{s3}/new" in ran.errors[0]
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in ran.errors[0]
    assert wrong not in ran.stderr + ran.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_bucket_is_one_line_that_names_it(verb, main, local, s3, tmp_path):
    """A mistyped bucket is refused before anything is simulated or trained for it."""
    ran = try_at("s3://no-such-bucket/new", verb, main, local, tmp_path)

    assert "s3://no-such-bucket/new" in ran.errors[0]


@pytest.mark.parametrize("form", ["key:{secret}@bucket", "{secret}@bucket", "key:with/{secret}@bucket", "key:{secret}"])
@pytest.mark.parametrize("verb", VERBS)
def test_credentials_in_a_uri_are_refused_and_not_repeated(verb, form, main, local, tmp_path):
    """Other tools take them there; we would write them to manifests, cards and logs."""
    secret = f"planted-{uuid.uuid4().hex}"

    ran = try_at(f"s3://{form.format(secret=secret)}/new", verb, main, local, tmp_path)

    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in ran.errors[0]
    assert secret not in ran.stderr + ran.stdout


def test_the_secret_is_nowhere_after_a_run(through_faults):
    """A dataset is published, a log is pasted into an issue, and a process list is seen by all on the machine."""
    run, _ = through_faults
    uri = run.ran.facts["dataset"]
    traces = run.traces | {"dataset": [storage.read(storage.join(uri, name)) for name in storage.names(uri)]}

    assert where(os.environ["AWS_SECRET_ACCESS_KEY"], traces) == set()
    # The search finds what is there.
    assert where(uri.rpartition("/")[0], traces) == {"output", "processes"}
    assert where(run.ray_folder, traces) >= {"processes", "Ray's files"}
    assert where(dataset.read_plan(uri).digest, traces) >= {"dataset", "output"}


def test_the_secret_is_nowhere_after_a_run_that_failed(interrupted):
    """What fails is told with all its circumstances; this one is not among them."""
    run, proxy = interrupted

    assert where(os.environ["AWS_SECRET_ACCESS_KEY"], run.traces) == set()
    assert where(proxy.endpoint, run.traces) >= {"output"}
    assert where(run.ray_folder, run.traces) >= {"processes", "Ray's files"}


def test_no_credentials_are_anywhere_after_a_run_whose_credentials_were_wrong(s3, cli, recipe):
    """Then they are most likely another server's, and looked for with --debug."""
    wrong, token = f"planted-{uuid.uuid4().hex}", f"planted-token-{uuid.uuid4().hex}"
    credentials = {"AWS_SECRET_ACCESS_KEY": wrong, "AWS_SESSION_TOKEN": token}

    run = observe(cli, *command(recipe, f"{s3}/refused"), "--debug", **credentials)

    assert run.ran.returncode == 1
    assert "S3 refuses these credentials" in run.ran.stderr
    assert where(wrong, run.traces) == where(token, run.traces) == set()
    assert "Credential=" not in run.ran.stderr  # a signed request can be sent again for a quarter of an hour
    assert where(f"{s3}/refused", run.traces) == {"output", "processes"}
