"""The command line: bad input is one line that says what to do, and every verb ends with its facts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from raylens import models, recipes, reproduce, storage
from raylens.baselines import Baseline
from raylens.config import Model, Training


def standing(root: Path) -> dict[str, int | None]:
    """Return all that stands below a folder, and when each file was changed."""
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns if path.is_file() else None for path in root.rglob("*")
    }


def assert_refused(ran, advice: str, status: int = 1) -> None:
    """One line, the last, and no traceback."""
    assert ran.returncode == status, ran
    assert len(ran.errors) == 1, ran.stderr
    assert ran.stderr.splitlines()[-1] == ran.errors[0]
    assert re.search(advice, ran.errors[0])
    assert "Traceback" not in ran.stderr + ran.stdout


@pytest.fixture(scope="module")
def data(make_dataset, tiny, tmp_path_factory) -> str:
    """A complete dataset of 8 x 8 pixels."""
    return make_dataset(tmp_path_factory.mktemp("data"), tiny, num_images=20)


@pytest.fixture
def half(data, tmp_path) -> str:
    """The same, without manifest and last shard."""
    uri = shutil.copytree(data, tmp_path / "half" / Path(data).name)
    (uri / "manifest.json").unlink()
    (uri / "part-00004.parquet").unlink()
    return str(uri)


def make_run(run: Path, network: str, num_pixels: int, *, pixel_scale: float = 0.75, normalised: bool = True) -> str:
    """Write a run with a network that nobody trained."""
    scaling = models.Scaling(offset=1.0, scale=2.0)
    card = models.Card(
        network=network, target=models.TARGETS[network], loss="mse", num_pixels=num_pixels, pixel_scale=pixel_scale,
        normalised=normalised, num_parameters=1,
        model=Model(filters=(4,), kernel_size=3, dense=8), training=Training(), target_scaling=scaling,
        num_subhalos_scaling=scaling,
        baselines={
            name: Baseline(given=[], low=[], high=[], coefficients=[1.0]) for name in models.BASELINES[network]
        },
        recipe="tiny", dataset="nowhere", dataset_digest="00000000", validation_dataset=None, num_training_images=1,
        num_validation_images=1, num_workers=1, num_threads=1, share="resident", device="cpu", epoch=1,
        seconds=1.0, cpu_seconds=1.0, gpu_seconds=0.0, versions={},
        metrics={
            "epoch": 1, "train_loss": 1.0, "validation_loss": 1.0, "validation_rmse": 1.0, "validation_gradient": None,
            "validation_bias": 0.0, "num_threads": 1, "images_per_second": 1.0, "seconds": 1.0, "elapsed": 1.0,
            "learning_rate": 1.0, "num_workers": 1, "waiting": 0.0,
        },
    )  # fmt: skip
    models.save(str(run), safetensors.torch.save(models.build(card).state_dict()), card)
    return str(run)


SIMULATE = ("simulate", "smoke", "--to", "{root}")
TRAIN = ("train", "n-cnn", "--recipe", "smoke")
PREDICT = ("predict", "--n-cnn", "{root}/n8", "--alpha-cnn", "{root}/a8")
EVALUATE_9, EVALUATE_COARSE, EVALUATE_RAW = (
    ("evaluate", "--n-cnn", f"{{root}}/n{kind}", "--alpha-cnn", f"{{root}}/a{kind}", "--to", "{root}/r.json")
    for kind in ("9", "c8", "r8")
)
EVALUATE = ("evaluate", "--alpha-cnn", "{root}/a8", "--to", "{root}/r.json")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("simulate", "smok", "--to", "{root}"), r"smok is no recipe.* did you mean smoke\?"),
        (("show", "zzz"), r"the recipes are smoke, paper-fixed"),
        (("reproduce", "smok", "--to", "{root}"), r"did you mean smoke\?"),
        (("simulate", "{root}/none.json", "--to", "{root}"), r"none\.json: no such file"),
        (("simulate", "{root}/notes.toml", "--to", "{root}"), r"notes\.toml is not TOML"),
        ((*SIMULATE, "--set", "lens.theta=1"), r"there is no lens\.theta; did you mean lens\.theta_E\?"),
        ((*SIMULATE, "--set", "num_pixels=30"), r"did you mean camera\.num_pixels\?"),
        ((*SIMULATE, "--set", "lens=1"), r"lens is a group of values.* lens\.theta_E"),
        ((*SIMULATE, "--set", "training.num_epochs=3"), r"there is no training\.num_epochs"),
        ((*SIMULATE, "--set", "lens.theta_E=round"), r"lens\.theta_E: .* got \"round\""),
        ((*SIMULATE, "--set", "camera.num_pixels=30.5"), r"camera\.num_pixels: .* got 30\.5"),
        ((*SIMULATE, "--set", "engine=cuda"), r"engine: .*'numba' or 'lenstronomy'.* got \"cuda\""),
        ((*SIMULATE, "--set", 'lens.q={"uniform": [0.9, 0.5]}'), r"uniform needs \[low, high\] with low < high"),
        ((*SIMULATE, "--set", "lens.q=1.25"), r"\(0, 1\]; got 1\.25\. For a major/minor ratio pass 1/q"),
        ((*SIMULATE, "--set", "subhalos.mass_min=1e12"), r"subhalos\.mass_min must be below subhalos\.mass_max"),
        ((*SIMULATE, "--set", "subhalos.mass_min=1"), r"raise subhalos\.mass_min"),
        ((*SIMULATE, "--set", "lens.z_lens=2"), r"the source must lie behind the lens"),
        ((*SIMULATE, "--split", "test-alpha-1.7"), r"is no split; the splits are train, validation"),
        (("simulate", "smoke", "--to", "{root}/notes.toml/below"), r"notes\.toml/below cannot be written"),
        (("simulate", "smoke", "--to", "gs://bucket"), r"only local paths and s3:// are known"),
        (("verify", "{root}"), r"is no dataset.*raylens simulate RECIPE --to ROOT"),
        (("verify", "{half}"), r"no manifest, and 4 of 5 shards.*raylens simulate"),
        (("train", "n-cnn", "--data", "{data}", "--to", "{root}/run"), r"from a recipe file, tiny, .* --recipe FILE"),
        ((*TRAIN, "--data", "{root}/none", "--to", "{root}/run"), r"is no dataset"),
        ((*TRAIN, "--data", "{half}", "--to", "{root}/run"), r"4 of 5 shards.*raylens simulate"),
        ((*TRAIN, "--data", "{data}", "--validation", "{half}", "--to", "{root}/run"), r"no manifest"),
        ((*TRAIN, "--data", "{data}", "--to", "{root}/n8"), r"stands already; go on with --resume"),
        ((*TRAIN, "--data", "{data}", "--to", "{root}/notes.toml/run"), r"notes\.toml/run: not a directory"),
        (
            (*TRAIN, "--data", "{data}", "--to", "{root}/run", "--set", "training.num_epoch=3"),
            r"did you mean training\.num_epochs\?",
        ),
        (
            (*TRAIN, "--data", "{data}", "--to", "{root}/run", "--set", "model.filters=[4,4,4,4,4]"),
            r"8 x 8|pixels",
        ),
        (
            (*EVALUATE, "--n-cnn", "{root}/n8", "--data", "{half}"),
            r"4 of 5 shards and no manifest",
        ),
        (
            (*EVALUATE, "--n-cnn", "{root}/n9", "--data", "{data}"),
            r"the two networks were trained on different images: the n-cnn on 9 x 9 .*, the alpha-cnn on 8 x 8",
        ),
        (
            (*EVALUATE_9, "--data", "{data}"),
            r"n9 cannot predict .*: the n-cnn was trained on images of 9 x 9 pixels, and these have 8 x 8",
        ),
        (
            (*EVALUATE_COARSE, "--data", "{data}"),
            r"c8 cannot predict .*: the n-cnn was trained on pixels of 0\.8 arcsec, and these have 0\.75",
        ),
        (
            (*EVALUATE_RAW, "--data", "{data}"),
            r"r8 cannot predict .*: the n-cnn was trained on images that were not normalised, and these have been",
        ),
        ((*PREDICT, "--images", "{half}", "--to", "{root}/p.parquet"), r"4 of 5 shards and no manifest"),
        ((*PREDICT, "--images", "{data}", "--to", "{root}/p.csv"), r"must end in \.parquet; got .*p\.csv"),
        ((*PREDICT, "--images", "{data}", "--to", "{data}/p.parquet"), r"lies among the images"),
        ((*PREDICT, "--images", "{root}/i.npy", "--to", "{root}/p.parquet"), r"i\.npy: there is no such file"),
        ((*PREDICT, "--images", "{root}/none", "--to", "{root}/p.parquet"), r"no such folder, or nothing in it; give"),
        ((*PREDICT, "--images", "{root}", "--to", "{root}/p/p.parquet"), r"files of other kinds only; .*\.npy"),
        ((*PREDICT, "--images", "{data}", "--to", "{root}/notes.toml/p.parquet"), r"notes\.toml cannot be written"),
        (
            (*PREDICT[:3], "--alpha-cnn", "{root}/n8", "--images", "{data}", "--to", "{root}/p.parquet"),
            r"n8 holds an n-cnn, where an alpha-cnn is needed",
        ),
        (("export", "{root}", "--to", "{root}/n.onnx"), r"holds no trained network; `raylens train n-cnn"),
        (("export", "{root}/n8", "--to", "{root}/notes.toml/n.onnx"), r"notes\.toml cannot be written"),
        (("export", "{root}/n8", "--index", ":", "--to", "{root}/n.fits"), r"is no dataset"),
        (
            ("train", "n-cnn", "--data", "{data}", "--recipe", "{data}", "--to", "{root}/run"),
            r"from a recipe file, tiny, which also says how to train: `raylens train --recipe FILE`",
        ),
        (
            ("reproduce", "{data}", "--to", "{root}/all"),
            r"from a recipe file, tiny, .*`raylens reproduce FILE`",
        ),
        (
            (*EVALUATE, "--n-cnn", "{root}/a8", "--data", "{data}"),
            r"a8 holds an alpha-cnn, where an n-cnn is needed",
        ),
        (
            (*EVALUATE, "--n-cnn", "{root}", "--data", "{data}"),
            r"holds no trained network; `raylens train n-cnn",
        ),
        (
            (*EVALUATE[:-1], "{root}/notes.toml/r", "--n-cnn", "{root}/n8", "--data", "{data}"),
            r"notes\.toml cannot be written",
        ),
        (("report", "{root}/none.json", "--to", "{root}/report.html"), r"none\.json: no such file"),
        (("report", "{root}/notes.toml", "--to", "{root}/report.html"), r"notes\.toml is not JSON"),
        (("report", "{root}/n8/model.json", "--to", "{root}/report.html"), r"not a results\.json of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what_to_do(main, data, half, tmp_path, words, advice):
    """And nothing half-made is left, which a later run would take for its own."""
    root = tmp_path / "root"
    for letter, network in (("n", "n-cnn"), ("a", "alpha-cnn")):
        make_run(root / f"{letter}8", network, 8)
        make_run(root / f"{letter}9", network, 9)
        make_run(root / f"{letter}c8", network, 8, pixel_scale=0.8)
        make_run(root / f"{letter}r8", network, 8, normalised=False)
    (root / "notes.toml").write_text("not a recipe")
    before = standing(tmp_path)

    ran = main(*(word.replace("{root}", str(root)).replace("{data}", data).replace("{half}", half) for word in words))

    assert_refused(ran, advice)
    assert standing(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("simulat",), r"No such command 'simulat'.* See raylens --help"),
        (("simulate", "smoke"), r"--to"),
        ((*SIMULATE, "--num-images", "many"), r"'--num-images': .*valid integer"),
        ((*SIMULATE, "--num-images", "0"), r"'--num-images': .*greater than or equal to 1"),
        ((*SIMULATE, "--shard-size", "-1"), r"'--shard-size': .*greater than or equal to 1"),
        ((*SIMULATE, "--num-image", "5"), r"No such option: --num-image"),
        ((*SIMULATE, "--set", "lens.q"), r"--set takes KEY=VALUE; got lens\.q"),
        ((*SIMULATE, "more"), r"unexpected extra argument"),
        (("train", "q-cnn", "--data", "d", "--to", "{root}"), r"the networks are n-cnn and alpha-cnn"),
        (("train", "n-cnn", "--data", "d", "--to", "{root}", "--num-workers", "0"), r"--num-workers"),
        (("evaluate", "--to", "{root}"), r"--n-cnn"),
        (("predict", "--images", "{root}", "--to", "{root}/p.parquet"), r"--n-cnn"),
        (("export", "d", "--to", "{root}/some.fits"), r"images need --index A:B, .* ending in \.onnx"),
        (("export", "r", "--index", "0", "--to", "{root}/n.onnx"), r"a network is exported as a whole"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_line_that_is_not_understood_is_wrong_usage(main, tmp_path, words, advice):
    """A mistyped option that silently does nothing is the worst of all."""
    ran = main(*(word.replace("{root}", str(tmp_path / "root")) for word in words))

    assert_refused(ran, advice, status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ("simulate", "smoke", "--to", "{bucket}/new"),
    ("verify", "{bucket}/new"),
    (*TRAIN, "--data", "{data}", "--to", "{bucket}/run"),
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("credentials", [True, False], ids=["dead endpoint", "no credentials"])
def test_s3_that_cannot_be_reached_is_one_line(
    main, data, s3, surroundings, dead_endpoint, tmp_path, words, credentials
):
    """Whichever verb meets it first, and in seconds."""
    if credentials:
        surroundings(AWS_ENDPOINT_URL=dead_endpoint)
    else:
        surroundings(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)

    ran = main(*(word.format(bucket=s3, data=data, root=tmp_path) for word in words))

    assert_refused(ran, "check AWS_ENDPOINT_URL" if credentials else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    assert s3 in ran.errors[0]
    assert not list(tmp_path.iterdir())


def test_doctor_tries_the_place_it_is_given_and_no_other(main, s3, surroundings, dead_endpoint, tmp_path, ray_cluster):
    """Credentials are often good for one bucket only, and come from more places than variables."""
    (tmp_path / "file").write_text("x")

    found = main("doctor", f"{s3}/new")
    blocked = main("doctor", str(tmp_path / "file"))
    surroundings(AWS_ENDPOINT_URL=dead_endpoint)
    dead, untried = main("doctor", f"{s3}/new"), main("doctor")

    assert found.facts["storage"]["detail"] == f"{s3}/new can be written"
    assert_refused(blocked, r"^error: storage: .*/file cannot be written: file exists")
    assert_refused(dead, r"^error: storage: s3://bucket/new cannot be written: no S3 server answers")
    assert found.returncode == untried.returncode == 0
    assert "raylens doctor s3://bucket/prefix" in untried.facts["storage"]["detail"]


def test_a_measure_that_is_not_defined_is_a_dash(main, monkeypatch):
    """Where a recipe holds alpha, its gradient is not; and a format error would come after hours."""
    metrics = {"n_gradient": 0.97123, "alpha_gradient": None}
    monkeypatch.setattr(reproduce, "reproduce", lambda *words, **options: {"metrics": metrics, "report": "r.html"})

    ran = main("reproduce", "smoke", "--to", "root")

    assert ran.stdout.splitlines()[:2] == ["n_gradient      0.9712", "alpha_gradient  -"]
    assert ran.facts["metrics"] == metrics


def test_a_process_of_its_own_says_the_same(cli, tmp_path):
    """The tests above call a function; here are the exit status and the streams that a shell sees."""
    (tmp_path / "file").write_text("x")
    before = standing(tmp_path)

    unknown = cli("simulate", "smok", "--to", str(tmp_path / "root"))
    usage = cli("simulate", "smoke", "--to", str(tmp_path / "root"), "--num-images", "many")
    unwritable = cli("simulate", "smoke", "--to", str(tmp_path / "file" / "below"))

    assert_refused(unknown, "did you mean smoke")
    assert_refused(usage, "--num-images", status=2)
    assert_refused(unwritable, "cannot be written")
    assert unknown.stdout == usage.stdout == unwritable.stdout == ""
    assert standing(tmp_path) == before


def test_what_fails_in_a_worker_is_one_line_too(main, half, tiny, tmp_path, ray_cluster):
    """Ray wraps it, with the worker's traceback; a person wants to know which file."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)
    blocked = Path(half) / "part-00004.parquet"
    blocked.mkdir()

    ran = main("simulate", recipe, "--to", str(Path(half).parent), "--num-images", "20")

    assert_refused(ran, rf"^error: {blocked}: is a directory\.$")
    assert not (Path(half) / "manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (("show", "smoke"), "again"),
        (("train", "n-cnn", "--data", "d", "--to", "r", "--recipe", "smoke"), "with --resume"),
        (("train", "n-cnn", "--data", "d", "--to", "r", "--recipe", "smoke", "--resume"), "again"),
    ],
)
def test_an_interruption_says_how_to_go_on(main, monkeypatch, words, how):
    """A run that stands is refused without --resume; the other verbs go on by themselves."""

    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "load", interrupted)

    assert_refused(main(*words), f"^error: interrupted; run the same command {how} to go on\\.$")


