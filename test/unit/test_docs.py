"""What the documents say can be done: their commands exist, their examples run, the two READMEs agree."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_set import make_tiny_set

import config
import configs
import model
from recognizer import Recognizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^(?:\(umask 077; )?(?:[A-Z_]+=\S+ )*(bash|python|torchrun|pip) ")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """Every command of a page: lines of its blocks, comments and continuations aside, and what stands in backticks."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [" ".join(shlex.split(line, comments=True)) for line in lines if PROGRAM.match(line)]
    return [line for line in found if len(line.split()) > 1]


def test_serving_is_told_alike_in_both_languages():
    pages = [ROOT / "docs" / name for name in ("serving.md", "serving_zh.md")]
    assert commands(pages[0]) == commands(pages[1]) and len(commands(pages[0])) > 10
    assert blocks(pages[0], "python") == blocks(pages[1], "python")
    rows = [re.findall(r"^\|.*$", page.read_text(encoding="utf-8"), re.M) for page in pages]
    numbers = [[sorted(re.findall(r"[0-9]+(?:\.[0-9]+)?", row)) for row in found] for found in rows]
    assert numbers[0] == numbers[1]


def test_both_readmes_name_the_same_commands():
    english, chinese = (commands(ROOT / name) for name in ("README.md", "README_zh.md"))
    assert english == chinese and len(english) > 30
    assert blocks(ROOT / "README.md", "python") == blocks(ROOT / "README_zh.md", "python")
    numbers = [
        re.findall(r"^\|.*\d.*$", (ROOT / name).read_text(encoding="utf-8"), re.M)
        for name in ("README.md", "README_zh.md")
    ]
    assert len(numbers[0]) == len(numbers[1])


ALL = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page, line", ALL, ids=[f"{page}-{n}" for n, (page, _) in enumerate(ALL)])
def test_every_command_exists_with_its_options(page, line, monkeypatch):
    words = shlex.split(line.strip("()"))
    program = next((w for w in words if w.endswith((".py", ".sh"))), None)
    if "-m" in words and words[0] != "torchrun" or program is None:
        if "-m" not in words:
            return  # pip, or Python's own -c
        name = words[words.index("-m") + 1].replace(".", "/")
        program = next(
            f"{name}{end}" for end in (".py", "/__main__.py", "/__init__.py") if (ROOT / f"{name}{end}").exists()
        )
        source = (ROOT / program).read_text(encoding="utf-8")
        named = [word.split("=")[0] for word in words[words.index("-m") + 2 :] if word.startswith("--")]
        assert not [option for option in named if option not in ("--help",) and f'"{option}"' not in source]
        return
    assert (ROOT / program).exists() or not program.startswith(("train", "evaluate", "test/", "tools/"))
    if (
        program.startswith(("train", "evaluate", "test/train"))
        and "--help" not in words
        and "--list_configs" not in words
    ):
        monkeypatch.setattr(config, "load_plugins", lambda names: None)
        given = words[words.index(program) + 1 :]
        if "--config" in given and given[given.index("--config") + 1] not in configs.RECIPES:  # a file of the reader's
            at = given.index("--config")
            given = given[:at] + given[at + 2 :]
        argv, recipes = configs.take_config(given)
        config.parse_arguments(argv, training="eval" not in program, recipes=recipes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_picture_of_the_house_has_every_room_and_pip_installs_it():
    """CONTRIBUTING.md's picture, and the packages and modules that pyproject.toml names, against the root itself."""
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} - {"test", "work_space"}
    modules = {path.stem for path in ROOT.glob("*.py")}
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    assert [room for room in rooms if f"{room}/" not in house] == []
    assert [module for module in modules if f"{module}.py" not in house] == []
    for word in re.findall(r"[\w/]+/(?= )|\w+\.(?:py|sh|html)\b", house):
        assert list(ROOT.glob(f"**/{word.rstrip('/')}")) or word == "run/", word
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [module for module in modules - {"report"} if f'"{module}"' not in project] == []
    unpacked = rooms - {"benchmark", "scripts"}
    assert [room for room in unpacked if not re.search(rf'"{room}\*?"', project) and not room.startswith("plsc")] == []


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture


def test_the_ten_lines_of_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Recognizer.create("mobilefacenet", embedding_size=16, device="cpu").save("model.pth")
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        pixels = np.random.RandomState(seed).randint(0, 256, (112, 112, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(name)
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.splitlines()) <= 10
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r"a and [bc]: distance \d\.\d{3}, (one person|different people)", line) for line in lines]
    assert len(lines) == 2


@pytest.mark.slow
def test_a_backbone_of_one_s_own(tmp_path, monkeypatch):
    """docs/extending.md's file as a plugin, and its Python: trained, saved, loaded."""
    own, use = blocks(ROOT / "docs" / "extending.md", "python")
    make_tiny_set(tmp_path / "SET")
    (tmp_path / "own_backbone.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(model, "BACKBONES", dict(model.BACKBONES))
    try:
        options = config.parse_arguments(["--plugin=own_backbone.py", "--net_mode=small_conv", "--data_path=SET"])
        assert options.net_mode == "small_conv" and "small_conv" in model.BACKBONES
        exec(compile(use, "extending.md", "exec"), {})
        loaded = Recognizer.load("small_conv.pth", "cpu")
        assert type(loaded.backbone).__name__ == "SmallConv"
        assert loaded.embed(np.zeros((2, 112, 112, 3), np.uint8)).shape == (2, 512)
    finally:
        sys.modules.pop("own_backbone", None)
