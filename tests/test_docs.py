"""The documentation: the site builds without a warning and asks no other host for anything, says what there is to
say, and its commands are understood; the tutorial's are run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import local
import pytest
import ray
from typer.main import get_command

from raylens import cli, config, recipes, search

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
APP = get_command(cli.app)


# --- the site


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


def text_of(page: Path) -> str:
    """Return what a reader sees of a page, tags taken out."""
    return re.sub(r"<[^>]+>", "", page.read_text().split("<article", 1)[1].split("</article>", 1)[0])


def test_site_is_built_without_a_warning_from_every_page(site):
    """A warning is a link that leads nowhere, or a page that nobody finds."""
    sources = {path.relative_to(ROOT / "docs") for path in PAGES if path.is_relative_to(ROOT / "docs")}
    pages = {path.with_name("index.md" if path.name == "README.md" else path.name) for path in sources}

    missing = [page for page in pages if not (site / page.with_suffix(".html")).is_file()]
    assert not missing


def test_strict_build_refuses_stray_pages_dead_links_and_dead_anchors(tmp_path):
    """Otherwise a build that passes would say nothing about links."""
    for name in ("raylens", "jobs", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mkdocs.yml").unlink()
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.json"))
    (tmp_path / "docs/stray.md").write_text("# Stray\n\n[a page](nowhere.md) [a place](physics.md#nowhere)\n")

    built = build(tmp_path, tmp_path / "site")

    assert built.returncode != 0
    told = "\n".join(line for line in built.stderr.splitlines() if "WARNING" in line or "stray.md" in line)
    assert "nowhere.md" in told
    assert "#nowhere" in told
    assert "not included in the" in built.stderr  # "nav"


class Requests(HTMLParser):
    """What a browser fetches to show a page, without a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.components: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        fetched = ("src", "srcset", "data", "poster", "xlink:href") + (("href",) if tag in ("link", "use") else ())
        if not (tag == "link" and values.get("rel") in ("canonical", "prev", "next", "alternate")):
            self.found += [values[name] for name in fetched if name in values]
        self.found += styles(values.get("style", ""))
        self.components += [values.get("data-md-component", ""), *values.get("class", "").split()]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.found += styles(data)


def styles(text: str) -> list[str]:
    """Return the addresses that a style sheet fetches."""
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", text)


def test_built_site_asks_no_other_host_for_anything(site):
    """A reader's page views are nobody else's business, and the site has to work where there is no internet."""
    fetched = []
    for page in site.rglob("*.html"):
        parser = Requests()
        parser.feed(page.read_text())
        fetched += parser.found
        # For these the theme's script would ask unpkg.com and api.github.com.
        assert not {"mermaid", "source"} & set(parser.components), page
    for sheet in site.rglob("*.css"):
        fetched += styles(sheet.read_text())

    assert len(fetched) > 100
    assert [address for address in fetched if re.match(r"(?!data:)(\w+:)?//|https?:", address)] == []


def test_every_verb_and_option_is_in_the_reference(site):
    """What is not in the reference is found by nobody but its author."""
    said = text_of(site / "reference/cli.html")

    for name, verb in APP.commands.items():
        section = said.split(f"raylens {name} ", 1)[-1] if verb.params else said
        assert f"raylens {name}" in said
        for parameter in verb.params:
            for option in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or ""]:
                assert option in section, (name, option)
            assert (parameter.help or "").split(",")[0] in section, (name, parameter.name)
    assert "--quiet" in said
    assert "--debug" in said


def test_every_verb_is_shown_at_work():
    """A list of options does not tell what a verb is for."""
    shown = {words[1] for _, words in command_lines() if words[0] == "raylens"}

    assert shown >= set(APP.commands)


