"""What a package, the README or a page of the documentation names is importable from the top of its package."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kuaifair_env", "dsrm", "hrl_policies")
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted(ROOT.glob("docs/**/*.md")) if "results" not in path.relative_to(ROOT).parts),
]


@pytest.mark.parametrize("name", [*PACKAGES, "kuaifair_env.data", "kuaifair_env.response"])
def test_every_public_name_imports_and_is_listed_by_dir(name):
    package = import_module(name)
    assert sorted(set(package.__all__)) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        package.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_imported_at_first_use_is_what_type_checkers_see(name):
    tree = ast.parse(Path(import_module(name).__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert set(seen) <= set(import_module(name).__all__)
    for public, home in seen.items():
        assert getattr(import_module(name), public) is getattr(import_module(home), public)


def test_importing_the_packages_imports_nothing_slow():
    code = f"import sys, {', '.join(PACKAGES)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "stable_baselines3", "pandas", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("name", PACKAGES)
def test_help_opens_with_what_is_there_and_an_example(name):
    package = import_module(name)
    text = pydoc.plain(pydoc.render_doc(package))
    assert text.index(package.__doc__.splitlines()[0]) < 200
    assert "What is there:" in package.__doc__ and re.search(r"^    \w.* = ", package.__doc__, re.MULTILINE)
    for role, public in re.findall(r":(class|func|data|mod):`([\w.]+)`", package.__doc__):
        if role == "mod":
            import_module(public)
        else:
            assert public in package.__all__, f"help({name}) names {public}"


def imported_names(code: str) -> set[tuple[str, str]]:
    """Returns what Python code imports from the packages, as pairs of module and name."""
    return {
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_comes_from_the_top_of_its_package(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for module, name in imported_names(block):
            assert module in PACKAGES, f"{page.name} imports {name} from {module}"
            assert name in import_module(module).__all__, f"{module} does not export {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_dotted_name_of_a_page_exists(page):
    for name in re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        assert pydoc.locate(name) is not None, f"{page.name} names {name}"
