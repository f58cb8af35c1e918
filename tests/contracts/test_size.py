"""No function that does not fit on a screen, and no module that knows everybody."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "d4c_onnx"
MODULES = sorted(LIBRARY.rglob("*.py"))
LINES, IMPORTS = 60, 12


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_functions_and_imports_stay_few(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: found for node in functions if (found := (node.end_lineno or 0) - node.lineno + 1) > LINES}
    assert not long
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    own = {name for name in imported if name.startswith("d4c_onnx")}
    assert len(own) <= IMPORTS or path.name == "__init__.py"  # which only names what its room gives out