def test_debug_shows_where_it_failed(main):
    """One line is for whoever made a mistake; for ours one needs the place."""
    with pytest.raises(ValueError, match="smok is no recipe"):
        main("show", "smok", "--debug")


def write_recipe(path: Path, simulation) -> str:
    path.write_text(json.dumps({"name": "tiny", "simulation": simulation.as_dict()}))
    return str(path)


@pytest.mark.parametrize("quiet", [False, True])
def test_each_verb_ends_with_one_json_line_that_names_what_it_made(main, data, tiny, tmp_path, ray_cluster, quiet):
    """Programs read it; with --quiet nothing else is said."""
    recipe, root = write_recipe(tmp_path / "tiny.json", tiny), str(tmp_path / "root")
    n_cnn, alpha_cnn = make_run(tmp_path / "n", "n-cnn", 8), make_run(tmp_path / "a", "alpha-cnn", 8)
    made = f"{root}/tiny-train-{tiny.digest}"
    results, report = str(tmp_path / "results.json"), str(tmp_path / "report.html")
    predictions, onnx = str(tmp_path / "predictions.parquet"), str(tmp_path / "n.onnx")
    expected = {
        ("--version",): {},
        ("recipes",): {"recipes": list(recipes.RECIPES)},
        ("show", recipe): {"digest": tiny.digest},
        ("simulate", recipe, "--to", root, "--num-images", "6", "--dry-run"): {"dataset": made, "num_standing": 0},
        ("simulate", recipe, "--to", root, "--num-images", "6", "--shard-size", "4"): {"dataset": made, "num_made": 2},
        ("verify", made): {"dataset": made, "sound": True, "wrong": []},
        ("evaluate", "--n-cnn", n_cnn, "--alpha-cnn", alpha_cnn, "--data", data, "--to", results): {"results": results},
        ("report", results, "--to", report): {"report": report},
        ("predict", "--n-cnn", n_cnn, "--alpha-cnn", alpha_cnn, "--images", data, "--to", predictions): {
            "predictions": predictions,
            "num_images": 20,
            "num_skipped": 0,
        },
        ("export", n_cnn, "--to", onnx): {"onnx": onnx, "network": "n-cnn"},
        ("doctor",): {},
    }

    for words, facts in expected.items():
        ran = main(*words, *(["--quiet"] if quiet else []))

        assert ran.returncode == 0, ran
        assert ran.facts.items() >= facts.items()
        if quiet:
            assert len(ran.stdout.splitlines()) == 1
            assert not re.search(r"\d/s ", ran.stderr)


