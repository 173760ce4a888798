"""The networks are the paper's, and a trained one is data."""

import json

import pytest
import safetensors.torch
import torch

from raylens import models
from raylens.baselines import Baseline
from raylens.config import Experiment, Model

UNSCALED = models.Scaling(offset=0.0, scale=1.0)


def network(name: str, model: Model | None = None, num_pixels: int = 60) -> models.CNN:
    experiment = Experiment()
    papers = experiment.n_cnn.model if name == "n-cnn" else experiment.alpha_cnn.model
    return models.CNN(name, model or papers, num_pixels=num_pixels, target=UNSCALED, num_subhalos=UNSCALED)


@pytest.mark.parametrize(("name", "count"), [("n-cnn", 1_671_393), ("alpha-cnn", 3_687_522)])
def test_networks_have_the_papers_number_of_parameters(name, count):
    """Figure 4 states them to the unit, which pins every layer."""
    assert models.num_parameters(network(name)) == count


def test_each_convolution_is_followed_by_activation_normalisation_pooling_and_dropout():
    """Section 2.2 states the order; another order has as many parameters."""
    kinds = [type(layer).__name__ for layer in network("n-cnn").features]

    assert kinds == ["Conv2d", "ReLU", "BatchNorm2d", "MaxPool2d", "Dropout"] * 3 + ["Flatten", "Linear", "ReLU"]


@pytest.mark.parametrize("num_pixels", [8, 13, 30, 60, 61])
def test_prediction_is_one_number_an_image_whatever_the_size(num_pixels):
    """(B, 1) against targets (B,) would broadcast to (B, B) in the loss."""
    image_BHW, num_subhalos_B = torch.rand(3, num_pixels, num_pixels), torch.rand(3)

    for name in ("n-cnn", "alpha-cnn"):
        assert network(name, num_pixels=num_pixels)(image_BHW, num_subhalos_B).shape == (3,)


def test_alpha_cnn_looks_at_n_and_n_cnn_does_not():
    """The N-CNN must not see what it is to predict; the alpha-CNN is the paper's sequence only if it sees it."""
    image_BHW = torch.rand(2, 60, 60)
    few, many = torch.full((2,), 1.0), torch.full((2,), 2.0)
    n_cnn, alpha_cnn = network("n-cnn").eval(), network("alpha-cnn").eval()

    assert torch.equal(n_cnn(image_BHW, few), n_cnn(image_BHW, many))
    assert not torch.equal(alpha_cnn(image_BHW, few), alpha_cnn(image_BHW, many))


def test_layers_that_pool_the_image_away_are_refused():
    """The search tries up to six layers on 30 and 60 pixels."""
    deep = Model(filters=(8,) * 5, kernel_size=3)

    with pytest.raises(ValueError, match=r"5 layers pool images of 30 pixels away; .* at most 4"):
        network("n-cnn", deep, num_pixels=30)


def test_scaling_is_undone_in_units():
    """Scaling is an inner affair: what goes in and comes out is in the units of the dataset."""
    model = network("n-cnn")
    model.target = models.Scaling(offset=383.0, scale=176.0)
    target_B = torch.tensor([24.0, 383.0, 1667.0])

    torch.testing.assert_close(model.in_units(model.scaled(target_B)), target_B)


def card(**changes) -> models.Card:
    experiment = Experiment()
    values = {
        "network": "n-cnn", "target": "num_subhalos", "loss": "mse", "num_pixels": 8, "pixel_scale": 0.75,
        "normalised": True, "num_parameters": 1,
        "model": Model(filters=(2,), kernel_size=3), "training": experiment.n_cnn.training,
        "target_scaling": UNSCALED, "num_subhalos_scaling": UNSCALED,
        "baselines": {"n_constant": Baseline(given=[], low=[], high=[], coefficients=[0.0])},
        "recipe": "smoke", "dataset": "d", "dataset_digest": "00000000", "validation_dataset": None,
        "num_training_images": 1, "num_validation_images": 1, "num_workers": 1, "num_threads": 1,
        "share": "resident", "device": "cpu", "epoch": 1, "metrics": {}, "seconds": 1.0,
        "cpu_seconds": 1.0, "gpu_seconds": 0.0, "versions": {},
    }  # fmt: skip
    return models.Card(**(values | changes))


