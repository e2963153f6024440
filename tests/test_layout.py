"""The package's folders are its architecture: imports run one way, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter

from conftest import REPO

PACKAGE = REPO / "src" / "dpo_lightning"
# From the top floor to the ground; a folder imports from its own floor and from those below. What lies directly in the
# package (errors, visible, parsing) is below all of them.
FLOORS = (("cli",), ("callbacks",), ("dpo", "judging"), ("data",), ("storage",), ("models",))
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
    folders = {name.split(".")[0] for name in MODULES if "." in name}
    assert folders - {"demo"} == set(FLOOR)
    loose = {name for name, path in MODULES.items() if path.parent == PACKAGE} - ENTRANCES
    assert loose == {"errors", "visible", "parsing"}


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