def test_every_configuration_key_is_in_the_reference_with_its_default(site):
    """A recipe can only be written by who knows the keys."""
    cells = re.findall(r"<tr>\s*<td>(.*?)</tr>", (site / "reference/configuration.html").read_text(), re.DOTALL)
    rows = [[re.sub(r"<[^>]+>", "", cell).strip() for cell in re.split(r"</td>\s*<td>", row)] for row in cells]
    told = {row[0]: row for row in rows}
    keys = [
        *config.keys(config.Simulation),
        *(key for key in config.keys(config.Network)),
        *(f"num_images.{key}" for key in config.keys(config.NumImages)),
        *config.Search.model_fields,
        "name",
    ]

    for key in keys:
        assert key in told, key
    assert told["lens.theta_E"][1:] == [
        "Einstein radius, intermediate-axis convention", "arcsec", "1.5", "a number or a distribution",
    ]  # fmt: skip
    assert told["camera.supersampling"][3:] == ["1", "a whole number, at least 1, at most 16"]
    assert "[16, 32, 64] (n_cnn)" in told["model.filters"][3]


def test_every_recipe_and_space_is_in_the_reference_with_its_digest(site):
    """Names of datasets carry digests, and a reader wants to know whose."""
    said = text_of(site / "reference/recipes.html")

    for name, recipe in recipes.RECIPES.items():
        assert name in said
        assert recipe().simulation.digest in said
    for name in search.SPACES:
        assert f"Space {name}" in said


def test_every_module_has_a_page_with_its_functions(site):
    """Made by reading the sources, so that it holds what they hold."""
    for path in (ROOT / "raylens").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "raylens").with_suffix("").parts)
        if not path.stem.startswith("_"):
            page = (site / f"reference/api/{name}.html").read_text()
            for function in re.findall(r"^def ([a-z]\w*)\(", path.read_text(), re.MULTILINE):
                assert f'id="raylens.{name}.{function}"' in page, (name, function)


def test_equations_are_drawn_without_a_script(site):
    """MathML needs neither a script nor a font from elsewhere."""
    page = (site / "physics.html").read_text()

    assert page.count("<math") > 50
    assert "arithmatex" not in page
    assert "\\frac" not in page
    assert "$" not in text_of(site / "physics.html")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_front_pages_lead_somewhere(name):
    """They are read on the repository's page, where mkdocs does not look."""
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", (ROOT / name).read_text())

    assert [target for target in targets if target and not (ROOT / target).exists()] == []


# --- the commands


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each fenced block."""
    yield from re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines() -> list[tuple[str, list[str]]]:
    """Return each line of a fenced block that calls us: the page, and its words."""
    found = []
    for page in PAGES:
        for language, block in fences(page):
            if language in ("", "bash", "console"):
                block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
                for line in block.splitlines():
                    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
                    scripts = [k for k, word in enumerate(words) if re.match(r"(jobs/\w+|cluster/local)\.py$", word)]
                    if words[:1] == ["raylens"] or scripts:
                        found.append((page.name, words[scripts[0] :] if scripts else words))
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """Return what the command line makes of its words, running nothing; typer's error if it understands them not."""
    first, *rest = words
    if first == "cluster/local.py":
        app, name = get_command(local.app), rest.pop(0)
    else:
        app, name = APP, Path(first).stem if first.startswith("jobs/") else rest.pop(0)
    rest = [word for word in rest if word not in ("--quiet", "--debug")]
    return app.commands[name].make_context(name, rest).params | {"verb": name}


@pytest.mark.parametrize(("page", "words"), [pytest.param(*one, id=" ".join(one[1])[:80]) for one in command_lines()])
def test_command_line_in_the_docs_is_understood(page, words):
    """A command that is copied must work; a renamed option must not stay behind in a page."""
    given = parsed(words)

    changes = dict(setting.split("=", 1) for setting in given.get("settings") or [])
    values = {key: json.loads(value) if re.match(r"[\d{\[\"]|true|false|null", value) else value
              for key, value in changes.items()}  # fmt: skip
    if given["verb"] == "simulate":
        config.Simulation().override(values)
        assert given["split"] in (None, *config.SPLITS)
    if given["verb"] == "train":
        config.Experiment().n_cnn.override(values)
        assert given["network"] in ("n-cnn", "alpha-cnn")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("raylens simulat smoke --to data", "simulat"),
        ("raylens simulate smoke", "to"),
        ("raylens verify data --fast", "--fast"),
        ("jobs/train.py n-cnn --to runs", "data"),
        ("cluster/local.py up --nodes 2", "--nodes"),
    ],
)
def test_a_command_line_that_is_wrong_is_noticed(line, wrong):
    """Otherwise the test above would hold of any page."""
    with pytest.raises(Exception, match=wrong):
        parsed(shlex.split(line))


