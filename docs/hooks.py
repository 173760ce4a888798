"""What mkdocs makes of the sources while it builds the site: the reference, the decisions' list, the equations.

Nothing here is kept in the repository, so nothing can go stale: verbs and options come from the command line's
own definition, keys from the configuration types and the comments beside them, recipes from their functions,
and each module has a page that mkdocstrings fills from its docstrings without importing it.
"""

from __future__ import annotations

import ast
import html
import io
import json
import re
import tokenize
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from typer.main import get_command

from raylens import cli, config, recipes, search

ROOT = Path(__file__).parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are many, modules and decisions, in their places in the navigation."""
    for section in config.nav:
        if isinstance(section, dict):
            [(_, entries)] = section.items()
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and "API" in entry:
                    entry["API"] = [{name: f"reference/api/{name}.md"} for name in modules()]
                if isinstance(entry, dict) and "Decisions" in entry:
                    entry["Decisions"] = ["decisions/index.md", *(f"decisions/{path.name}" for path in decisions())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {
        "reference/cli.md": command_line(),
        "reference/configuration.md": configuration(),
        "reference/recipes.md": list_of_recipes(),
        "decisions/index.md": list_of_decisions(),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
        **{f"reference/api/{name}.md": f"# {name}\n\n::: raylens.{name}\n" for name in modules()},
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    # Beside README.md, which becomes index.html, the page of results needs another name.
    page = File("results/index.html", config.docs_dir, config.site_dir, config.use_directory_urls)
    page.dest_uri, page.inclusion = "results/report.html", InclusionLevel.INCLUDED
    files.append(page)
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers draw without a script."""
    inline = r'<span class="arithmatex">\\\((.*?)\\\)</span>'
    block = r'<div class="arithmatex">\\\[(.*?)\\\]</div>'
    content = re.sub(inline, lambda found: _mathml(found[1], "inline"), content, flags=re.DOTALL)
    return re.sub(
        block, lambda found: f'<div class="equation">{_mathml(found[1], "block")}</div>', content, flags=re.DOTALL
    )


def _mathml(latex: str, display: str) -> str:
    return latex2mathml.converter.convert(html.unescape(latex).strip(), display=display)


def modules() -> list[str]:
    """Return the names of raylens' modules, below raylens."""
    paths = [path.relative_to(ROOT / "raylens") for path in sorted((ROOT / "raylens").rglob("*.py"))]
    return [".".join(path.with_suffix("").parts) for path in paths if not path.stem.startswith("_")]


def decisions() -> list[Path]:
    return sorted((ROOT / "docs/decisions").glob("0*.md"))


def list_of_decisions() -> str:
    lines = [f"* [{path.read_text().splitlines()[0].removeprefix('# ')}]({path.name})" for path in decisions()]
    return "\n".join(["# Decisions", "", "Half a page for each decision that a reader would question.", "", *lines, ""])


def from_root(name: str) -> str:
    """Return a page that stands beside the README, with its links as they are from within docs/."""
    return (ROOT / name).read_text().replace("](docs/", "](")


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "&#124;") or " " for cell in row) + " |" for row in cells]
    return "\n".join(['<div class="keys" markdown>', "", *lines, "", "</div>"])


