"""The book keeps its own rules: shape of chapters, direction of imports, sizes, documentation, fresh exports."""
import ast
import json
import re
from pathlib import Path

import pytest

from shisa import book
from shisa.pipeline import CHAPTERS, STAGES, WITHOUT_STAGE

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "shisa").glob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def order() -> dict[str, tuple[int, str]]:
    """Module name → its place: rooms of lib before chapters, each by number."""
    places = {}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if found := re.match(r"#\|\s*default_exp (\w+)", book.source(cell)):
                places[found[1]] = (0 if path.parent.name == "lib" else 1, path.stem)
    return places


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_module_size_imports_and_documentation(module):
    text, places = module.read_text(), order()
    assert text.count("\n") <= 400, "split it"
    own = places[module.stem]
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), "no star imports"
            late = module.stem == "cli" and node not in tree.body  # a command imports the chapter that it runs
            if not late and (node.level == 1 or (node.module or "").startswith("shisa.")):
                target = (node.module or "").removeprefix("shisa.").split(".")[0]
                if target:
                    assert places[target] < own, f"{module.stem} imports {target}, which comes after it"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 100, f"{node.name} has {lines} lines"
            if not node.name.startswith("_") and node in tree.body:
                assert ast.get_docstring(node), f"{node.name} has no docstring"
                assert node.returns is not None, f"{node.name} has no return type"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_modules_import_fast(module):
    """torch and its kind are imported inside functions: the command line imports every chapter to decide what to skip."""
    heavy = {"torch", "aiohttp", "transformers", "trl", "datasets", "matplotlib", "sentencepiece", "tokenizers", "accelerate", "openai", "peft"}
    for node in ast.parse(module.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {name.split(".")[0] for name in names}, f"{module.stem} imports {names} at the top"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_the_shape_of_a_chapter(chapter):
    notebook = book.read_notebook(ROOT / "nbs" / f"{chapter}.ipynb")
    cells = notebook["cells"]
    assert "google.colab" in book.source(cells[0]) and "#| hide" in book.source(cells[0])
    titles = [book.source(c) for c in cells if c["cell_type"] == "markdown"]
    assert titles[0].startswith("# ") and "\n> " in titles[0]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and 'profile = "tiny"' in book.source(tagged[0])
    runs = [c for c in cells if f'run_stage("{chapter}"' in book.source(c)]
    assert (chapter in WITHOUT_STAGE) == (not runs)
    assert all("#| eval: false" in book.source(c) for c in runs)
    assert len(cells) <= 90


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_exported_clean_and_light(path):
    notebook = book.read_notebook(path)
    assert path.stat().st_size <= 300_000
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["execution_count"] is None
        assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in cell["outputs"])
    name = next((m[1] for c in notebook["cells"] if (m := re.match(r"#\|\s*default_exp (\w+)", book.source(c)))), None)
    assert name is None or (ROOT / "shisa" / f"{name}.py").is_file()


def test_every_stage_declares_inputs_that_come_before_it():
    from shisa.stage import get_stage

    for name in STAGES:
        stage = get_stage(name)
        assert stage.name == name and all(STAGES.index(i) < STAGES.index(name) for i in stage.inputs)
        for profile in ("tiny", "small", "h100", "a100x16"):
            stage.config(profile)


def test_outputs_are_fresh():
    assert book.stale(ROOT) == [], "run: shisa refresh"


def test_at_most_64_modules():
    # one for each row of DESIGN.md's table (37), chapter 39, and rooms that keep files short: config, models, packing, losses, tuning, cost, claims,
    # report, cli, book, pieces, kept, amounts, language, talk, faults, store, wire, client, bundled, shapes, sets, anew, novelty, card, sides, prompts
    assert len(MODULES) <= 64
