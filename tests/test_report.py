"""The page of a report: whether what it says is what results.json and the paper say, and what it may hold.

`results_example.json` is a run of `raylens evaluate` on the recipe smoke, with fewer bins and subhaloes
and rounded costs; `test_evaluate.py` sees to it that it has the shape of what is written today.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import Page, shown

from raylens import figures, recipes
from raylens.report import report

EXAMPLE = json.loads(Path(__file__).with_name("results_example.json").read_text())
PAPER = json.loads((Path(figures.__file__).parent / "paper_tables.json").read_text())["tables"]
ROWS = [-1.6, -1.8, -2.0, -2.2, -2.4, None]


pytestmark = pytest.mark.usefixtures("undrawn")


def example(simulation=None, **changes):
    """The example, as if it were of another simulation or had other things at its top."""
    results = copy.deepcopy(EXAMPLE)
    return results | ({"simulation": simulation.as_dict()} if simulation else {}) | changes


TITLES = {"n_cnn": "N‑CNN", "alpha_cnn": "α‑CNN, given the predicted N", "alpha_cnn_true_n": "α‑CNN, given the true N"}
CASES = [
    (recipes.paper_fixed, "table_1", "Figure 5", None),
    (recipes.paper_fixed_coarse, "table_2", "Figure 6", None),
    (recipes.paper_varied, "table_3", "Figure 7", "table_4"),
]


@pytest.mark.parametrize(("recipe", "key", "figure", "key_true_n"), CASES)
def test_tables_hold_the_results_the_papers_numbers_and_their_ratio(recipe, key, figure, key_true_n):
    """A number that changes between the file and the page, or beside the wrong table, is worse than none."""
    results = example(recipe().simulation)
    keys = {"n_cnn": key, "alpha_cnn": key, "alpha_cnn_true_n": key_true_n}
    page = report([results])
    tables = Page(page)

    assert f"<b>{figure}.</b>" in page
    assert ("<b>Figure 8.</b>" in page) == (key_true_n is not None)
    for name, title in TITLES.items():
        rows = tables.table(title)
        assert [row[0][0] for row in rows] == ["−1.6", "−1.8", "−2.0", "−2.2", "−2.4", "Varied"]
        for row, alpha in zip(rows, ROWS, strict=True):
            entry = next(entry for entry in results["datasets"] if entry["alpha"] == alpha)
            assert shown(row[1]) == entry["num_images"]
            cells = iter(row[2:])
            for measure in ("gradient", "sigma", "rmse"):
                ours = next(cells)
                assert ours[1] == entry[name][measure]
                if ours[1] is not None:
                    last_digit = 0.1 if name == "n_cnn" and measure != "gradient" else 0.001
                    assert shown(ours) == pytest.approx(ours[1], abs=0.501 * last_digit)
                if keys[name]:
                    theirs, ratio = next(cells), next(cells)
                    papers = next(row for row in PAPER[keys[name]]["rows"] if row["alpha"] == (alpha or "varied"))
                    number = papers["alpha_cnn" if name == "alpha_cnn_true_n" else name][measure]
                    assert theirs[1] == shown(theirs) == number
                    assert ratio[1] == (None if number is None else pytest.approx(ours[1] / number))
            assert next(cells)[1] == entry[name]["relative_rmse"]
            assert next(cells)[1] == entry[name]["bias"]
            baselines = [key for key in entry["baselines"] if key.startswith("n_") == (name == "n_cnn")]
            assert [cell[1] for cell in cells] == [entry["baselines"][key]["rmse"] for key in baselines]


@pytest.mark.parametrize(
    "changes",
    [{"camera.num_pixels": 48}, {"camera.pixel_scale": 0.2}, {"lens.q": {"uniform": [0.5, 0.9]}}],
    ids=["pixels", "scale", "only q varies"],
)
def test_results_that_no_table_fits_stand_alone(changes):
    """A ratio to another experiment's number would look like a result."""
    page = report([example(recipes.paper_fixed().override(changes).simulation)])

    assert "No table of the paper has this geometry and these pixels" in page
    assert "As figure 5" in page
    assert ">ratio<" not in page


def test_test_set_of_another_simulation_has_no_numbers_of_the_paper():
    """`raylens evaluate` takes any datasets; only those like the first are the paper's experiment."""
    results = example()
    results["datasets"][0]["digest"] = "0badc0de"

    varied = Page(report([results])).table("N‑CNN")[-1]

    assert varied[0][0] == "Varied (simulation 0badc0de)"
    assert shown(varied[3]) is None


def test_page_says_in_what_it_is_not_the_papers_experiment():
    """A fifth of the images and one epoch in a hundred are a difference that a ratio does not show."""
    page = report([example()])

    assert "<code>num_images.train</code> 20,000 (paper 100,000)" in page
    assert page.count("<code>training.batch_size</code> 32 (paper 16)") == 1
    assert "<code>subhalos" not in page.split("<h3>Results</h3>")[0]


def test_page_is_self_contained(drawn):
    """It is mailed, archived and printed; it must look the same in ten years, and tell nobody that it was read."""
    page = report([example(), example(recipes.coded_varied().simulation)])
    parsed = Page(page)

    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not re.search(r"https?:|@import|url\(", page)
    assert all(address.startswith(("#", "data:image/svg+xml;base64,")) for address in parsed.loaded)
    assert len(parsed.alts) == 2 * 7
    assert all(parsed.alts)
    assert len(page) < 3_000_000


