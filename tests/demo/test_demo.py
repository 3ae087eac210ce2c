"""Claims about the demo: the two models are one model, the memory differs, and induction heads form."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.cli import main
from fastattn.demo import induction, text, threads
from fastattn.demo.screen import name_of, readable
from fastattn.errors import CommandError
from fastattn.lens import HeadScores

CPU = torch.device("cpu")
PROSE = b"the quick brown fox jumps over the lazy dog, and the dog looks on. " * 100


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[str, Path]:
    """What a quick demo prints, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_bytes(PROSE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["demo", "--quick", "--steps", "3", "--text", str(folder / "text.txt")]
        assert main([*arguments, "--device", "cpu", "--output", str(folder / "new" / "pictures")]) == 0
    return printed.getvalue(), folder / "new" / "pictures"


def test_the_demo_writes_its_pictures_and_prints_their_paths(quick_run):
    printed, folder = quick_run
    for name in ("text_training.png", "induction.png", "head_scores.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
        assert name in printed.replace("\n", "")


def test_piped_output_is_plain_text_without_escapes_or_bars(quick_run):
    printed, _ = quick_run
    assert "\x1b" not in printed and "\r" not in printed and "━" not in printed
    assert all(words in printed for words in ("held-out bits per byte", "peak memory", "layer", "duplicate"))


def test_the_eager_twin_computes_the_same_loss_and_gradients_without_a_fused_operator():
    fused, eager = text.make_runs(0, CPU, None)
    batch = torch.randint(256, (2, 65))

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.fused = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "fastattn":
                self.fused.add(function.name())
            return function(*args, **(kwargs or {}))

    used, losses = {}, {}
    for run in (fused, eager):
        run.model.double()
        with Operators() as operators:
            losses[run.name] = text.loss_of(run.model, batch)
            losses[run.name].backward()
        used[run.name] = operators.fused
    families = {name.split("::")[1].split("_")[0] for name in used["fastattn"]}
    assert families == {"attention", "mlp", "prepare"} and used["eager"] == set()
    assert len(used["fastattn"]) == 6  # each forward and backward
    torch.testing.assert_close(losses["fastattn"], losses["eager"], atol=1e-12, rtol=1e-12)
    for one, other in zip(fused.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-9)


def test_both_models_train_alike_to_rounding_and_held_out_bits_fall():
    runs = text.make_runs(0, CPU, None)
    for _ in text.train(runs, text.Corpus.split(PROSE), 6, 3, seed=0):
        pass
    assert text.largest_difference(runs) < 1e-4
    for run in runs:
        assert [step for step, _ in run.held_out] == [0, 3, 6]
        assert run.held_out[-1][1] < run.held_out[0][1]
        assert len(run.losses) == len(run.seconds) == 6


def test_eager_memory_grows_faster_than_fused():
    runs, corpus = text.make_runs(0, CPU, None), text.Corpus.split(PROSE)
    short, long = (text.measure_cost(runs, corpus, length, repeats=1).peak_bytes for length in (256, 1024))
    assert long[0] < 4.3 * short[0], "fused memory is linear in the length"
    assert long[1] > 7 * short[1], "eager memory is not"
    assert long[1] > 2 * long[0]


def test_nothing_that_is_held_out_is_trained_on():
    data = bytes(range(256)) * 40
    corpus = text.Corpus.split(data)
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == data
    marked = text.Corpus(torch.zeros(500, dtype=torch.long), torch.ones(500, dtype=torch.long))
    generator = torch.Generator().manual_seed(0)
    assert all(marked.batch(generator).sum() == 0 for _ in range(50))
    assert marked.held_out_windows(400).sum() == marked.held_out_windows(400).numel()


def test_too_short_a_text_is_refused_by_its_length():
    with pytest.raises(CommandError, match="at least 2580 bytes, got 2579"):
        text.Corpus.split(b"a" * 2579)
    text.Corpus.split(b"a" * 2580)


def test_the_passage_is_prose_if_there_is_any():
    table = b"| 1 | 2 | 3 |\n" * 100
    corpus = text.Corpus.split(b"0" * 30_000 + table + PROSE[:400] + table)
    assert b"brown fox" in bytes(corpus.passage().tolist())


def test_a_sample_depends_on_its_seed_alone():
    model, prompt = text.make_runs(0, CPU, None)[0].model, torch.tensor(list(b"the "))
    first, again, other = (bytes(text.sample(model, prompt, 12, seed, temperature=50)) for seed in (1, 1, 2))
    assert len(first) == 12 and first == again != other


def test_sequences_repeat_with_the_period_of_their_row():
    tokens, period = induction.repeated_sequences(torch.Generator().manual_seed(0), batch=200)
    assert tokens.shape == (200, 49) and (tokens[:, 0] == induction.START).all()
    assert period.min() == 8 and period.max() == 24
    for row, length in zip(tokens[:, 1:], period.flatten().tolist(), strict=True):
        assert torch.equal(row[length:], row[:-length])


def make_looks(losses: list[float]) -> list[induction.Look]:
    scores = HeadScores(*(torch.zeros(2, 4) for _ in range(4)))
    return [induction.Look(10 * step, 4.0, loss, 0.0, scores) for step, loss in enumerate(losses)]


def test_the_phase_change_is_where_most_of_the_loss_falls():
    assert induction.phase_change(make_looks([4, 3.9, 3.8, 2, 0.3, 0.1, 0])) == (30, 40)
    assert induction.phase_change(make_looks([4, 3.9, 3.8, 3.7])) is None


def test_a_head_is_called_by_a_score_only_if_it_is_well_above_chance():
    assert name_of([0.9, 0.02, 0.1, 0.3], [0.1] * 4) == "induction head"
    assert name_of([float("nan"), 0.5, 0.1, 0.45], [0.1] * 4) == "previous token head"
    assert name_of([0.2, 0.1, 0.45, 0.1], [0.1, 0.1, 0.3, 0.1]) == ""


@pytest.mark.parametrize(
    ("seconds", "settled"),
    [({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39}, 4), ({1: 1.0, 2: 9.0}, 1), ({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.2}, 8)],
)
def test_threads_are_doubled_only_as_long_as_that_pays(seconds, settled, monkeypatch):
    monkeypatch.setattr(threads, "_mean_seconds", lambda step, count, repeats: seconds[count])
    with threads.restored_threads():
        before = torch.get_num_threads()
        assert threads.settle_threads(lambda: None, most=8) == torch.get_num_threads() == settled
    assert torch.get_num_threads() == before


def test_control_characters_do_not_reach_the_terminal():
    assert readable(b"a\x1b[31m\xff\n\xc3\xa9") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}\né"


@pytest.mark.slow
def test_induction_heads_form_in_two_layers_and_not_in_one():
    last = {}
    for layers in (1, 2):
        training = induction.Training(induction.make_model(0, CPU, layers=layers))
        for _ in induction.train(training, 400, 20, seed=0):
            pass
        last[layers] = training.looks[-1]
    change = induction.phase_change(training.looks)
    assert change is not None and change[1] - change[0] <= 150
    assert last[2].accuracy > 0.95
    assert last[2].scores.induction[1].max() > 0.7 and last[2].scores.induction[0].max() < 0.2
    assert last[2].scores.previous_token[0].max() > 0.7
    assert last[1].accuracy < 0.25 and last[1].scores.induction.max() < 0.2
