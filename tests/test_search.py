"""Search spaces: the paper's values, what is left out of them and why, and the order in which they are tried."""

import itertools
import json
from datetime import date

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylens import models, search
from raylens.config import Network, Search

PAPER = {
    "optimizer": {"adam", "nadam"},
    "learning_rate": {1e-4, 1e-3, 1e-2},
    "batch_size": {8, 16, 32},
    "num_layers": {1, 2, 3, 4, 5, 6},
    "kernel_size": {3, 5, 7, 9, 11},
    "filters": {8, 16, 32, 64, 128},
}
UNSCALED = models.Scaling(offset=0.0, scale=1.0)


def small(**values: list) -> Search:
    return Search.parse({"name": "small", "network": "n-cnn", "epochs": [1, 4], "values": values})


def layers(**values: list) -> Search:
    return small(**{"num_layers": [1, 2], "filters": [4, 8], "growth": [1, 2], **values})


@pytest.mark.parametrize("name", ["paper-n-cnn", "paper-alpha-cnn"])
def test_the_papers_spaces_hold_exactly_its_values(name):
    """Section 2.2; that filters grow is read off its final choice."""
    space = search.load(name)

    assert {key: set(values) for key, values in space.values.items() if key != "growth"} == PAPER
    assert space.epochs == (10, 100)
    assert name == f"paper-{space.network}"


@pytest.mark.parametrize("name", ["paper-n-cnn", "paper-alpha-cnn"])
@pytest.mark.parametrize("num_pixels", [30, 60])
def test_the_papers_choice_is_in_its_space(name, num_pixels):
    """Where it ranks is what a campaign is asked."""
    space = search.load(name)
    base = search.base_network(space)
    possible, _ = search.configurations(space, base, num_pixels=num_pixels)

    chosen = search.configuration_of(space, base, possible)

    assert search.network_of(space, base, chosen) == base.override({"training.num_epochs": 100})


@pytest.mark.parametrize(("num_pixels", "most"), [(30, 4), (60, 5), (64, 6)])
def test_layers_that_pool_the_image_away_are_left_out_with_the_reason(num_pixels, most):
    """The paper names up to six layers, which its own images do not allow."""
    space = search.load("paper-n-cnn")
    possible, left_out = search.configurations(space, search.base_network(space), num_pixels=num_pixels)

    assert max(configuration["num_layers"] for configuration in possible) == most
    pooled = {reason for reason in left_out if "pool" in reason}
    assert pooled == {f"{k} layers pool images of {num_pixels} pixels away" for k in range(most + 1, 7)}
    assert len(possible) + sum(left_out.values()) == np.prod([len(values) for values in space.values.values()])


def test_no_two_configurations_are_one_network():
    """Or a campaign would try it twice."""
    space = search.load("paper-n-cnn")
    base = search.base_network(space)
    possible, _ = search.configurations(space, base, num_pixels=60)

    networks = {search.network_of(space, base, one).model_dump_json() for one in possible}

    assert len(networks) == len(possible)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_possible_can_be_built(data):
    """What cannot be must be told before the campaign begins, not by its trials."""
    space = search.load("paper-alpha-cnn")
    base = search.base_network(space)
    num_pixels = data.draw(st.sampled_from([8, 30, 60]))
    possible, _ = search.configurations(space, base, num_pixels=num_pixels)
    network = search.network_of(space, base, data.draw(st.sampled_from(possible)))

    with torch.device("meta"):
        built = models.CNN("alpha-cnn", network.model, num_pixels=num_pixels, target=UNSCALED, num_subhalos=UNSCALED)

    assert max(network.model.filters) <= 128
    assert models.num_parameters(built) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": [1e-3]}, "there is no hyper-parameter learning_rat; did you mean learning_rate?"),
        ({"seed": [1, 2]}, "there is no hyper-parameter seed"),
        ({"learning_rate": ["fast"]}, "learning_rate"),
        ({"kernel_size": [4]}, "kernel_size must be odd"),
        ({"batch_size": [16, 16]}, "batch_size names a value twice"),
        ({"batch_size": []}, "values.batch_size"),
        ({"batch_size": [date(2026, 1, 1)]}, "batch_size"),  # TOML has such values
        ({}, "values"),
        ({"num_layers": [1], "filters": [8]}, "growth has none"),
        ({"num_layers": [1.5], "filters": [8], "growth": [1]}, "num_layers is a whole number of 1 or more; got 1.5"),
        ({"num_layers": [9], "filters": [8], "growth": [1]}, "9 layers pool images of 30 pixels away"),
        ({"num_layers": [2], "filters": [8], "growth": [2]}, "more than 8 filters"),
    ],
)
def test_a_space_with_what_cannot_be_is_refused_in_one_line(values, message):
    """Each of these would otherwise fail in every trial."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below, as it is written
        _configurations(values)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _configurations(values: dict) -> list:
    space = small(**values)
    return search.configurations(space, search.base_network(space), num_pixels=30)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "validation_sigma"}, "metric"),
        ({"epochs": [4, 1]}, "least <= most"),
        ({"epoch": [1, 4]}, "there is no epoch"),
        ({"network": "beta-cnn"}, "network"),
        ({"values": [1]}, "values"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        Search.parse({**layers().as_dict(), **changes})

    assert "\n" not in str(caught.value)


def test_a_file_changes_the_space_that_it_names(tmp_path):
    """That is how one of one's own is begun."""
    file = tmp_path / "mine.toml"
    file.write_text('base = "paper-n-cnn"\nname = "mine"\n[values]\nlearning_rate = [1e-3, 1e-2]\n')

    mine = search.load(str(file))

    assert mine == search.load("paper-n-cnn").override({"name": "mine", "values": {"learning_rate": [1e-3, 1e-2]}})


