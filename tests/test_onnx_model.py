"""A network in ONNX predicts what it predicts in torch, in a file that needs nothing beside it."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from test_cli import assert_refused, make_run

from raylens import learning, models, onnx_model, shards, storage
from raylens.config import Experiment
from raylens.simulate import simulate_block


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Seven of the paper's lenses."""
    simulation = Experiment().simulation
    return shards.images(shards.to_table(simulate_block(simulation, range(7)), simulation)).copy()


@pytest.fixture(scope="module", params=["n-cnn", "alpha-cnn"])
def run(request, tmp_path_factory) -> str:
    """One of the paper's two networks, untrained, but with the statistics of some images."""
    uri = make_run(tmp_path_factory.mktemp("run"), request.param, 60, pixel_scale=0.1)
    network = Experiment().n_cnn if request.param == "n-cnn" else Experiment().alpha_cnn
    card = models.read_card(uri).model_copy(update={"model": network.model})
    model = models.build(card)
    model(torch.rand(16, 60, 60), torch.linspace(50, 900, 16))
    models.save(uri, safetensors.torch.save(model.state_dict()), card)
    return uri


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """That network in ONNX; what torch warns of would reach whoever exports."""
    path = tmp_path_factory.mktemp("exported") / "some.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onnx_model.export(run, str(path))
    return path


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("num_images", [1, 7])
def test_onnxruntime_predicts_what_torch_predicts(run, exported, images, num_images):
    """In the units of the dataset, and whatever the number of images at once."""
    images, num_subhalos = images[:num_images], np.linspace(50, 900, num_images, dtype=np.float32)
    inputs = {"image": images, "num_subhalos": num_subhalos}
    card = models.read_card(run)

    (predicted,) = session(exported).run(
        None, {given.name: inputs[given.name] for given in session(exported).get_inputs()}
    )

    expected = learning.predict(
        models.load(run, card.network), torch.from_numpy(images), torch.from_numpy(num_subhalos)
    ).numpy()
    assert predicted.shape == (num_images,)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)


def test_inputs_and_output_are_named_for_what_they_are(run, exported):
    """Whoever uses the file has nothing else to go by."""
    card = models.read_card(run)
    batch = ["batch"] if card.network == "alpha-cnn" else None

    found = session(exported)

    shapes = {given.name: given.shape for given in found.get_inputs()}
    assert shapes == {"image": ["batch", 60, 60]} | ({"num_subhalos": batch} if batch else {})
    assert [(one.name, one.shape) for one in found.get_outputs()] == [(card.target, ["batch"])]
    assert "pixels of 0.1 arcsec, scaled to minimum 0 and maximum 1" in onnx.load(exported).graph.input[0].doc_string


def test_the_card_travels_with_the_network(run, exported):
    """What it was trained on decides for which images it is good."""
    told = session(exported).get_modelmeta().custom_metadata_map

    assert models.Card.parse(json.loads(told["raylens"])) == models.read_card(run)


def test_the_file_stands_alone_and_tells_nothing_of_this_machine(exported):
    """Torch puts large weights beside the file, and notes from which lines of which files each node comes."""
    assert [path.name for path in exported.parent.iterdir()] == ["some.onnx"]
    model = onnx.load(exported)
    for weights in model.graph.initializer:
        weights.ClearField("raw_data")  # whose bytes may spell anything
    assert b".py" not in model.SerializeToString()


def test_export_to_s3_ends_with_its_facts(main, run, s3):
    """As every verb; nothing is left on the machine that exports."""
    ran = main("export", run, "--to", f"{s3}/onnx/some.onnx")

    assert ran.returncode == 0, ran
    assert ran.stderr == ""
    assert ran.facts["onnx"] == f"{s3}/onnx/some.onnx"
    assert len(storage.read(ran.facts["onnx"])) == ran.facts["bytes"]


def test_without_the_packages_one_line_says_what_to_install(main, run, tmp_path, monkeypatch):
    """They are an extra."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)

    ran = main("export", run, "--to", str(tmp_path / "some.onnx"))

    assert_refused(ran, r"a package that is not here, onnxscript: pip install 'raylens\[onnx\]'")
    assert list(tmp_path.iterdir()) == []
