"""python -m benchmarks.scaling: its arguments, and what its figures must be by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scaling.__main__ import H100, best, gpus, main, mask, tokens
from benchmarks.scaling.models import MODELS, Model
from benchmarks.scaling.steps import Step, Training, cluster


def test_amounts_are_read_as_they_are_written() -> None:
    assert [tokens(text) for text in ("4096", "128k", "1M", "0.5m")] == [4096, 131072, 1048576, 524288]
    assert gpus("8..4096") == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] and gpus("8,12") == [8, 12]
    assert mask("window:4k", 9999) == {"causal": True, "window": (4095, 0)}


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-1b", 1.50), ("llama-8b", 8.03), ("llama-70b", 70.55), ("llama-405b", 405.85)]
)
def test_models_have_as_many_weights_as_their_names_say(name: str, billions: float) -> None:
    """llama-1b's own tables are one; here they are two, as all the others'."""
    assert MODELS[name].weights / 1e9 == pytest.approx(billions, abs=0.01)


TINY = Model(layers=2, width=64, heads=8, key_heads=2, head_width=16, hidden=128, vocabulary=100)


def test_a_step_is_its_flops_where_links_take_no_time(tmp_path: Path) -> None:
    figures = json.loads(H100.read_text())
    figures["links"] = {"nvlink": {"link": 1e30, "latency": 0.0}}
    (tmp_path / "machine.json").write_text(json.dumps(figures))
    where = cluster(tmp_path / "machine.json", "nvlink")
    step = next(step for step in Training(TINY, 1024, {}).steps(4, where) if step.method == "gather")
    # Two products of 1,024 x 1,024 scores, a forward, it again, and a backward of two and a half.
    attention = 2 * (4 * 1024 * 1024 * 8 * 16) * 4.5 / 4 / figures["attention"]
    rest = (2 + 2 + 4) * 256 * TINY.products / figures["products"]
    assert step.attention == pytest.approx(attention) and step.seconds == pytest.approx(attention + rest)
    assert step.exposed == pytest.approx(0.0, abs=1e-12)


def test_the_best_step_is_the_fastest_that_fits() -> None:
    fast, slow, small = (
        Step(8, name, seconds, 1.0, 0.0, memory, memory < 10)
        for name, seconds, memory in (("a", 1.0, 20.0), ("b", 2.0, 5.0), ("c", 3.0, 15.0))
    )
    assert best([fast, slow, small]) is slow and best([fast, small]) is small


def test_figures_are_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama-1b", "--tokens", "8k", "--gpus", "2,8", "--mask", "documents:2k"]
    assert main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]) == 0
    assert "ring" in capsys.readouterr().out
    written = json.loads((tmp_path / "f.json").read_text())
    assert {step["gpus"] for step in written} == {2, 8} and all(step["seconds"] > 0 for step in written)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--link token-ring", "--link must be one of nvlink, ib400, ib200, got 'token-ring'"),
        ("--mask window", "--mask must be causal, full, window:SIZE or documents:SIZE, got 'window'"),
        ("--mask window:0", "must be at least 1, got 0"),
        ("--gpus 0..8", "must be at least 1, got 0"),
        ("--gpus 16..8", "must go up, got 16..8"),
        ("--tokens 0", "must be at least 1, got 0"),
        ("--machine nowhere.json", "nowhere.json"),
        (f"--machine {__file__}", f"--machine {__file__} is no JSON"),
    ],
)
def test_wrong_arguments_are_named(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err
