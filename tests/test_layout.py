"""The package's folders are its architecture: imports run one way, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter

from conftest import REPO

PACKAGE = REPO / "src" / "dpo_lightning"
# From the top floor to the ground; a folder or file imports from its own floor and from those below.
FLOORS = (
    ("cli",),
    ("page",),
    ("callbacks",),
    ("dpo", "judging"),
    ("data",),
    ("storage",),
    ("models",),
    ("errors", "visible", "parsing", "worker"),  # files directly in the package
    ("internals",),
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
ENTRANCES = {"__init__", "__main__"}  # they name what is inside
MODULES = {
    ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__") or "__init__": path
    for path in PACKAGE.rglob("*.py")
}


def imports(path):
    """The package's own modules that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpo_lightning":
            base = node.module.removeprefix("dpo_lightning").lstrip(".")
            found = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [a.name.removeprefix("dpo_lightning.") for a in node.names if a.name.startswith("dpo_lightning.")]
        else:
            continue
        for name in found if id(node) not in typing_only else ():
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


ARROWS = {name: {other for other in imports(path) if other != name} for name, path in MODULES.items()}


def test_every_folder_has_its_floor():
    parts = {name.split(".")[0] for name in MODULES}
    assert parts - ENTRANCES - {"demo"} == set(FLOOR)


def test_imports_run_one_way():
    up = [
        f"{name} imports {other}, which is above it"
        for name, others in ARROWS.items()
        for other in others
        if name not in ENTRANCES and FLOOR.get(other.split(".")[0], 99) < FLOOR.get(name.split(".")[0], 99)
    ]
    assert not up, "\n".join(up)


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(ARROWS).prepare()  # CycleError names the circle


# ---------------------------------------------------------------------- private names of other libraries

PUBLIC = {"_replace", "_asdict", "_fields", "_make"}  # of every NamedTuple
OVERRIDDEN = {"super()._apply"}  # hooks in all but name, held by tests/internals
INNER = {"fit_loop", "epoch_loop", "callback_keys"}  # without an underscore, and as inner
INNER_MODULES = ("datasets.config", "datasets.table", "huggingface_hub.constants", "transformers.models")


def private_names(path):
    """Lines of a file that use a name with an underscore which neither the file itself nor a NamedTuple defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base, name = ast.unparse(node.value), node.attr
            if base == "os" or name in PUBLIC or f"{base}.{name}" in OVERRIDDEN:
                continue
            if base in ("self", "cls") and name in own:
                continue
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dpo_lightning"):
            base, name = node.module, next((a.name for a in node.names if private(f"{node.module}.{a.name}")), "")
        elif isinstance(node, ast.Import):
            base, name = "import", next((a.name for a in node.names if private(a.name)), "")
        else:
            continue
        if private(name) or private(f"{base}.{name}"):
            yield f"{path.relative_to(REPO)}:{node.lineno}: {base}.{name}"


def private(name):
    last = name.rpartition(".")[2]
    return last.startswith("_") and not last.startswith("__") or last in INNER or name.startswith(INNER_MODULES)


def test_private_names_of_other_libraries_are_used_in_internals_alone():
    lines = [use for name, path in MODULES.items() if not name.startswith("internals") for use in private_names(path)]
    assert not lines, "write a function for it in src/dpo_lightning/internals, with a test:\n" + "\n".join(lines)