def test_progress_goes_to_standard_error_with_rate_and_time(main, tiny, tmp_path, ray_cluster):
    """Standard output is for results."""
    ran = main("simulate", write_recipe(tmp_path / "tiny.json", tiny), "--to", str(tmp_path), "--num-images", "6")

    assert re.search(r"^simulate train +6 of 6 images +1 of 1 shards +[\d,.]+/s +in \d+ s$", ran.stderr, re.MULTILINE)
    assert len(ran.stdout.splitlines()) == 2
    assert "1 made, 0 stood already" in ran.stdout


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_what_show_prints_is_a_recipe_file(main, tmp_path, recipe):
    """What made a result can be kept beside it, and made again."""
    ran = main("show", recipe, "--set", "lens.theta_E=1.2", "--set", "training.num_epochs=7")
    (tmp_path / "kept.json").write_text(ran.stdout)

    again = recipes.load(str(tmp_path / "kept.json"))

    assert again.simulation.digest == ran.facts["digest"]
    assert again.simulation.lens.theta_E == 1.2
    assert again == recipes.load(recipe).override({"lens.theta_E": 1.2, "training.num_epochs": 7})


def test_a_dataset_is_a_recipe_too(main, data, tiny):
    """So that more of the same can be made without the file that began it."""
    assert main("show", data).facts["digest"] == tiny.digest


