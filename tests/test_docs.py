"""What docs/ promises: every field, cause and room is named, links lead somewhere, and all code in it runs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import BaseModel
from typer.testing import CliRunner

from edgecompress.cli import app
from edgecompress.int8 import causes
from edgecompress.searching.space import declared_space
from edgecompress.settings import recipe as recipes
from edgecompress.settings.configuration import FrozenSettings, validate
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.model_settings import ModelSettings, PreprocessingSettings
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.teacher_settings import TeacherSettings, TeacherSource
from edgecompress.settings.training_settings import AugmentSettings, TrainingSettings
from test_rooms import ORDER

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
TABLES: dict[str, type[BaseModel]] = {
    "Recipe": recipes.Recipe,
    "Data": recipes.DataSettings,
    "Model": ModelSettings,
    "Preprocessing": PreprocessingSettings,
    "Training": TrainingSettings,
    "Augmentation": AugmentSettings,
    "Stage `train`": recipes.TrainStage,
    "Stage `distill`": recipes.DistillStage,
    "Teacher": TeacherSettings,
    "One teacher of an ensemble": TeacherSource,
    "Stage `prune`": PruneStage,
    "Stage `factorize`": FactorizeStage,
    "Stage `quantize`": recipes.QuantizeStage,
    "Calibration": recipes.CalibrationSettings,
    "Scheme": recipes.SchemeSettings,
    "Stage `qat`": recipes.QatStage,
    "Gates": recipes.Gates,
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """What links can point at in a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(text: str) -> list[str]:
    """Every line of the shell blocks, continued lines joined, comments left out."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.partition("#")[0].split("&&")]
    return [part for part in parts if part]


RECIPES = [
    (path.name, text)
    for path in TEXTS
    for text in re.findall(r"```yaml[^\n]*\n(.*?)```", path.read_text("utf-8"), re.S)
]
CODE = [
    (path.name, text)
    for path in TEXTS
    for text in re.findall(r"```python[^\n]*\n(.*?)```", path.read_text("utf-8"), re.S)
]
DRAW = "import draw_rooms; print(draw_rooms.drawing(), end='')"


# ---- recipes.md against the settings


def own_fields(model: type[BaseModel]) -> dict[str, Any]:
    """Fields with a row of their own: those of training, and for qat of quantize, stand once unless they differ."""
    shared: dict[str, Any] = {}
    if model is not TrainingSettings and issubclass(model, TrainingSettings):
        shared |= TrainingSettings.model_fields
    if model is recipes.QatStage:
        shared |= {name: f for name, f in recipes.QuantizeStage.model_fields.items() if name != "kind"}
    return {name: f for name, f in model.model_fields.items() if name not in shared or shown(f) != shown(shared[name])}


def shown(field: Any) -> str:
    """A default as the tables write it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    if isinstance(default, FrozenSettings):
        return "its own"
    if default in ("", (), {}):
        return "empty"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def models_of(annotation: Any) -> set[type[BaseModel]]:
    """Every settings class that an annotation reaches."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (models_of(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*inner)
    return set().union(*map(models_of, typing.get_args(annotation)))


def choices_of(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for argument in typing.get_args(annotation) for choice in choices_of(argument)]


@pytest.mark.parametrize("heading", TABLES)
def test_every_field_of_a_recipe_is_documented(heading: str) -> None:
    section = page("recipes.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, flags=re.MULTILINE)
    rows = {name: (default, text) for name, default, text in found}
    fields = own_fields(TABLES[heading])
    assert {name: default for name, (default, _) in rows.items()} == {name: shown(f) for name, f in fields.items()}
    for name, field in fields.items():
        missing = [choice for choice in choices_of(field.annotation) if f"`{choice}`" not in rows[name][1]]
        assert not missing, f"{heading}: {name} can be {missing}"


def test_every_settings_class_has_a_table() -> None:
    assert models_of(recipes.Recipe) == set(TABLES.values()) - {TrainingSettings}


# ---- the other pages against the code


def test_every_cause_of_a_diagnosis_is_explained() -> None:
    known = {
        value for name, value in vars(causes).items() if name.isupper() and name[0] != "_" and isinstance(value, str)
    }
    assert set(re.findall(r"^\| `([\w -]+)` \|", page("int8.md"), flags=re.MULTILINE)) == known


def test_quoted_words_are_those_of_the_tool() -> None:
    """A symptom can be searched for only where it is quoted as the tool says it."""
    package = ROOT / "edgecompress"
    said = "".join(path.read_text("utf-8") for path in [*package.rglob("*.py"), *package.rglob("*.j2")])
    prose = re.sub(r"```.*?```", "", page("int8.md") + page("pruning.md"), flags=re.DOTALL)
    quoted = re.findall(r'(?<!`)"([^"`]{8,})"(?!`)', prose)
    assert len(quoted) >= 5
    assert [words for words in quoted if words not in said] == []


@pytest.mark.parametrize("schema", ["run", "profile"])
def test_the_keys_of_the_run_directory_are_those_of_the_schemas(schema: str) -> None:
    title = {"run": "run.json", "profile": "profile/&lt;target&gt;.json"}[schema]
    section = page("run-directory.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    named = {
        key for cell in re.findall(r"^\| (`.+?) \|", section, flags=re.MULTILINE) for key in re.findall(r"`(\w+)", cell)
    }
    document = json.loads((ROOT / "edgecompress" / "schemas" / f"{schema}.json").read_text())
    assert named <= set(document["properties"])
    assert set(document["required"]) - {"not_measured_because", "versions", "target_facts"} <= named


def test_the_tree_names_every_module_and_no_other() -> None:
    (tree,) = [block for block in blocks(page("architecture.md"), "text") if "errors.py" in block]
    rooms, listed = [""], set()
    for indent, name in re.findall(r"^( *)([\w/]+\.py|\w+/) ", tree.partition("\nrecipes/")[0], flags=re.MULTILINE):
        rooms = rooms[: len(indent) // 2]
        if name.endswith("/"):
            rooms.append(name)
        else:
            listed.add("".join(rooms[1:]) + name)
    package = ROOT / "edgecompress"
    present = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.stem.startswith("__")}
    assert listed == present


def test_the_picture_of_the_rooms_is_what_the_code_says() -> None:
    drawn = subprocess.run([sys.executable, "-c", DRAW], cwd=DOCS, capture_output=True, text=True, check=True).stdout
    assert page("rooms.svg") == drawn, "run: python docs/draw_rooms.py"
    assert re.findall(r'class="room"[^>]*>([^<]+)<', drawn) == ["foundation", *ORDER]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", drawn)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        name, _, anchor = link.partition("#")
        there = path if not name else path.parent / name
        assert there.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{path.name}: {link}"


def test_the_site_shows_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(re.findall(r"[\w-]+\.md", str(site["nav"]))) == [path.name for path in PAGES]
    assert (site["strict"], site["theme"]["font"]) == (True, False)


# ---- code


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_parses(path: Path) -> None:
    """Every command and option of a shell block exists."""
    for command in commands(path.read_text(encoding="utf-8")):
        if not command.startswith("edgecompress"):
            continue
        words = shlex.split(command.partition(">")[0])[1:]
        name = words[:2] if words[0] in ("recipes", "targets", "runs", "schema") else words[:1]
        answer = CliRunner().invoke(app, [*name, "--help"])
        assert answer.exit_code == 0, command
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in answer.output, f"{command}: {option}"


@pytest.mark.parametrize(("name", "text"), RECIPES)
def test_every_recipe_is_valid(name: str, text: str) -> None:
    document = yaml.safe_load(text)
    if isinstance(document, list):  # a stage alone, as it stands in a list
        before = {"id": "dense", "kind": "train"}
        document = {"data": {"name": "digits"}, "model": {"name": "resnet8"}, "stages": [before, *document]}
    document = {"name": "docs"} | document
    space = declared_space(document, source=name)
    if space is None:
        validate(recipes.Recipe, document, source=name)


@pytest.mark.parametrize(("name", "text"), [block for block in CODE if "title=" not in block[1]])
def test_python_is_valid_and_imports_what_there_is(name: str, text: str) -> None:
    for node in ast.walk(ast.parse(text, filename=name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "edgecompress":
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half of work, and a machine may be busy
def test_the_code_of_the_python_page_runs(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page("python.md"), "python")), encoding="utf-8")
    answer = run_python(script, folder=tmp_path)
    assert answer.returncode == 0, answer
    assert [line for line in answer.stderr.splitlines() if "nothing is timed" not in line] == []
    assert "\nTrue runs/steps/bundle" in answer.stdout
    assert answer.stdout.splitlines()[-1].startswith(("Trial ", "None of the "))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute of work, and a machine may be busy
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its files are written as they stand there, and its commands given in their order, on made-up images."""
    made_up_images(tmp_path / "my_images")
    text = page("tutorial.md")
    for title, content in re.findall(r'```\w+ title="(.*?)"\n(.*?)```', text, flags=re.DOTALL):
        (tmp_path / title).write_text(content, encoding="utf-8")
    given = commands(text)
    assert len(given) >= 7
    for command in given:
        answer = run_python("-m", *shlex.split(command), folder=tmp_path)
        assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    manifest = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert [stage["accuracy"] > 0.6 for stage in manifest["stages"]] == [True, True, True]
    assert (tmp_path / "runs" / "mine" / "report" / "rpi4.html").is_file()
    assert "verified: archive" in answer.stdout


def run_python(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 1500, "check": False}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, **how)


def made_up_images(root: Path) -> None:
    """Three classes of one coloured shape each on noise, as JPEG files of 40 x 40."""
    random = np.random.default_rng(0)
    down, right = np.mgrid[0:40, 0:40]
    for split, count in {"train": 30, "val": 12, "test": 12}.items():
        for place, name in enumerate(("daisy", "rose", "tulip")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(110, 25, (40, 40, 3))
                y, x = random.integers(14, 26, 2)
                radius = random.integers(7, 12)
                shape = [
                    (down - y) ** 2 + (right - x) ** 2 < radius**2,
                    (abs(down - y) < radius) & (abs(right - x) < radius),
                    abs(down - y) + abs(right - x) < radius,
                ][place]
                pixels[shape] += np.roll([60, -20, 20], place)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
