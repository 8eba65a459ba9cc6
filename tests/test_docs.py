"""What the documents say exists: commands, options, files, names; shipped configurations run."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from support import ROOT

import patternsearch
from patternsearch.cli import app, main
from patternsearch.config import load_config
from patternsearch.files import shipped

README = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
OPTIONS = {
    name: {option for p in command.params for option in p.opts} | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()
}


def commands() -> list[list[str]]:
    """Every use of the command line in the README, in a block or in a line, as words."""
    texts = [
        line for kind, text in BLOCKS if kind in ("sh", "bash", "") for line in text.split("\n")
    ]
    texts += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    found = []
    for text in texts:
        for part in re.split(r"&&|;|\|", text):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            words = words[1:] if words and words[0] == "$" else words
            if words and Path(words[0]).name == "patternsearch" and len(words) > 1:
                found.append(words[1:])
    return found


def test_the_readme_shows_the_commands():
    used = {words[0] for words in commands()}
    assert used >= {"sweep", "export", "train", "show", "list", "ui"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_readme_exist(words):
    name, *rest = words
    assert name in OPTIONS
    for word in rest:
        if word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
            assert word.partition("=")[0] in OPTIONS[name], f"{name} has no {word}"
    for change in (rest[i + 1] for i, word in enumerate(rest) if word == "--set"):
        load_config("digits", [change])


def test_options_named_alone_exist():
    everything = set.union(*OPTIONS.values())
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for option in re.findall(r"`(--[\w-]+)", prose):
        assert option in everything, option


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\[[^\]]*\]\(([^)#]+)[^)]*\)", README)
    local = [link for link in links if "://" not in link]
    assert local, "the README links to nothing of its own"
    for link in local:
        assert (Path(ROOT) / link).exists(), link


def test_python_of_the_readme_uses_names_that_exist():
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert blocks
    for text in blocks:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "patternsearch":
                for alias in node.names:
                    assert hasattr(patternsearch, alias.name), alias.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "patternsearch":
                    assert hasattr(patternsearch, node.attr), node.attr


def test_the_task_of_the_readme_is_a_task(tmp_path, monkeypatch, capsys):
    from patternsearch.task import open_task

    text = next(t for kind, t in BLOCKS if kind == "python" and "(Task)" in t)
    (tmp_path / "readme_task.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = re.search(r"class (\w+)\(Task\)", text)[1]
    task, data = open_task(f"readme_task:{name}")
    assert len(data.train[0]) > len(data.test[0]) > 0
    config = load_config(f"readme_task:{name}")
    assert config.space is None and task.space in shipped("spaces")
    with pytest.raises(SystemExit) as caught:
        main(["sweep", f"readme_task:{name}", "--dry-run"])
    assert not caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(shipped("configs")))
def test_shipped_configurations_pass_a_dry_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", name, "--dry-run"])
    out, err = capsys.readouterr()
    assert not caught.value.code and err == "" and f"task        {name}" in out
    assert "left out" not in out, "an expert's design that the caps leave out is no comparison"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["configs", "spaces"])
def test_shipped_files_say_what_they_are(folder):
    for name, path in shipped(folder).items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 30, f"{folder}/{name}"