def test_a_dataset_trains_as_the_recipe_of_its_name_does(main, make_dataset, tiny, tmp_path):
    """Its plan holds no networks; the paper's in their place would train for hours what smoke trains in minutes."""
    uri = Path(make_dataset(tmp_path, tiny, num_images=6))
    plan = json.loads((uri / "dataset.json").read_text())
    (uri / "dataset.json").write_text(json.dumps(plan | {"recipe": "smoke"}))

    experiment = recipes.load_with_networks(str(uri))

    smoke = recipes.smoke()
    assert (experiment.n_cnn, experiment.alpha_cnn) == (smoke.n_cnn, smoke.alpha_cnn)
    assert experiment.n_cnn != recipes.paper_fixed().n_cnn
    assert (experiment.name, experiment.simulation, experiment.num_images.train) == ("smoke", tiny, 6)
    assert experiment.num_images.test == smoke.num_images.test


def test_a_dry_run_makes_nothing_and_says_what_would_be(main, half, tiny, tmp_path):
    """Before a night of a cluster, one wants to see the numbers."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)
    before = standing(tmp_path)

    new = main("simulate", recipe, "--to", str(tmp_path / "new"), "--num-images", "5000", "--dry-run")
    begun = main(
        "simulate", recipe, "--to", str(Path(half).parent), "--num-images", "20", "--shard-size", "4", "--dry-run"
    )

    assert standing(tmp_path) == before
    assert (new.facts["num_images"], new.facts["num_shards"], new.facts["num_standing"]) == (5000, 5, 0)
    assert begun.facts["dataset"] == half
    assert (begun.facts["num_shards"], begun.facts["num_standing"]) == (5, 4)


def test_a_dry_run_counts_with_the_shard_size_that_stands(main, half, tiny, tmp_path):
    """Without --shard-size the run goes on with the plan's, so its forecast must too."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)

    begun = main("simulate", recipe, "--to", str(Path(half).parent), "--num-images", "20", "--dry-run")

    assert (begun.facts["num_shards"], begun.facts["num_standing"]) == (5, 4)