def test_saved_network_predicts_as_it_did(tmp_path):
    """What is evaluated must be what was trained, batch-normalisation statistics included."""
    trained = models.build(card())
    trained(torch.rand(16, 8, 8), torch.zeros(16))  # moves the running statistics
    models.save(str(tmp_path), safetensors.torch.save(trained.state_dict()), card())
    image_BHW = torch.rand(4, 8, 8)

    loaded = models.load(str(tmp_path), "n-cnn")

    laid_out_alike = trained.eval().to(memory_format=torch.channels_last)  # or the last digit may differ
    assert torch.equal(loaded(image_BHW, torch.zeros(4)), laid_out_alike(image_BHW, torch.zeros(4)))


def test_a_run_without_a_network_or_with_the_other_one_is_refused(tmp_path):
    """Two run folders are easily swapped on a command line."""
    with pytest.raises(ValueError, match="holds no trained network; `raylens train n-cnn"):
        models.load(str(tmp_path), "n-cnn")
    models.save(str(tmp_path), b"", card())
    with pytest.raises(ValueError, match="holds an n-cnn, where an alpha-cnn is needed"):
        models.load(str(tmp_path), "alpha-cnn")


@pytest.mark.parametrize("weights", [b"", b"not safetensors", safetensors.torch.save({"other": torch.zeros(1)})])
def test_weights_that_are_not_the_cards_are_refused(tmp_path, weights):
    """A checkpoint is data from elsewhere; it fails with a line, not a traceback from within torch."""
    models.save(str(tmp_path), weights, card())

    with pytest.raises(ValueError, match="does not hold the weights"):
        models.load(str(tmp_path), "n-cnn")


def test_card_with_an_unknown_field_is_refused(tmp_path):
    """A model.json of another version must not be half understood."""
    models.save(str(tmp_path), b"", card())
    values = json.loads((tmp_path / "model.json").read_text()) | {"surprise": 1}
    (tmp_path / "model.json").write_text(json.dumps(values))

    with pytest.raises(ValueError, match="there is no surprise"):
        models.read_card(str(tmp_path), "n-cnn")


def test_a_card_from_before_a_setting_existed_is_read(tmp_path):
    """`training.precision` came later, and what was trained before was trained as its default says."""
    models.save(str(tmp_path), b"", card())
    values = json.loads((tmp_path / "model.json").read_text())
    del values["training"]["precision"]
    (tmp_path / "model.json").write_text(json.dumps(values))

    assert models.read_card(str(tmp_path), "n-cnn") == card()


FITTING = {"shape": (8, 8), "pixel_scale": 0.75, "normalised": True}


@pytest.mark.parametrize(
    "there",
    [{}, {"pixel_scale": None}, {"pixel_scale": 0.75 * (1 + 9e-4)}, {"normalised": False}, {"normalised": None}],
    ids=str,
)
def test_images_like_those_of_training_fit(there):
    """Rounded headers are not another scale; what is not normalised yet can be."""
    models.require_fit(card(), **(FITTING | there))


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({"shape": (8, 9)}, r"trained on images of 8 x 8 pixels, and these have 9 x 8; cut them"),
        ({"pixel_scale": 0.75 * (1 + 2e-3)}, r"trained on pixels of 0\.75 arcsec, and these have 0\.7515 .*0\.1%"),
        ({"pixel_scale": 0.2}, r"these have 0\.2 .*resample them"),
    ],
)
def test_images_of_another_size_or_scale_are_refused_with_the_reason(there, reason):
    """A network answers whatever it is shown; nobody would notice."""
    with pytest.raises(ValueError, match=reason):
        models.require_fit(card(), **(FITTING | there))


@pytest.mark.parametrize(("normalised", "reason"), [(True, "these have been"), (None, "in which units they are")])
def test_a_network_of_fluxes_takes_no_image_that_may_be_normalised(normalised, reason):
    """Its brightness is gone, and cannot be brought back."""
    with pytest.raises(ValueError, match=f"that were not normalised, and .*{reason}"):
        models.require_fit(card(normalised=False), **(FITTING | {"normalised": normalised}))
    models.require_fit(card(normalised=False), **(FITTING | {"normalised": False}))


@pytest.mark.parametrize("change", [{"num_pixels": 9}, {"pixel_scale": 0.7}, {"normalised": False}], ids=str)
def test_networks_of_different_images_do_not_go_together(change):
    """One of them would be shown what it does not know."""
    models.require_same_images(card(), card(network="alpha-cnn"))
    with pytest.raises(ValueError, match="the two networks were trained on different images: the n-cnn on 8 x 8"):
        models.require_same_images(card(), card(network="alpha-cnn", **change))
