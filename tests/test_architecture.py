"""The rooms of the package: CONTRIBUTING.md's layout table is the rule, and every import of the tree is held to it."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "[!.]*/**/*.py")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in ("build", "dist", "training")
)
PACKAGE = [path for path in FILES if path.parts[0] != "tests"]
LIGHT_ROOMS = ("bundle", "preprocess", "runtime", "cli")
HEAVY = {
    "torch",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "pycuda",
    "numba",
    "matplotlib",
}
# where a distribution is imported under another name
IMPORT_NAMES = {
    "dicebear-core": "dicebear",
    "dicebear-styles": "dicebear",
    "onnxruntime-gpu": "onnxruntime",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "s3fs": "upath",  # which finds it by the store's name
    "scikit-image": "skimage",
    "tensorboard": "torch.utils.tensorboard",
    "universal-pathlib": "upath",
}
BROUGHT_BY = {
    "google": "onnx",  # google.protobuf
    "llvmlite": "numba",
    "starlette": "fastapi",
    "triton": "torch",  # on Linux
}


def _imports(path: Path) -> list[tuple[Path | str, str]]:
    """Every import of a file: the file or library that it names, and when: "top", "function" or "typing"."""
    found: list[tuple[Path | str, str]] = []

    def visit(node: ast.AST, when: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            when = "function"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "typing"
        found.extend((target, when) for target in _targets(node, path))
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(ast.parse((ROOT / path).read_text()), "top")
    return [(target, when) for target, when in found if str(target).split(".")[0] not in sys.stdlib_module_names]


def _targets(node: ast.AST, path: Path) -> list[Path | str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else []
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [str(node.module)]
    assert node.level <= len(path.parents), f"{path}:{node.lineno} imports from outside the package"
    module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return [_file(module, alias.name) for alias in node.names]


def _file(module: Path, name: str) -> Path:
    """The file that `from module import name` reads."""
    places = (module / f"{name}.py", module / name / "__init__.py", Path(f"{module}.py"), module / "__init__.py")
    return next(place for place in places if (ROOT / place).is_file())


IMPORTS = {path: _imports(path) for path in PACKAGE}


def _layout() -> dict[str, tuple[set[str], set[str], set[str]]]:
    """CONTRIBUTING.md's table: room -> rooms that it may import, libraries anywhere, libraries in functions only."""
    rooms = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| `") and len(cells) == 4:
            anywhere, _, in_functions = cells[3].partition("(")
            names, *allowed = (set(re.findall(r"`([\w.]+)/?`", text)) for text in (*cells[::2], anywhere, in_functions))
            rooms.update(dict.fromkeys(names, tuple(allowed)))
    return rooms


def _room(path: Path) -> str:
    return path.parts[0]  # a file of the root is its own room


def test_the_table_has_every_room() -> None:
    assert set(_layout()) == {_room(path) for path in PACKAGE}


def test_no_import_against_the_table() -> None:
    layout = _layout()
    everyone = {room for room in layout if room.endswith(".py")}
    wrong = [
        f"{path} -> {target}"
        for path, imports in IMPORTS.items()
        for target, _ in imports
        if isinstance(target, Path) and _room(target) not in {_room(path)} | layout[_room(path)][0] | everyone
    ]
    assert wrong == []


def test_no_library_against_the_table() -> None:
    layout = _layout()
    everyone = {_import_name(need) for need in _project()["project"]["dependencies"]}
    wrong = []
    for path, imports in IMPORTS.items():
        _, anywhere, in_functions = layout[_room(path)]
        for target, when in imports:
            allowed = everyone | anywhere | (set() if when == "top" else in_functions)
            if isinstance(target, str) and when != "typing" and target.split(".")[0] not in allowed:
                wrong.append(f"{path} imports {target} ({when})")
    assert wrong == []


def test_no_import_circle() -> None:
    graph = {path: {target for target, _ in imports if isinstance(target, Path)} for path, imports in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(map(str, error.args[1])))


def test_importing_a_light_room_loads_nothing_heavy() -> None:
    waiting = [path for path in PACKAGE if _room(path) in LIGHT_ROOMS or path.parts == ("kernels", "__init__.py")]
    reached: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += [parent / "__init__.py" for parent in path.parents]
            waiting += [target for target, when in IMPORTS[path] if when == "top" and isinstance(target, Path)]
    wrong = [
        f"{path} imports {target}"
        for path in sorted(reached)
        for target, when in IMPORTS[path]
        if when == "top" and str(target).split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_imports_between_folders_are_relative() -> None:
    absolute = [
        path for path, imports in IMPORTS.items() if any(str(t).split(".")[0] == "flashcocos" for t, _ in imports)
    ]
    assert absolute == []


def test_the_packages_are_the_folders() -> None:
    folders = {".".join(["flashcocos", *path.parent.parts]) for path in PACKAGE if path.name == "__init__.py"}
    assert sorted(_project()["tool"]["setuptools"]["packages"]) == sorted(folders)
    assert {path.parent for path in PACKAGE} == {path.parent for path in PACKAGE if path.name == "__init__.py"}


def test_every_extra_is_imported_and_every_import_declared() -> None:
    project = _project()["project"]
    extras = [needs for name, needs in project["optional-dependencies"].items() if not name.startswith("dev")]
    declared = {_import_name(need) for needs in (project["dependencies"], *extras) for need in needs} - {"flashcocos"}
    text = "\n".join((ROOT / path).read_text() for path in PACKAGE)
    assert [name for name in sorted(declared) if not re.search(rf"(import|from) {name}\b|\"{name}[\".]", text)] == []
    imported = {
        target.split(".")[0] for imports in IMPORTS.values() for target, _ in imports if isinstance(target, str)
    }
    assert {BROUGHT_BY.get(name, name) for name in imported} <= declared


def test_files_and_functions_are_short() -> None:
    long = [str(path) for path in FILES if len((ROOT / path).read_text().splitlines()) >= 600]
    for path in PACKAGE:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "triton.jit" not in map(
                ast.unparse, node.decorator_list
            ):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path}:{node.lineno} {node.name}: {lines} lines"] if lines >= 80 else []
    assert long == []


def _import_name(requirement: str) -> str:
    name = re.split(r"[\[<>=;\s]", requirement)[0]
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