@pytest.mark.parametrize("base", ["paper-n-cn", 5, "other.toml", ["smoke"]])
def test_a_base_that_is_no_named_space_is_refused(tmp_path, base):
    file = tmp_path / "mine.toml"
    file.write_text(f"base = {json.dumps(base)}\nname = 'mine'\n")

    with pytest.raises(ValueError, match="base must be one of smoke, paper-n-cnn, paper-alpha-cnn; got "):
        search.load(str(file))


def test_what_print_space_prints_is_a_file_of_the_same_space(main, tmp_path):
    ran = main("tune", "paper-alpha-cnn", "--print-space")
    file = tmp_path / "space.json"
    file.write_text(ran.stdout)

    assert ran.returncode == 0
    assert search.load(str(file)) == search.load("paper-alpha-cnn")


def test_the_grid_is_in_the_order_of_the_values_and_the_others_in_that_of_the_seed():
    """A campaign that is begun again elsewhere tries the same."""
    space = layers()
    base = search.base_network(space)
    possible, _ = search.configurations(space, base, num_pixels=12)

    def sequence(searcher: str, seed: int) -> list:
        proposals = search.proposals(searcher, space.override({"seed": seed}), possible, possible[2])
        return list(iter(proposals.next, None))

    assert sequence("grid", 1) == possible
    for searcher in ("random", "optuna"):
        assert sequence(searcher, 1)[0] == possible[2]
        assert sequence(searcher, 1) == sequence(searcher, 1)
        assert sequence(searcher, 1) != sequence(searcher, 2)
        assert sorted(map(json.dumps, sequence(searcher, 1))) == sorted(map(json.dumps, possible))


@pytest.mark.parametrize("searcher", ["grid", "random", "optuna"])
def test_what_was_tried_or_is_being_tried_is_not_proposed(searcher):
    """A campaign that goes on repeats nothing."""
    space = layers(learning_rate=[1e-4, 1e-3, 1e-2])
    possible, _ = search.configurations(space, search.base_network(space), num_pixels=12)
    proposals = search.proposals(searcher, space, possible, None)
    proposals.tell(possible[0], [3.0, 2.0], "completed")
    proposals.tell(possible[1], [], "failed")
    proposals.leave(possible[2])

    left = list(iter(proposals.next, None))

    assert sorted(map(json.dumps, left)) == sorted(map(json.dumps, possible[3:]))


def test_optuna_learns_from_what_it_is_told():
    """It finds the best of a thousand sooner than chance would."""
    names = ("learning_rate", "batch_size", "kernel_size", "dropout")
    values = ([10.0**-k for k in range(1, 7)], list(range(4, 24, 4)), [1, 3, 5, 7, 9, 11], [0.0, 0.1, 0.2, 0.3, 0.4])
    space = small(**dict(zip(names, values, strict=True)))
    possible, _ = search.configurations(space, search.base_network(space), num_pixels=30)

    def loss(configuration: dict) -> float:
        return sum(abs(options.index(configuration[name]) - 2) for name, options in zip(names, values, strict=True))

    found = []
    for seed in range(5):
        proposals = search.proposals("optuna", space.override({"seed": seed}), possible, None)
        best = float("inf")
        for _ in itertools.repeat(None, 60):
            configuration = proposals.next()
            assert configuration is not None
            best = min(best, loss(configuration))
            proposals.tell(configuration, [loss(configuration)], "completed")
        found.append(best)

    by_chance = np.mean(
        [min(loss(possible[k]) for k in np.random.default_rng(s).permutation(900)[:60]) for s in range(200)]
    )
    assert np.mean(found) < by_chance


def test_what_is_searched_is_spelled_out_with_the_layers_as_their_filters():
    """Nobody should have to work out what 3 layers, filters 16 and growth 2 are."""
    space = layers(optimizer=["adam"], kernel_size=[3, 5])
    configuration = {"num_layers": 2, "filters": 4, "growth": 2, "optimizer": "adam", "kernel_size": 3}

    assert search.spelled_out(space, configuration) == {"kernel_size": 3, "filters": "4-8"}
    assert search.spelled_out(small(kernel_size=[3, 5]), {"kernel_size": 5}) == {"kernel_size": 5}


def test_what_is_no_configuration_of_the_space_is_not_taken_for_one():
    """A rank must be that of the recipe's own network; and a single layer has any growth."""
    space = layers(filters=[8, 16], growth=[2])
    base = search.base_network(space)
    possible, _ = search.configurations(space, base, num_pixels=30)
    of = {filters: base.override({"model.filters": filters}) for filters in [(8,), (8, 16), (8, 12), (8, 16, 32)]}

    found = {filters: search.configuration_of(space, network, possible) for filters, network in of.items()}

    assert found == {
        (8,): {"num_layers": 1, "filters": 8, "growth": 2},
        (8, 16): {"num_layers": 2, "filters": 8, "growth": 2},
        (8, 12): None,
        (8, 16, 32): None,
    }


def test_a_network_is_what_its_recipe_says_but_for_what_is_searched():
    """A campaign on dropout alone leaves the layers as they are."""
    space = small(dropout=[0.0, 0.5])
    base = search.base_network(space)

    network = search.network_of(space, base, {"dropout": 0.5})

    assert network == Network.parse(base.as_dict()).override({"model.dropout": 0.5, "training.num_epochs": 4})
