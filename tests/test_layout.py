"""What is installed where, who may import whom, and what runs where only torch is installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "patternsearch"
MAPPED = ("kernels", "spaces", "configs")

# A module imports from its own line or an earlier one; what is in no line may import anything, but
# nothing in a line may import it.
LINES = (
    ("errors",),
    ("domains", "files", "yamlfile", "canonical"),
    ("pattern",),
    ("network", "completion"),
    ("patterns",),
    (
        "yamlfile",
        "codec",
    ),
    ("assignment",),
    ("frame", "sizes"),
    ("ops",),
    ("layers",),
    ("mixer",),
    ("mixers",),
    ("model", "optimizer"),
    ("task", "measure", "kinds", "data", "augment", "averaging", "cuda_graph"),
    ("native", "vocabulary"),
    ("baselines",),
    ("tasks",),
    ("evaluation", "task_check"),
    ("train",),
    (
        "config",
        "space",
        "inverse",
        "space_check",
        "export",
        "store",
        "tracking",
        "describe",
        "pictures",
    ),
    ("search",),
)
OWNERS = {
    "triton": ("kernels/",),
    "ray": ("patternsearch/search/ray_executor.py", "patternsearch/search/cluster.py"),
    "optuna": ("patternsearch/search/",),
    "mlflow": ("patternsearch/tracking.py",),
    "pydantic": ("patternsearch/config.py",),
    "pandas": ("patternsearch/search/outcome.py", "patternsearch/data/tables.py"),
    "jinja2": ("patternsearch/search/report.py",),
    "matplotlib": (
        "patternsearch/pictures.py",
        "patternsearch/search/figures.py",
        "patternsearch/search/comparison_figure.py",
    ),
    "typer": ("patternsearch/cli.py",),
    "rich": ("patternsearch/search/",),
    "sklearn": ("patternsearch/tasks/",),
    "pooch": ("patternsearch/data/fetch.py",),
    "requests": ("patternsearch/data/fetch.py",),
    "tqdm": ("patternsearch/data/fetch.py",),
    "PIL": ("patternsearch/data/images.py",),
}


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def imports(path: Path, everywhere: bool) -> set[str]:
    """Dotted names that a file imports: all, or those that load with it (not in functions)."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] in MAPPED:
        package = ("patternsearch", *package)

    def visit(node: ast.AST) -> set[str]:
        found: set[str] = set()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{name}.{alias.name}" for alias in node.names} if not node.module else {name}
        lazy = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if everywhere or not lazy:
            for child in ast.iter_child_nodes(node):
                found |= visit(child)
        return found

    return visit(ast.parse(path.read_text(encoding="utf-8")))


def line_of(name: str) -> int | None:
    head = name.removeprefix("patternsearch.").split(".")[0]
    return next((i for i, line in enumerate(LINES) if head in line), None)


def test_no_arrow_back():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        own = line_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if own is None:
            continue
        for name in imports(path, everywhere=False):
            if name.startswith("patternsearch."):
                theirs = line_of(name)
                seen += 1
                assert theirs is not None and theirs <= own, f"{path.name} imports {name}"
    assert seen > 100


def test_kernels_stand_alone():
    own = {"patternsearch.errors", "patternsearch.kernels"}
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path, everywhere=True):
            top = ".".join(name.split(".")[:2]) if name.startswith("patternsearch") else name
            top = top if name.startswith("patternsearch") else name.split(".")[0]
            allowed = top in own | {"torch", "triton"} or top in sys.stdlib_module_names
            assert allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("library", OWNERS)
def test_one_place_for_each_library(library):
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == library for name in imports(path, everywhere=True))
    }
    assert users, f"nothing imports {library}: drop it here and from pyproject.toml"
    for user in users:
        assert user.startswith(OWNERS[library]), f"{user} imports {library}"


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_the_folders():
    listed = settings()["tool"]["setuptools"]
    found = {
        ".".join(("patternsearch", *path.parent.relative_to(PACKAGE).parts))
        for path in PACKAGE.rglob("*.py")
    }
    found |= {f"patternsearch.{name}" for name in MAPPED}
    assert sorted(listed["packages"]) == sorted(found)
    assert listed["package-dir"] == {f"patternsearch.{name}": name for name in MAPPED}
    for name in ("spaces", "configs"):
        kept = {p.suffix for p in (ROOT / name).iterdir() if p.is_file()}
        assert kept == {".yaml"} and listed["package-data"][f"patternsearch.{name}"] == ["*.yaml"]


def test_root_folders_are_no_packages_of_their_own():
    for name in MAPPED:
        assert not (ROOT / name / "__init__.py").exists()
    for name in ("patterns", "mixers", "tasks", "search"):
        assert (PACKAGE / name / "__init__.py").exists()


def python(code: str, cwd: Path, *path: Path) -> str:
    """What a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_packages_called_kernels_of_others_still_work(tmp_path, first):
    for name in MAPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("owner = 'somebody else'\n")
    code = (
        "import patternsearch.kernels, patternsearch.spaces\n"
        "from patternsearch.kernels.linear_scan import linear_scan\n"
        "import kernels, spaces, configs\n"
        "print(kernels.owner, '|', spaces.owner, '|', configs.owner, '|', linear_scan.__module__)"
    )
    path = (ROOT, tmp_path) if first == "ours" else (tmp_path, ROOT)
    printed = python(code, ROOT, *path)
    assert printed == " | ".join(["somebody else"] * 3 + ["patternsearch.kernels.linear_scan"])


BLOCKED = """
import sys

class Blocked:
    names = set('''triton ray optuna mlflow pydantic matplotlib rich typer sklearn scipy pandas
                   plotly filelock hypothesis pytest'''.split())

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_a_pattern_is_built_where_only_torch_is_installed(exported, tmp_path):
    code = (
        BLOCKED
        + "import torch, patternsearch\n"
        + "names = [getattr(patternsearch, name) for name in patternsearch.__all__]\n"
        + f"model = patternsearch.build({str(exported)!r})\n"
        + "x = torch.ones(1, *model.spec.grid, model.spec.channels)\n"
        + "print(model(x).sum().item().hex())"
    )
    printed = python(code, tmp_path, ROOT)
    import torch

    import patternsearch

    model = patternsearch.build(exported)
    assert printed == model(torch.ones(1, 8, 8, 1)).sum().item().hex()


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, patternsearch; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert python(code, ROOT, ROOT) == "[]"


def test_a_missing_extra_is_named(tmp_path):
    code = (
        BLOCKED.replace("typer", "").replace("rich", "")
        + "from patternsearch.cli import main\n"
        + "main(['sweep', 'digits'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "pip install 'patternsearch[sweep]'" in lines[0]