def test_words_in_the_text_name_verbs_and_options_that_exist():
    """Commands are also told in passing, `raylens verb --option`, and age there unseen."""
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for words in (found.split() for found in re.findall(r"`raylens ([a-z][^`]*)`", prose)):
            assert words[0] in APP.commands, (page.name, words)
            known = {option for parameter in APP.commands[words[0]].params for option in parameter.opts}
            options = {word for word in words if word.startswith("--")} - {"--quiet", "--debug", "--help"}
            assert options <= known, (page.name, words)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/how-to").glob("*.md")), ids=lambda page: page.stem)
def test_files_in_a_how_to_are_recipes_or_spaces(page, tmp_path):
    """They are copied as a start."""
    for name, content in re.findall(
        r"cat > (\w+\.toml) <<'END'\n(.*?)^END$", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        file = tmp_path / name
        file.write_text(content)
        loaded = (search if "[values]" in content else recipes).load(str(file))

        assert loaded.name == file.stem


def test_own_skies_are_rendered_as_the_how_to_says(tmp_path, monkeypatch):
    """It is the way out where no distribution says what one wants."""
    monkeypatch.chdir(tmp_path)
    [code] = [block for language, block in fences(ROOT / "docs/how-to/own-priors.md") if language == "python"]
    made: dict[str, Any] = {}

    exec(compile(code, "own-priors.md", "exec"), made)

    assert made["images"].shape == (64, 60, 60)
    assert not (made["images"] == made["render_block"](made["draws"])).all()
    assert (tmp_path / "aligned.npy").exists()


# --- the tutorial


def tutorial() -> list[tuple[str, str, str]]:
    """Return the tutorial's commands, one block after the other, each with the language and text of what follows."""
    blocks = [*fences(ROOT / "docs/tutorial.md"), ("", "")]
    steps = []
    for (language, block), after in itertools.pairwise(blocks):
        if language == "bash" and "make setup" not in block:
            # What a training prints stands before its last line.
            told = next((one for one in blocks[blocks.index((language, block)) + 1 :] if one[0] != "text"), after)
            steps.append((block, *(told if told[0] == "json" else after)))
    return steps


@pytest.fixture(scope="module")
def walked(tmp_path_factory, ray_cluster) -> tuple[Path, list[str]]:
    """A folder in which the tutorial's commands have been run, in order and in one shell, and what each block said.

    By the Ray of these tests: a reader's commands start one each, which takes longer than all else.
    """
    folder = tmp_path_factory.mktemp("tutorial")
    steps = [f"{{\n{block}\n}} > {folder}/{number}.out" for number, (block, *_) in enumerate(tutorial())]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e"],
        input="\n".join(steps),
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert done.returncode == 0, done.stderr
    return folder, [(folder / f"{number}.out").read_text() for number in range(len(steps))]


def test_tutorial_says_what_its_commands_say(walked):
    """A reader compares each line with the page; where they differ the tutorial has lost them."""
    num_told = 0
    for (_, language, told), said in zip(tutorial(), walked[1], strict=True):
        if language == "json":
            num_told += 1
            promised, facts = json.loads(told), json.loads(said.splitlines()[-1])
            assert promised.keys() == facts.keys()
            for key, value in promised.items():
                if isinstance(value, str) and value.startswith("..."):
                    assert facts[key].endswith(value.removeprefix("...")), key
                elif isinstance(value, (bool, list)) or (isinstance(value, int) and key.startswith("num_")):
                    assert facts[key] == value, key
            for name, value in promised.get("metrics", {}).items():
                assert facts["metrics"][name] == pytest.approx(value, rel=0.3), name

    assert num_told >= 9


def test_tutorial_leaves_what_it_shows(walked):
    """The files that it lists, and the picture that it draws."""
    folder = walked[0] / "first-lenses"
    listed = [(told, said) for (block, _, told), said in zip(tutorial(), walked[1], strict=True) if block[:3] == "ls "]

    assert len(listed) == 2
    assert all(told == said for told, said in listed)
    assert (folder / "some.png").stat().st_size > 10_000
    assert "<html" in (folder / "report.html").read_text()
    assert walked[1][-1].count("\n") == 9  # a head and eight images
