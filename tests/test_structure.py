"""The layout of the package: levels, exports, one home for each name."""

import ast
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest

import optaxclip

PACKAGE = Path(optaxclip.__file__).parent
# Each module may import only modules of earlier levels, and its own package.
LEVELS = [
    {
        "_naming",
        "_types",
        "_validate",
        "_validate.arguments",
        "_validate.axes",
        "_validate.combinations",
        "_validate.examples",
        "_validate.guards",
        "_validate.rules",
        "_validate.trees",
        "_validate.after_step",
        "_numerics",
        "_sharding",
        "_jax",
        "_programs",
        "_factors",
        "_factor_rules",
        "_factored",
    },
    {"_batches", "_selection", "_transform"},
    {"_lowering"},
    {"norms", "responses"},
    {
        "scopes",
        "_layout",
        "_measure",
        "thresholds",
        *(f"thresholds.{name}" for name in ("_blocks", "fixed", "combine", "moments", "ranks")),
    },
    {"_record", "_rules", "_watch"},
    {"_clip", "_feedback", "_guard", "_heads", "_keep", "_precondition", "_probe", "_spectral"},
    {"_examples", "_monitor", "_states"},
    {"_sensitivity"},
    {"_clipped_grad"},
    {"telemetry", "_backward", "per_example", "testing"},
    {"methods", "plots"},
    {"__init__"},
]
# Parts of JAX that are private or move between versions: only `_jax` looks at them.
MOVING_MODULES = {
    f"jax.{name}" for name in ("core", "experimental", "extend", "interpreters", "_src")
}
STEADY_IMPORTS = {"jax.core.Tracer", "jax.experimental.checkify"}
MOVING_NAMES = {
    "enable_x64",
    "pcast",
    "pvary",
    "reshard",
    "vma",
    "mat",
    "weak_type",
    "str_short",
    "get_bind_params",
    "ctx",
}
SHARED = {"nonfinite", "sharded_over", "record"}  # said once, where `clip` is described
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "optaxclip"
        ):
            base = node.module.removeprefix("optaxclip").removeprefix(".")
            yield from ([base] if base else [alias.name for alias in node.names])


def test_modules_import_only_lower_levels():
    seen = dict(modules())
    assert set(seen) == set(LEVEL)
    for name, tree in seen.items():
        for other in set(imported(tree)):
            if name.startswith("thresholds") and other.startswith("thresholds"):
                continue
            assert LEVEL[other] < LEVEL[name] or (LEVEL[other] == 0 and name != other), (
                f"{name} imports {other}"
            )