# The design's list for `simulate --set`, each with a value that is not the recipe's.
SETTINGS = {
    "engine": "lenstronomy", "seed": 7, "lens.theta_E": 1.2, "lens.q": {"normal": [0.7, 0.1, 0.3, 0.9]},
    "lens.phi": 0.3, "lens.x": {"uniform": [-0.1, 0.1]},
    "lens.y": 0.05, "lens.z_lens": 0.4, "source.z": 1.5, "source.sigma": 0.5,
    "subhalos.alpha": -1.9, "subhalos.mass_min": 1e9, "subhalos.mass_max": 1e11, "subhalos.mass_fraction": 0.05,
    "subhalos.compensation": "sheet", "camera.num_pixels": 30, "camera.pixel_scale": 0.2, "camera.psf_sigma": 0,
    "camera.signal_to_noise": None, "camera.normalise": False, "camera.supersampling": 2, "output.catalogue": True,
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_each_setting_of_the_design_is_accepted_and_takes_effect(main, tmp_path, key):
    """The public face: a name is promised, and a setting that changes nothing has not been set."""
    word = SETTINGS[key] if isinstance(SETTINGS[key], str) else json.dumps(SETTINGS[key])

    planned = main("simulate", "smoke", "--to", str(tmp_path), "--set", f"{key}={word}", "--dry-run")
    shown = main("show", "smoke", "--set", f"{key}={word}")

    assert planned.returncode == 0, planned
    place = shown.facts["simulation"]
    for name in key.split("."):
        place = place[name]
    assert place == SETTINGS[key]
    assert planned.facts["dataset"].endswith(f"smoke-train-{shown.facts['digest']}")
    assert shown.facts["digest"] != recipes.smoke().simulation.digest


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.filters", [4, 8]), ("model.kernel_size", 3), ("model.dropout", 0.1), ("training.num_epochs", 2),
     ("training.batch_size", 8), ("training.learning_rate", 0.01), ("training.optimizer", "nadam"),
     ("training.seed", 3)],
)  # fmt: skip
def test_each_setting_of_the_design_for_training_reaches_both_networks(main, key, value):
    """As above; `show` prints what `train` would take from the recipe."""
    ran = main("show", "smoke", "--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")

    group, name = key.split(".")
    assert [ran.facts[network][group][name] for network in ("n_cnn", "alpha_cnn")] == [value, value]