def test_text_from_files_is_escaped():
    """A results.json may come from a stranger, and the page is opened in a browser."""
    hostile = "<script>alert('&\"')</script>"
    results = example(recipe=hostile, digest=hostile, versions={hostile: hostile}, machine={"processor": hostile})
    results["stages"] = [{"stage": hostile, "seconds": 1.0}]
    results["experiment"] = {"name": hostile}
    for card in (results["n_cnn"], results["alpha_cnn"]):
        card |= {"run": hostile, "device": hostile, "dataset_digest": hostile, "epoch": hostile}
        card["training"]["optimizer"] = hostile
    for entry in results["datasets"]:
        entry |= {"split": hostile, "dataset": hostile, "digest": hostile}
    results["simulation"]["engine"] = hostile
    results["simulation"][hostile] = hostile
    results["n_cnn"]["history"] = []  # its curve would be drawn at an epoch

    page = report([results, results])

    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;") > 20


@pytest.mark.parametrize(
    ("results", "lacking"),
    [
        ([], "recipe"),
        ({"trials": []}, "recipe"),
        ({name: value for name, value in EXAMPLE.items() if name != "simulation"}, "simulation.camera.num_pixels"),
        (EXAMPLE | {"datasets": []}, "datasets"),
        (EXAMPLE | {"datasets": [{"split": "test"}]}, "alpha"),
    ],
)
def test_what_is_no_results_file_is_refused_in_one_line(results, lacking):
    """`raylens report campaign.json` is an easy slip."""
    with pytest.raises(ValueError, match=r"^this is not a results.json of `raylens evaluate`: .*\.$") as refusal:
        report([results])

    assert lacking in str(refusal.value)


def test_what_is_optional_may_be_absent_and_is_told_when_there():
    """`raylens evaluate` alone knows no stages and no machine, and a dataset may hold no illustration."""
    machine = {"num_nodes": 1, "num_cpus": 2, "num_gpus": 0, "processor": "AMD EPYC 7B13"}
    stages = [{"stage": "simulate train", "seconds": 7500.0, "cpu_seconds": 90.0, "images_per_second": 1234.5}]

    without = report([example(illustration=None)])
    told = report([example(stages=stages, machine=machine)])

    assert "Machine" not in without
    assert "figures 2 and 3 are not drawn" in without
    assert "Machine: 1 node, 2 CPU cores, 0 GPUs, AMD EPYC 7B13." in told
    assert "<td>2 h 05 min</td><td>90.0 s</td><td>1,234</td>" in told


def test_an_evaluation_alone_says_what_runs_and_predictions_cost():
    """`raylens reproduce` is not the only way; a table of dashes would tell nothing."""
    results = example()

    cost = report([results]).split("<h3>Cost</h3>")[1].split("</table>")[0]

    for stage, facts in (
        ("train n-cnn", results["n_cnn"]),
        ("train alpha-cnn", results["alpha_cnn"]),
        ("evaluate", results["cost"]),
    ):
        rate = facts.get("metrics", facts)["images_per_second"]
        cells = f"<td>{facts['seconds']:.1f} s</td><td>{facts['cpu_seconds']:.1f} s</td><td>{rate:,.0f}</td>"
        assert f'<th scope="row">{stage}</th>{cells}' in cost
    assert "–" not in cost


def test_where_alpha_is_held_there_is_no_best_gradient_of_it():
    """One minus RMSE over a variance that is a rounding error would be a number of sixteen digits."""
    held = [entry for entry in EXAMPLE["datasets"] if entry["alpha"] == -2.4]

    page = report([example(datasets=held)])

    assert re.search(r"with our RMSE it would be <data[^>]+>[−.\d]+</data> for N\.", page)


@pytest.mark.parametrize(("drawable", "told"), [([-1.6, -1.8], "at α = −1.6. Top"), ([-1.8], "so it is not drawn")])
def test_figure_2_shows_the_slopes_that_could_be_drawn(drawn, drawable, told):
    """A mass function may be an experiment at one slope and too much for a computer at another."""
    illustration = copy.deepcopy(EXAMPLE["illustration"])
    like = illustration["populations"][0]
    illustration["populations"] = [like | {"alpha": alpha} for alpha in drawable]

    assert told in report([example(illustration=illustration)])


def test_page_says_where_our_errors_are_larger():
    """A table of forty ratios hides the three that tell against us."""
    results = example()
    for entry in results["datasets"]:
        entry["n_cnn"]["sigma"] = 1e3 if entry["alpha"] in (None, -2.4) else 0.1
        entry["n_cnn"]["rmse"] = 0.1

    page = report([results])

    worse = re.search(r"Errors larger than in the paper’s table 1, with the ratio: (.*?)</p>", page)[1]
    told = re.sub(r"<[^>]*>", "", worse)
    assert told == f"σ at α = −2.4 ({1e3 / 48.3:.2f}), Varied ({1e3 / 48.8:.2f})."
    assert "Errors larger than in the paper’s table 1, with the ratio: none." in report([example()])


def test_several_results_begin_with_an_overview():
    """That one page may hold the whole paper: a row for each experiment, beside its own table's numbers."""
    several = [example(recipes.paper_fixed().simulation), example(recipes.paper_varied().simulation)]

    rows = Page(report(several)).table("At a glance")

    assert [[cell[1] for cell in row[2::2]] for row in rows] == [[0.993, 49.0, 0.658, 0.294], [0.383, 155, 0.123, 0.38]]


def test_same_results_make_the_same_page(drawn):
    """So that a report can be compared with an older one, and a rerun changes nothing."""
    assert report([example()]) == report([example()])


def test_a_report_needs_neither_ray_nor_physics():
    """It is made wherever a results.json is read, and starts no cluster."""
    command = (
        "import sys, raylens.report;print(sorted(m for m in sys.modules if m == 'ray' or m.startswith('raylens.p')))"
    )

    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "['raylens.page', 'raylens.paper']"
