"""How the house is laid out: who imports whom, what never waits for torch, and that files are found without a list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpolicy

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvpolicy"

ORDER = (  # each imports only from its left
    "errors", "language", "plan", "oracle", "attention", "scorers", "runtime", "architecture", "versions", "patching",
    "models", "testing", "lab", "cli",
)  # fmt: skip
WITHOUT_TORCH = ("errors", "language", "plan", "oracle", "architecture", "versions")
HEAVY = ("torch", "transformers")


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem[:2] != "__"]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{origin(node, path)}.{alias.name}") for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def origin(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        top, *rest = name.split(".")
        if top == "kvpolicy" and rest:
            # `from kvpolicy import load_policy` imports the module that defines it.
            yield line, kvpolicy._HOME.get(rest[0], rest[0])


def test_every_module_has_a_place_in_the_order() -> None:
    assert {layer_of(path) for path in modules()} <= set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_come_from_the_left_only(path: Path) -> None:
    here = ORDER.index(layer_of(path))
    wrong = [
        f"{path}:{line} imports {layer}"
        for line, layer in imported_layers(path)
        if layer in ORDER and ORDER.index(layer) > here
    ]
    assert not wrong


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_the_oracle_stands_apart(path: Path) -> None:
    """It shares no code with the runtime, and only what compares the two may import it."""
    layers = {layer for _, layer in imported_layers(path)}
    if layer_of(path) == "oracle":
        assert layers <= {"errors", "language", "plan", "oracle"}
    elif layer_of(path) not in ("testing", "lab"):
        assert "oracle" not in layers


@pytest.mark.parametrize("path", sorted((ROOT / "patches").glob("**/*.py")), ids=name_of)
def test_architectures_import_one_layer_only(path: Path) -> None:
    """A family may build upon another's file."""
    assert {layer for _, layer in imported_layers(path)} <= {"architecture", "patches"}


@pytest.mark.parametrize("path", [path for path in modules() if layer_of(path) in WITHOUT_TORCH], ids=name_of)
def test_no_torch_in_what_a_policy_says_and_means(path: Path) -> None:
    assert not [name for _, name in imports(path) if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("path", [path for path in modules() if layer_of(path) == "cli"], ids=name_of)
def test_verbs_import_torch_when_they_need_it(path: Path) -> None:
    """No file of the command line imports torch at its top, nor a layer that does."""
    light = {*WITHOUT_TORCH, "models", "cli"}
    for _, name in imports(path, top_level=True):
        top, *rest = name.split(".")
        assert top not in HEAVY
        assert top != "kvpolicy" or not rest or kvpolicy._HOME.get(rest[0], rest[0]) in light


def test_importing_the_light_half_loads_no_torch() -> None:
    names = [name_of(path) for path in modules() if layer_of(path) in (*WITHOUT_TORCH, "cli")]
    code = "import importlib, sys\n"
    code += f"for name in {['kvpolicy', *names]!r}: importlib.import_module(name)\n"
    code += f"loaded = set({HEAVY!r}) & set(sys.modules)\n"
    code += "assert not loaded, loaded\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names_are_one_list() -> None:
    """The names that type checkers see are those that `kvpolicy.<name>` loads."""
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvpolicy.")
        for alias in node.names
    }
    assert seen == {name: f"kvpolicy.{module}" for name, module in kvpolicy._HOME.items()}
    assert set(seen) <= set(dir(kvpolicy))


@pytest.mark.parametrize("name", kvpolicy.__all__)
def test_public_names_load(name: str) -> None:
    assert getattr(kvpolicy, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        kvpolicy.aply  # noqa: B018