def test_verify_fails_and_lists_all_that_is_wrong(main, data, tmp_path):
    """Its exit status is what a script looks at, its lines what a person reads."""
    uri = shutil.copytree(data, tmp_path / Path(data).name)
    (uri / "part-00001.parquet").unlink()
    (uri / "part-00002.parquet").write_bytes(b"PAR1")

    ran = main("verify", str(uri))

    assert_refused(ran, r"part-00001\.parquet is missing.*raylens simulate.*mends it")
    assert ran.facts["sound"] is False
    assert len(ran.facts["wrong"]) == 2


def test_verify_says_what_mends_each_fault(main, data, tmp_path):
    """A command that mends nothing is worse than none."""
    name = Path(data).name

    def refused(folder: str, change) -> str:
        uri = shutil.copytree(data, tmp_path / folder / name)
        uri = uri.rename(uri.with_name(change(uri) or name))
        return main("verify", str(uri)).errors[0]

    stray = refused("1", lambda uri: shutil.copy(uri / "part-00000.parquet", uri / "part-00077.parquet") and None)
    renamed = refused("2", lambda uri: (uri / "part-00000.parquet").unlink() or "mine")
    cut = refused("3", lambda uri: (uri / "manifest.json").write_text("{") and None)

    assert stray.endswith("part-00077.parquet is not in the manifest. Move what does not belong there away.")
    assert renamed.endswith(f"It was called {name}; with that name `raylens simulate` mends it.")
    assert re.search(r"manifest\.json is not JSON: .*`raylens simulate .* mends it", cut)


