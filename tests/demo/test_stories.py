"""Claims about the stories: each shows what its sentence says, and all can be run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from fastattn.cli import main
from fastattn.demo import stories
from fastattn.demo.stories.stage import Stage
from fastattn.errors import CommandError

NEEDS_WEIGHTS = ("smollm2",)


def tell(name: str, folder: Path, **options) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        stage = Stage(output=folder, device=torch.device("cpu"), **options)
        with stage.open(name, ""):
            return stories.find(name).tell(stage)


def test_the_list_names_every_story_with_its_sentence(capsys):
    assert main(["demo", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [[s.name, s.sentence] for s in stories.STORIES]
    folder = Path(stories.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "stage"}
    assert files == {story.module for story in stories.STORIES}


@pytest.mark.parametrize("name", [s.name for s in stories.STORIES if s.name not in NEEDS_WEIGHTS])
def test_a_quick_story_prints_a_table_and_leaves_a_picture(name, tmp_path, capsys):
    assert main(["demo", "--story", name, "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in printed.replace("\n", "")
    assert "\x1b" not in printed and len(printed.splitlines()) > 8


def test_the_same_seed_tells_the_same_story(tmp_path):
    one, other = (tell("positional-shortcut", tmp_path, quick=True) for _ in range(2))
    assert one == other != tell("positional-shortcut", tmp_path, quick=True, seed=1)


def test_an_unknown_story_and_options_that_no_story_has_are_refused():
    with pytest.raises(CommandError, match=r"--story must be one of induction, .*got 'deduction'"):
        stories.find("deduction")
    for arguments in (["--steps", "0"], ["--text", "novel.txt"], ["--device", "tpu"]):
        assert main(["demo", "--story", "induction", *arguments]) == 1


@pytest.mark.slow
def test_induction_heads_form_at_once_in_two_layers_and_never_in_one(tmp_path):
    found = tell("induction", tmp_path)
    assert found["accuracy"] > 0.95 and found["steps of the phase change"] <= 150
    assert found["induction in layer 1"] > 0.7 and found["induction in layer 0"] < 0.2
    assert found["previous token in layer 0"] > 0.7
    assert found["accuracy of one layer"] < 0.25 and found["induction of one layer"] < 0.2


@pytest.mark.slow
def test_a_distance_scores_as_induction_until_the_period_changes(tmp_path):
    found = tell("positional-shortcut", tmp_path)
    assert found["accuracy"] > 0.95 and found["induction in layer 0"] > 0.7
    assert found["previous token in layer 0"] < 0.2
    assert found["lag"] == found["lag, other period"] == 15
    assert found["accuracy, other period"] < 0.1 and found["induction in layer 0, other period"] < 0.1