def code(value: Any) -> str:
    """Return a value as it is written in a recipe file or after --set."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


# --- the command line


def command_line() -> str:
    app = get_command(cli.app)
    parts = [
        "# Command line",
        "`raylens VERB ...`, also `python -m raylens VERB ...`.",
        _paragraphs(cli.__doc__ or "").split("\n\n", 1)[1],
        app.epilog or "",
        table(
            ["verb", ""], [[f"[`{name}`](#raylens-{name})", _first(verb.help)] for name, verb in app.commands.items()]
        ),
        table(["option of `raylens` itself", ""], [row[:2] for row in _options(app)]),
    ]
    for name, verb in app.commands.items():
        arguments = [one for one in verb.params if one.param_type_name == "argument"]
        options = [one for one in verb.params if one.param_type_name == "option"]
        words = [_usage(one) if one.required else f"[{_usage(one)}]" for one in arguments]
        words += [_usage(one) for one in options if one.required]
        words += ["[OPTIONS]"] if not all(one.required for one in options) else []
        parts += [
            f"## raylens {name}",
            _paragraphs(verb.help or ""),
            f"```text\nraylens {' '.join([name, *words])}\n```",
        ]
        if arguments:
            parts.append(table(["argument", ""], [[code(_usage(one)), one.help or ""] for one in arguments]))
        if options:
            parts.append(table(["option", "", "default"], _options(verb)))
    parts += ["## Jobs", "For `ray job submit`, each with the arguments of the verb of its name."]
    parts.append(table(["script", ""], [[f"`jobs/{path.name}`", _first(_docstring(path))] for path in _jobs()]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(parameter: Any) -> str:
    """Return a parameter as a command line shows it: RECIPE, --set KEY=VALUE."""
    word = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "argument":
        return f"{word}{' ...' if parameter.multiple or parameter.nargs == -1 else ''}"
    return parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {word}"


def _options(command: Any) -> list[list[str]]:
    """Return a row for each option, those that must be given first."""
    options = sorted(
        (one for one in command.params if one.param_type_name == "option"), key=lambda one: not one.required
    )
    return [[code(_usage(one)), one.help or "", _default(one)] for one in options]


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return code(str(option.default)) if option.default not in (None, False) else ""


def _paragraphs(text: str) -> str:
    return html.escape(ast.get_docstring(ast.parse(f'"""{text}"""')) or "", quote=False)


def _jobs() -> list[Path]:
    return sorted((ROOT / "jobs").glob("*.py"))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _first(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


# --- the configuration


def configuration() -> str:
    simulation, network = config.Simulation(), config.Experiment()
    parts = [
        "# Configuration",
        "A recipe is an Experiment: a Simulation, the numbers of images, and two networks. "
        "`raylens show RECIPE` prints one in full; a recipe file says what differs from its `base`; `--set KEY=VALUE` "
        "changes one value for one command. "
        "An unknown key, a wrong type and what cannot work are refused, with what would work.",
        table(
            ["keys of", "in a recipe file below", "for `--set` of"],
            [
                ["[Simulation](#simulation)", "`simulation`", "`simulate`, `show`"],
                ["[Model](#model), [Training](#training)", "`n_cnn`, `alpha_cnn`", "`train`; `show` changes both"],
                ["[Experiment](#experiment), [NumImages](#numimages)", "the top, `num_images`", "`show`"],
                ["[Search](#search)", "a file of its own, for `raylens tune`", ""],
            ],
        ),
        "## Distribution",
        "A quantity that varies from image to image is one of these; a plain number fixes it.",
        table(
            ["", "meaning"],
            [
                ['`{"uniform": [low, high]}`', _class_docstring("Uniform")],
                ['`{"normal": [mean, sd, low, high]}`', _class_docstring("Normal")],
            ],
        ),
        "## Simulation",
        f"{_class_docstring('Simulation')} Its digest stands in the dataset's name.",
        _fields(config.Simulation, "", simulation),
    ]
    for name, field in config.Simulation.model_fields.items():
        if _is_group(field.annotation):
            parts += [f"### {name}", _class_docstring(field.annotation.__name__)]
            parts.append(_fields(field.annotation, f"{name}.", getattr(simulation, name)))
    for group in ("model", "training"):
        kind = config.Network.model_fields[group].annotation
        defaults = {name: getattr(getattr(network, name), group) for name in ("n_cnn", "alpha_cnn")}
        parts += [f"## {kind.__name__}", _class_docstring(kind.__name__), _fields(kind, f"{group}.", **defaults)]
    parts += ["## Experiment", _class_docstring("Experiment"), _fields(config.Experiment, "", network)]
    parts += ["## NumImages", _class_docstring("NumImages")]
    parts.append(_fields(config.NumImages, "num_images.", network.num_images))
    parts += ["## Search", _class_docstring("Search"), _fields(config.Search, "")]
    parts.append(f"The hyper-parameters: {', '.join(map(code, [*config.SEARCHED_FIELDS, *config.LAYERS]))}.")
    return "\n\n".join(parts) + "\n"


def _fields(kind: type[config.Settings], prefix: str, default: Any = None, **defaults: Any) -> str:
    """Return a table of the values in a kind of settings, groups of values left out."""
    said, schema = comments(kind.__name__), kind.model_json_schema()
    rows = []
    for name, field in kind.model_fields.items():
        if _is_group(field.annotation):
            continue
        meaning, unit = said.get(name, ("", ""))
        named = {
            which: _plain(getattr(values, name)) for which, values in (defaults or {"": default}).items() if values
        }
        told = [f"{code(value)}{f' ({which})' if len(set(map(str, named.values()))) > 1 else ''}"
                for which, value in named.items()]  # fmt: skip
        must = _must_be(schema["properties"][name], schema)
        rows.append(
            [
                f"`{prefix}{name}`",
                html.escape(meaning, quote=False),
                unit,
                "<br>".join(dict.fromkeys(told)) or "required",
                must,
            ]
        )
    return table(["key", "meaning", "unit", "default", "must be"], rows)


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, config.Settings) else value


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, config.Settings)


def _must_be(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return what a JSON schema allows, in words."""
    if "enum" in schema:
        return " or ".join(map(code, schema["enum"]))
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and any("$ref" in choice for choice in choices):
        return "a number or a [distribution](#distribution)"
    if choices:
        return " or ".join(_must_be(choice, whole) for choice in choices)
    kind = {"integer": "a whole number", "number": "a number", "string": "a name", "boolean": "`true` or `false`"}
    if schema["type"] == "array":
        parts = schema.get("prefixItems")
        return (
            f"a list of {len(parts)}: each {_must_be(parts[0], whole)}"
            if parts
            else f"a list: each {_must_be(schema['items'], whole)}"
        )
    if schema["type"] == "object":
        return "a table of lists"
    if schema["type"] == "null":
        return "`null`"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {_limit(schema[key])}" for key, word in limits.items() if key in schema]
    if "pattern" in schema:
        bounds.append(f"like `{schema['pattern']}`")
    return f"{kind[schema['type']]}{', ' if bounds else ''}{', '.join(bounds)}"