def test_imports_stand_at_the_top_and_are_real():
    for name, tree in modules():
        nested = [
            node
            for top in tree.body
            if not isinstance(top, ast.Import | ast.ImportFrom)
            for node in ast.walk(top)
        ]
        inside = [
            ast.unparse(node) for node in nested if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        # an optional extra
        assert len(inside) == (name == "plots") and all("matplotlib" in line for line in inside), (
            name
        )
        assert not any(
            isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in ast.walk(tree)
        ), name


def moving_parts(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if is_moving(f"{node.module}.{alias.name}")
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_moving(alias.name))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "_jax":
            if node.attr in MOVING_NAMES or is_moving(ast.unparse(node)):
                yield ast.unparse(node)


def is_moving(name):
    inside = any(name == module or name.startswith(module + ".") for module in MOVING_MODULES)
    return name not in STEADY_IMPORTS and (inside or name.split(".")[-1] in MOVING_NAMES)


def test_only_one_module_looks_at_what_moves_in_jax():
    assert {
        name: list(moving_parts(tree))
        for name, tree in modules()
        if name != "_jax" and any(moving_parts(tree))
    } == {}
    assert len(set(moving_parts(dict(modules())["_jax"]))) >= 8


@pytest.mark.parametrize(
    "line",
    [
        "from jax.extend.core import Literal",
        "from jax.extend import core",
        "from jax import extend",
        "import jax.extend.core",
        "from jax.sharding import reshard",
        "jax.reshard(x)",
        "jax.lax.pcast",
        "jax.core.eval_jaxpr",
        "jax._src.core",
        "x.aval.vma",
        "e.ctx.manager",
    ],
)
def test_what_moves_is_found(line):
    assert list(moving_parts(ast.parse(line)))


VOCABULARIES = [
    optaxclip,
    *(optaxclip.norms, optaxclip.scopes, optaxclip.responses, optaxclip.thresholds),
    *(optaxclip.telemetry, optaxclip.per_example, optaxclip.plots, optaxclip.testing),
]


@pytest.mark.parametrize("module", VOCABULARIES, ids=lambda module: module.__name__)
def test_every_public_name_is_listed_once_and_documented(module):
    names = module.__all__
    assert dir(module) == sorted(names) and len(set(names)) == len(names)
    assert len({id(getattr(module, name)) for name in names}) == len(names)
    for name in names:
        assert inspect.getdoc(getattr(module, name)), name


def test_every_method_is_exported_and_every_public_module_too():
    methods = vars(optaxclip.methods)
    rows = {
        name
        for name, value in methods.items()
        if isinstance(value, types.FunctionType) and value.__module__ == "optaxclip.methods"
    }
    assert {name for name in rows if not name.startswith("_")} <= set(optaxclip.__all__)
    public = {
        module.name
        for module in pkgutil.iter_modules([str(PACKAGE)])
        if not module.name.startswith("_")
    }
    assert public - {"methods"} <= set(optaxclip.__all__)


def transforms():
    for name in optaxclip.__all__:
        if isinstance(getattr(optaxclip, name), types.FunctionType):
            yield name, getattr(optaxclip, name)


def test_every_transform_is_documented_with_formula_arguments_errors_and_example():
    assert len(dict(transforms())) >= 19
    for name, transform in transforms():
        doc = inspect.getdoc(transform)
        assert ">>>" in doc and "Args:" in doc and "Raises:" in doc and "math:" in doc, name
        own = [
            p for p in inspect.signature(inspect.unwrap(transform)).parameters if p not in SHARED
        ]
        assert all(re.search(rf"^ +\*{{0,2}}{p}: ", doc, re.MULTILINE) for p in own), name


def test_every_rule_says_what_it_learns_and_what_it_refuses():
    rules = {**vars(optaxclip.thresholds.moments), **vars(optaxclip.thresholds.ranks)}
    rules = {
        name: rule
        for name, rule in rules.items()
        if inspect.isfunction(rule) and "optaxclip" in rule.__module__
    }
    public = {
        name: rule
        for name, rule in rules.items()
        if name in vars(optaxclip.thresholds) and name != "ignore_outliers"
    }
    assert len(public) == 10
    for name, rule in public.items():
        doc = inspect.getdoc(rule)
        assert doc.startswith("Learns the ") or doc.startswith("Learns whether "), name
        assert "Args:" in doc and "Raises:" in doc and "math:" in doc, name


def test_a_row_is_a_few_lines_of_code():
    for node in dict(modules())["methods"].body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            assert sum(statement.end_lineno - statement.lineno + 1 for statement in code) < 11, (
                node.name
            )


def test_run_time_dependencies_are_jax_optax_and_numpy():
    standard = {
        "collections",
        "contextlib",
        "contextvars",
        "dataclasses",
        "functools",
        "inspect",
        "itertools",
        "math",
        "numbers",
        "re",
        "typing",
    }
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                roots = (
                    {a.name.split(".")[0] for a in node.names}
                    if isinstance(node, ast.Import)
                    else {node.module.split(".")[0]}
                )
                extras = {"matplotlib"} if name == "plots" else set()
                assert roots <= standard | {"jax", "optax", "numpy", "optaxclip"} | extras, (
                    name,
                    roots,
                )


# One word for one mechanism. The field has better words than these: members, axes, positions,
# multiple, a noun.
PRIVATE_WORDS = re.compile(r"\b(own|alike|places|several|found|told|kinds)\b")
QUOTED = re.compile(r"(f?\"[^\"\n]*\")|(f?'[^'\n]*')")  # messages speak to users


def test_private_words_have_left_the_code():
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            word = PRIVATE_WORDS.search(QUOTED.sub("", line))
            assert not word, f"{path.name}:{number}: {word[0]}"


def test_functions_and_files_are_short():
    for name, tree in modules():
        path = PACKAGE / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name != "methods":
            assert len(path.read_text().splitlines()) <= 450, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                code = node.body[1:] if ast.get_docstring(node) else node.body
                lines = {k for part in code for k in range(part.lineno, part.end_lineno + 1)}
                for part in code:  # a function inside counts by itself
                    if isinstance(part, ast.FunctionDef):
                        lines -= set(range(part.lineno, part.end_lineno + 1))
                assert len(lines) <= 40, (name, node.name, len(lines))
