"""Claims about the stories: each shows what its sentence says, and all can be run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import real_models
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


@pytest.mark.slow
def test_a_displaced_circuit_copies_without_an_induction_score_and_the_lag_profile_finds_it(tmp_path):
    found = tell("displaced-circuit", tmp_path)
    assert found["accuracy"] > 0.85 and found["induction"] < 0.3
    assert (found["first lag"], found["second lag"]) == (17, 21)
    assert (found["first lag expected"], found["second lag expected"]) == (17, 21)


@pytest.mark.slow
def test_a_trace_finds_the_mlp_where_a_fact_must_be_looked_up_and_ablation_agrees(tmp_path):
    found = tell("causal-trace", tmp_path)
    assert found["known"] > 0.95 and found["noised"] < 0.25
    assert found["MLP at the subject"] > 0.4 > 0.25 > found["MLP elsewhere, at most"]
    assert found["attention at the end"] > 0.9
    assert found["without MLPs at the subject"] < 0.25 < 0.4 < found["without MLPs elsewhere, at least"]


@pytest.mark.slow
def test_zero_positions_are_a_set_before_training_and_an_order_after(tmp_path):
    found = tell("zero-positions", tmp_path)
    assert found["positions before"] == 0 and found["change before"] < 1e-5 and found["accuracy before"] < 0.2
    assert found["positions after"] > 1 and found["change after"] > 0.5 and found["accuracy after"] > 0.95


@pytest.mark.slow
def test_a_transformer_fits_a_line_in_its_context_and_its_error_follows_least_squares(tmp_path):
    found = tell("in-context-regression", tmp_path)
    assert 0.8 < found["error with nothing seen"] < 1.2
    assert found["largest distance to least squares below three pairs"] < 0.25
    assert found["error with seven pairs"] < 0.2 and found["largest rise"] < 0.03
    assert found["least squares with three pairs"] < 1e-6


@pytest.mark.slow
def test_the_neuron_that_writes_the_space_is_missed_and_others_are_not(tmp_path):
    found = tell("neuron", tmp_path)
    assert found["added"] > 0 and found["lost"] > 0.05
    assert found["lost"] > 3 * found["lost without another, at most"]


@pytest.mark.slow
def test_the_answer_of_induction_is_read_after_the_last_layer_and_not_before(tmp_path):
    found = tell("logit-lens", tmp_path)
    assert found["second copy, output"] > 0.7 and found["mean rank, output"] < 3
    assert found["second copy, before the last layer"] < 0.15 and found["first copy, output"] < 0.1
    assert found["KL before the last layer"] > 1


@pytest.mark.real
def test_smollm2_shows_its_induction_heads_its_fact_and_who_wrote_it(tmp_path):
    real_models.smollm2()  # skips where the weights are absent
    found = tell("smollm2", tmp_path, quick=True)
    assert found["lowest induction score"] > 0.5
    assert found["loss without induction heads"] - found["loss"] > 4 * (
        found["loss without others"] - found["loss"]
    )
    assert found["loss without induction heads"] - found["loss"] > 0.3
    assert found["rank before layer 20"] > 100 and found["rank at the output"] == 1
    assert found["noised"] < 0.25 * found["clean"] and found["best resid_post"] > 0.9 * found["clean"]
    assert abs(found["sum"] - found["difference"]) < 1e-6 * found["size of the parts"]
    assert found["difference"] > 0
    assert found["log probability of Paris lost"] > 0.2 and found["log probability of an lost"] > 0.5