def test_a_manifest_that_was_cut_is_made_again(main, tiny, tmp_path, ray_cluster):
    """All that was in it can be found in the shards."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)
    command = ("simulate", recipe, "--to", str(tmp_path), "--num-images", "20", "--shard-size", "8")
    manifest = Path(main(*command).facts["dataset"], "manifest.json")
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:50])

    assert main(*command).facts["num_skipped"] == 3
    assert manifest.read_bytes() == whole


def test_a_dataset_is_simulated_verified_and_trained_on_in_s3(main, tiny, s3, tmp_path, ray_cluster):
    """No verb may need a local copy."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)
    uri = main("simulate", recipe, "--to", f"{s3}/cli", "--num-images", "20", "--shard-size", "8").facts["dataset"]

    verified = main("verify", uri)
    settings = ("model.filters=[4]", "model.kernel_size=3", "training.num_epochs=1")
    trained = main(
        "train", "n-cnn", "--recipe", recipe, "--data", uri, "--to", f"{s3}/cli/run", "--quiet",
        *(f"--set={one}" for one in settings),
    )  # fmt: skip

    assert verified.returncode == 0
    assert trained.returncode == 0, trained
    assert len(trained.stdout.splitlines()) == 1
    assert (trained.facts["run"], trained.facts["num_epochs"]) == (f"{s3}/cli/run", 1)
    assert min(trained.facts[name] for name in ("seconds", "cpu_seconds", "images_per_second")) > 0
    assert models.read_card(f"{s3}/cli/run", "n-cnn").dataset == uri
    assert models.read_card(f"{s3}/cli/run", "n-cnn").recipe == "tiny"
    assert {"model.json", "model.safetensors", "metrics.jsonl", "tensorboard"} <= storage.names(f"{s3}/cli/run")


def test_what_is_printed_when_all_else_is_done_does_not_follow_the_facts():
    """Ray says that a worker has died when it hears of it, which may be after the last line."""
    late = "import atexit; from raylens import cli; atexit.register(print, 'a worker died'); cli.run()"

    ran = subprocess.run([sys.executable, "-c", late, "recipes"], capture_output=True, text=True, check=True)

    assert json.loads(ran.stdout.splitlines()[-1])["recipes"]
    assert ran.stderr == "a worker died\n"