def _limit(number: float) -> str:
    return "2^63" if number == 2**63 else f"{number:g}"


def comments(kind: str) -> dict[str, tuple[str, str]]:
    """Return what the comments at the fields of a type say: the meaning and the unit of each.

    A comment stands on the field's own lines, or on lines of its own above; one that is a unit and no more
    goes with the words of the field before.
    """
    source = (ROOT / "raylens/config.py").read_text()
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[: token.start[1]].strip()
            (alone if own_line else beside)[token.start[0]] = token.string.removeprefix("#").strip()
    said: dict[str, tuple[str, str]] = {}
    before = ""
    for field in _class(kind).body:
        if not isinstance(field, ast.AnnAssign):
            continue
        above = []
        line = field.lineno - 1
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        words = [beside[line] for line in range(field.lineno, (field.end_lineno or 0) + 1) if line in beside]
        text = " ".join([*above, *words])
        unit = re.search(r"\s*\[([A-Za-z/ ]+)\]", text)
        meaning = text.replace(unit[0], "", 1).strip() if unit else text
        before = meaning or (before if unit else "")
        said[ast.unparse(field.target)] = (before, unit[1] if unit else "")
    return said


def _class(kind: str) -> ast.ClassDef:
    tree = ast.parse((ROOT / "raylens/config.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)


def _class_docstring(kind: str) -> str:
    return html.escape(ast.get_docstring(_class(kind)) or "", quote=False).replace("*", "\\*")


# --- the recipes


def list_of_recipes() -> str:
    whole = recipes.paper_fixed()
    parts = [
        "# Recipes",
        "`raylens recipes` lists them, `raylens show NAME` prints one in full, and "
        "[a file of one's own](../how-to/own-recipe.md) changes one. "
        "What follows is what each changes of `paper-fixed`, all of whose values are the defaults of "
        "[the configuration](configuration.md).",
    ]
    for name, recipe in recipes.RECIPES.items():
        experiment = recipe()
        changed = _differences(whole.as_dict(), experiment.as_dict())
        rows = [[code(key), code(before), code(after)] for key, (before, after) in changed.items() if key != "name"]
        parts += [f"## {name}", recipe.__doc__ or "", f"Digest `{experiment.simulation.digest}`."]
        parts += [table(["key", "`paper-fixed`", f"`{name}`"], rows)] if rows else []
    parts += ["## Search spaces", "For `raylens tune`; `raylens tune NAME --print-space` prints one in full."]
    for name, space in search.SPACES.items():
        found = space()
        rows = [[code(key), ", ".join(map(code, values))] for key, values in found.values.items()]
        parts += [f"### Space {name}", space.__doc__ or ""]
        parts.append(
            f"The {found.network}, by `{found.metric}`, from {found.epochs[0]} to {found.epochs[1]} epochs; "
            f"what is not searched is that of `{found.recipe}`."
        )
        parts.append(table(["hyper-parameter", "values"], rows))
    return "\n\n".join(parts) + "\n"


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, with both."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in new.items():
        before = old.get(key)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and not {"uniform", "normal"} & (value.keys() | before.keys())
        ):
            found |= _differences(before, value, f"{prefix}{key}.")
        elif value != before:
            found[f"{prefix}{key}"] = (before, value)
    return found
