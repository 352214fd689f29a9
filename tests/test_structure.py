"""The layout of the package: levels, exports, one home for each name."""

import ast
import inspect
import pkgutil
import types
from pathlib import Path

import optaxclip

PACKAGE = Path(optaxclip.__file__).parent
# Each module may import only modules of earlier levels, and its own package.
LEVELS = [
    {"_types", "_validate", "responses"},
    {"norms", "scopes", "thresholds", "thresholds.fixed", "thresholds.combine"},
    {"_clip"},
    {"methods"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "optaxclip":
            base = node.module.removeprefix("optaxclip").removeprefix(".")
            yield from ([base] if base else [alias.name for alias in node.names])


def test_modules_import_only_lower_levels():
    seen = dict(modules())
    assert set(seen) == set(LEVEL)
    for name, tree in seen.items():
        own = {"thresholds", "thresholds.fixed", "thresholds.combine"} if name.startswith("thresholds") else set()
        for other in set(imported(tree)) - own:
            assert LEVEL[other] < LEVEL[name] or (LEVEL[other] == 0 and name != other), f"{name} imports {other}"


def test_imports_stand_at_the_top_and_are_real():
    for name, tree in modules():
        nested = [node for top in tree.body if not isinstance(top, ast.Import | ast.ImportFrom) for node in ast.walk(top)]
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in nested), name
        assert not any(isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in ast.walk(tree)), name


def test_every_public_name_is_exported_once_and_documented():
    names = [name for name in vars(optaxclip) if not name.startswith("_")]
    values = [getattr(optaxclip, name) for name in names if name != "methods"]
    assert len({id(value) for value in values}) == len(values)
    for name in names:
        assert inspect.getdoc(getattr(optaxclip, name)), name


def test_every_method_is_exported_and_every_public_module_too():
    methods = vars(optaxclip.methods)
    rows = {
        name
        for name, value in methods.items()
        if isinstance(value, types.FunctionType) and value.__module__ == "optaxclip.methods"
    }
    assert {name for name in rows if not name.startswith("_")} <= set(vars(optaxclip))
    public = {module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if not module.name.startswith("_")}
    assert public <= set(vars(optaxclip))


def test_public_functions_have_an_example_or_one_line():
    for name in ("clip", *[row for row in vars(optaxclip.methods) if row.startswith(("clip_", "adaptive"))]):
        doc = inspect.getdoc(getattr(optaxclip, name))
        assert ">>>" in doc and "Args:" in doc and "Raises:" in doc and "math:" in doc, name


def test_run_time_dependencies_are_jax_optax_and_numpy():
    standard = {"collections", "functools", "inspect", "math", "numbers", "typing"}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                roots = (
                    {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else {node.module.split(".")[0]}
                )
                assert roots <= standard | {"jax", "optax", "numpy", "optaxclip"}, (name, roots)
