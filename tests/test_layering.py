"""The house: what imports what, how large it may grow, what its code never does.

The order is read from the docstring of ftcore/__init__.py, the one place that states it; the map
in README.md is checked against it.
"""

import ast
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
import pytest
import ftcore

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train.py", "eval.py", "serve.py"]
TOP = {"README.md", "pyproject.toml", "ftcore", "kernels", "tests", *SCRIPTS}
MAX_FILE_LINES = {"ftcore": 350, "kernels": 480, "tests": 350, "scripts": 200}
MAX_TOTAL_LINES = {"ftcore": 9_000, "kernels": 3_500}
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 7  # positional ones; keyword-only arguments name themselves at the call
MAX_TRITON_LINES = 120
MAX_TRITON_ARGUMENTS = 24

LAYERS = [line.split() for line in re.findall(r"^ {4}(\S.*?) {2,}", ftcore.__doc__ or "", re.M)]
RANK = {name: rank for rank, names in enumerate(LAYERS, start=1) for name in names}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec"}
KEYWORDS = {"allow_pickle", "trust_remote_code"}

Function = ast.FunctionDef | ast.AsyncFunctionDef

def files(area: str) -> list[Path]:
    if area == "scripts":
        return [ROOT / name for name in SCRIPTS if (ROOT / name).exists()]
    return sorted((ROOT / area).rglob("*.py"))

PRODUCT = [path for area in ("ftcore", "kernels", "scripts") for path in files(area)]
ALL = [*PRODUCT, *files("tests")]

def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))

def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()

def imports(source: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module of `package` imports, at any depth, relative ones resolved."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)

def rank(module: str) -> float:
    """Height of a module in the house; nan for what stands outside."""
    top, _, rest = module.partition(".")
    if top == "ftcore":
        return RANK.get(rest.partition(".")[0], math.nan)
    if top == "tests" or f"{top}.py" in SCRIPTS:
        return math.inf
    return 0 if top == "kernels" else math.nan

def upward(source: ast.AST, module: str, package: str) -> list[str]:
    return [f"{module} imports {i}" for i in imports(source, package) if rank(i) > rank(module)]

def functions(source: ast.AST) -> Iterator[Function]:
    """Functions and methods; those inside other functions are left out."""
    for node in ast.iter_child_nodes(source):
        if isinstance(node, Function):
            yield node
        elif not isinstance(node, ast.Lambda):
            yield from functions(node)

def is_triton(function: Function) -> bool:
    """Compiled by Triton, which reads a kernel's pointers and sizes without annotations."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)

def signature_faults(function: Function) -> list[str]:
    a = function.args
    max_arguments, max_lines = MAX_ARGUMENTS, MAX_FUNCTION_LINES
    positional = [arg for arg in (*a.posonlyargs, *a.args) if arg.arg not in ("self", "cls")]
    every = [*positional, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    if is_triton(function):
        faults, max_arguments, max_lines = [], MAX_TRITON_ARGUMENTS, MAX_TRITON_LINES
    else:
        faults = [f"{arg.arg} is not annotated" for arg in every if arg.annotation is None]
        if function.returns is None:
            faults.append("what it returns is not annotated")
    if len(positional) > max_arguments:
        faults.append(f"{len(positional)} positional arguments, at most {max_arguments}")
    assert function.end_lineno is not None
    if (lines := function.end_lineno - function.lineno + 1) > max_lines:
        faults.append(f"{lines} lines, at most {max_lines}")
    return [f"{function.name}: {fault}" for fault in faults]

def forbidden(source: ast.AST) -> list[str]:
    """Ways to run code that comes with data: pickle in all its clothes, eval, remote code."""
    found = [i for i in imports(source, "") if i.partition(".")[0] in UNPICKLERS]
    found += [i for i in imports(source, "") if i in ("torch.load", "torch.save")]
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            found.append(node.id)
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            found.append(node.arg)
    return found

def test_the_docstring_orders_what_is_there() -> None:
    there = {p.stem for p in (ROOT / "ftcore").iterdir() if p.suffix == ".py" or files(name(p))}
    assert set(RANK) == there - {"__init__"}
    assert [len(names) for names in LAYERS] == [len(set(names)) for names in LAYERS]

def test_the_readme_maps_the_stages_in_the_same_order() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d .*?) +\| `ftcore/(\w+)/` +\|", text, re.M)
    stages = re.findall(r"^ {4}(\w+) +(\d .*)$", ftcore.__doc__ or "", re.M)
    assert stages and [(stage, folder) for folder, stage in stages] == table

def test_imports_point_down() -> None:
    found = []
    for path in PRODUCT:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts == ["ftcore", "__init__"]:
            assert not list(imports(tree(path), "ftcore"))
            continue
        found += upward(tree(path), ".".join(parts), ".".join(parts[:-1]))
    assert not found, "\n".join(found)

@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("kernels.rope", "import ftcore.errors"),
        ("kernels.rope", "def f():\n    from ftcore.model import heads"),
        ("ftcore.data.pack", "from ftcore.tune.loop import Loop"),
        ("ftcore.data.pack", "from ftcore import tune"),
        ("ftcore.data.pack", "from ..tune import loop"),
        ("ftcore.data.pack", "from .. import tune"),
        ("ftcore.evaluate.report", "import train"),
    ],
)
def test_an_upward_import_is_seen(module: str, code: str) -> None:
    assert len(upward(ast.parse(code), module, module.rpartition(".")[0])) == 1

def test_a_downward_or_level_import_is_allowed() -> None:
    for code in ("import torch, kernels.docs", "from .order import x", "from .. import errors"):
        assert not upward(ast.parse(code), "ftcore.data.pack", "ftcore.data")

def test_top_level_is_fixed() -> None:
    assert not [entry for entry in sorted(TOP) if not (ROOT / entry).exists()]
    git = ["git", "-C", str(ROOT), "ls-files"]
    tracked = subprocess.run(git, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: what belongs to the project is unknown")
    entries = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP

@pytest.mark.parametrize("area", MAX_FILE_LINES)
def test_sizes(area: str) -> None:
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in files(area)}
    assert not {file: n for file, n in lines.items() if n > MAX_FILE_LINES[area]}
    assert sum(lines.values()) <= MAX_TOTAL_LINES.get(area, math.inf)

def test_ascii_only() -> None:
    assert not [name(path) for path in ALL if not path.read_bytes().isascii()]

def test_signatures() -> None:
    faults = [
        f"{name(path)}: {fault}"
        for path in PRODUCT
        for function in functions(tree(path))
        for fault in signature_faults(function)
    ]
    assert not faults, "\n".join(faults)

def test_code_never_comes_with_data() -> None:
    found = {name(path): forbidden(tree(path)) for path in PRODUCT}
    assert not {file: what for file, what in found.items() if what}

@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "from torch import save",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_forbidden_code_is_seen(code: str) -> None:
    assert len(forbidden(ast.parse(code))) == 1
    assert not forbidden(ast.parse("model.eval(); eval: int; np.load(path); f(pickle)"))

def test_help_needs_no_torch() -> None:
    code = "import sys, kernels, ftcore.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
