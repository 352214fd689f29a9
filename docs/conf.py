"""Sphinx configuration; `scripts/docs` builds the site."""

import ast
import inspect
import re
import textwrap
from importlib import metadata

import optaxclip

project = "optaxclip"
author = copyright = "The optaxclip authors"  # noqa: A001 (Sphinx reads this name)
release = metadata.version(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "measured"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # single backticks in a docstring are code, and links if they are names
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them as they are written
napoleon_attr_annotations = False
napoleon_use_ivar = True
intersphinx_timeout = 10
# without a network, names are looked up in the short inventories in this folder
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest", (None, "inventories/jax.txt")),
    "optax": ("https://optax.readthedocs.io/en/latest", (None, "inventories/optax.txt")),
    "flax": ("https://flax.readthedocs.io/en/latest", (None, "inventories/flax.txt")),
}

html_theme = "furo"
html_title = "optaxclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)\s]+)\)")
TABLE = re.compile(r"(?:^\|.*\|$\n?)+", re.MULTILINE)


def from_markdown(app, what, name, obj, options, lines):
    """Translates Markdown links and tables in docstrings to reStructuredText.

    Docstrings use Markdown because it reads better in a terminal.
    """
    text = LINK.sub(lambda link: f"`{' '.join(link[1].split())} <{link[2]}>`__", "\n".join(lines))
    lines[:] = TABLE.sub(lambda table: _list_table(table[0].splitlines()), text).splitlines()


def _list_table(rows):
    head, _, *body = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    cells = [
        f"   {'* ' if not i else '  '}- {cell}"
        for row in [head, *body]
        for i, cell in enumerate(row)
    ]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *cells, ""])


class Written(str):
    """A default value as the source code writes it."""

    __repr__ = str.__str__


def with_written_defaults(app, function, bound_method):
    """Shows defaults as the source code writes them: `norms.l2()` instead of its repr.

    Methods also have the options of `clip`, so the defaults of `clip` are looked up too.
    """
    if inspect.isfunction(function) and function.__module__.startswith(project):
        written = {**_defaults(optaxclip.clip), **_defaults(function)}
        signature, parameters = inspect.signature(function), []
        for p in signature.parameters.values():
            default = p.default if p.default is p.empty else written.get(p.name, p.default)
            parameters.append(p.replace(default=default))
        function.__signature__ = signature.replace(parameters=parameters)


def _defaults(function):
    arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = positional[len(positional) - len(arguments.defaults) :]
    names = [argument.arg for argument in (*optional, *arguments.kwonlyargs)]
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    pairs = zip(names, defaults, strict=True)
    return {name: Written(ast.unparse(default)) for name, default in pairs if default is not None}


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-before-process-signature", with_written_defaults)
    app.connect("autodoc-process-docstring", from_markdown)
