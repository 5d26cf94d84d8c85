"""What is written about the library holds: every block of README.md and of the documentation is run or looked up.

Python blocks of one file run in order, in one namespace, in a folder that sees data/. A text block directly behind one shows
what it prints, whole; `...` stands for anything there. Pages about errors go on from what the first block of their index makes.
Lines of bash blocks that begin with `contrans` run through the command line's own `main`.
"""

import ast
import contextlib
import io
import os
import pkgutil
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import unchecked
from typer.main import get_command

import contrans_tl
from contrans_tl.__main__ import app, main
from contrans_tl.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = ROOT / ".docs/pages"
ERRORS = sorted(page for page in (PAGES / "errors").glob("*.md") if page.name != "index.md")
OTHERS = [page for page in sorted(PAGES.rglob("*.md")) if page not in ERRORS]
SLOW = {README, PAGES / "thinking.md", PAGES / "api/commands.md"}
SET_UP = 2
"""README's first bash blocks: they make an environment, and .ci/run runs them as they stand."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    printed: str | None = None
    """What a text block directly behind says that this one prints."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, a text block that shows what one prints with that one."""
    text = page.read_text(encoding="utf-8")
    fences = list(re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.S | re.M))
    assert 2 * len(fences) == len(re.findall(r"^\s*```", text, re.M)), f"{page}: a fence is not closed, or is indented"
    found: list[Block] = []
    for before, fence in zip([None, *fences], fences, strict=False):
        language, content = fence.groups()
        behind = before is not None and not text[before.end() : fence.start()].strip()
        if language == "text" and behind and found and found[-1].language == "python":
            last = found.pop()
            found.append(Block(last.language, last.text, last.line, content))
        else:
            found.append(Block(language, content, text[: fence.start(2)].count("\n")))
    return found


def run(page: Path, namespace: dict[str, Any]) -> None:
    """The page's Python blocks, each of which must print what the page says it prints."""
    for block in blocks(page):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), unchecked():
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        if block.printed is not None:
            shown = ".*?".join(map(re.escape, block.printed.split("...")))
            assert re.fullmatch(shown, printed.getvalue(), re.S), f"{page}, line {block.line}: {printed.getvalue()}"


def commands(block: Block) -> list[list[str]]:
    """Arguments of the block's `contrans` commands, as bash expands them; lines that do anything else are left out."""
    lines = block.text.replace("\\\n", " ").split("\n")
    script = ["contrans() { printf '%q ' \"$@\"; echo; }", *(line for line in lines if re.match(r"contrans |\w+=", line))]
    out = subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(script)], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in out.stdout.splitlines()]


def bash_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "bash"]


def on_the_papers_models(block: Block) -> bool:
    """Recipes on models and files that nobody can ship."""
    return "meta-llama/" in block.text


def runnable(page: Path) -> list[Block]:
    """The bash blocks whose commands need nothing but data/."""
    found = bash_blocks(page)[SET_UP if page == README else 0 :]
    return [block for block in found if not on_the_papers_models(block) and commands(block)]


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """In a folder that sees data/ as the repository's does."""
    here = Path.cwd()
    (folder / "data").symlink_to(ROOT / "data")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def named(pages: list[Path]) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if page in SLOW else []) for page in pages
    ]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first block of the errors' index makes."""
    namespace: dict[str, Any] = {}
    with working_in(tmp_path_factory.mktemp("errors")):
        run(PAGES / "errors/index.md", namespace)
    return namespace


@pytest.mark.parametrize("page", [README, *OTHERS, *ERRORS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_language_that_somebody_runs_or_reads(page):
    assert {block.language for block in blocks(page)} <= {"python", "bash", "text"}


@pytest.mark.parametrize("page", named(ERRORS))
def test_a_page_about_an_error_shows_it_as_it_is_printed_and_what_it_says_to_do_works(page, begun, tmp_path):
    with working_in(tmp_path):
        run(page, dict(begun))


@pytest.mark.parametrize("page", named([README, *(page for page in OTHERS if page != PAGES / "errors/index.md")]))
def test_the_python_of_a_page_runs_in_order(page, tmp_path):
    with working_in(tmp_path):
        run(page, {})


@pytest.mark.parametrize("page", named([page for page in (README, *OTHERS, *ERRORS) if runnable(page)]))
def test_the_commands_of_a_page_run(page, tmp_path, capsys):
    with working_in(tmp_path), unchecked():
        for block in runnable(page):
            for arguments in commands(block):
                assert main(arguments) == 0, f"contrans {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_the_readme_is_set_up_as_ci_sets_it_up():
    ci = (ROOT / ".ci/run").read_text()
    set_up = bash_blocks(README)[:SET_UP]
    assert all(block.text.startswith("python3 -m venv .venv") for block in set_up)
    assert f"blocks[:{SET_UP}]" in ci
    assert all(f'bash -euo pipefail "$work/command{number}"' in ci for number in range(1, SET_UP + 1))


def test_commands_on_the_papers_models_are_the_command_lines_own():
    [block] = [block for page in (README, *OTHERS) for block in bash_blocks(page) if on_the_papers_models(block)]
    asked = commands(block)
    for arguments in asked:
        command = get_command(app).commands[arguments[0]]
        parsed = command.make_context(arguments[0], arguments[1:]).params  # a usage error, if it cannot be parsed
        assert parsed["models"] and parsed["sentences"] == Path("wikisplit.txt") and parsed["dtype"] == "bfloat16"
    assert {arguments[1] for arguments in asked} == set(RECIPES)


def test_what_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


# --- what the pages say of the library ------------------------------------------------------------------------------


def messages() -> list[str]:
    """Patterns of all texts that stand in the library's source, `{...}` of an f-string being anything."""
    found = []
    for file in (ROOT / "contrans_tl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.escape(node.value))
    return [pattern for pattern in found if len(pattern.replace(".+", "")) > 20]


def test_messages_that_no_page_provokes_are_the_sources_own():
    said = messages()
    shown = [line for page in ERRORS for block in blocks(page) if block.language == "text" for line in block.text.splitlines()]
    assert len(shown) >= 9
    assert [line for line in shown if not any(re.fullmatch(pattern, line) for pattern in said)] == []


def modules() -> set[str]:
    """The public modules of the library, itself included."""
    found = {"contrans_tl"}
    for module in pkgutil.walk_packages(contrans_tl.__path__, "contrans_tl."):
        if not any(part.startswith("_") for part in module.name.split(".")) or module.name == "contrans_tl.__main__":
            found.add(module.name)
    return found


def test_every_public_module_is_on_one_page_of_the_reference():
    pages = [page.read_text(encoding="utf-8") for page in (PAGES / "api").glob("*.md")]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)]
    assert sorted(listed) == sorted(modules())


def test_every_name_of_the_package_is_listed_where_it_is_made():
    listed = re.findall(r"\[`(\w+)`\]\[([\w.]+)\]", (PAGES / "api/index.md").read_text(encoding="utf-8"))
    made = {name: f"{getattr(contrans_tl, name).__module__}.{name}" for name in contrans_tl.__all__}
    assert dict(listed) == made and len(listed) == len(made)


def test_the_table_of_commands_says_what_each_command_says_of_itself():
    page = (PAGES / "api/commands.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `contrans (\S+)` \| (.*) \|$", page, re.M))
    says = {name: command.help for name, command in get_command(app).commands.items()}
    assert listed == says


def test_what_the_navigation_lists_is_there():
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / ".docs/mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md"))
