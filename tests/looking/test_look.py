"""Claims about `fastattn look`: the page holds the lens's numbers, is small, and works in a browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import lens_models
import numpy as np
import pytest
import real_models
import torch
from browser import browser
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import lens
from fastattn.cli import main
from fastattn.demo import induction
from fastattn.looking import page, report, subjects
from fastattn.nn import TransformerModel

LENGTH = 64


class Letters:
    """A tokenizer whose ids are letters, and three tokens that a page could trip over."""

    words = ("</script><b>", "\n", " ", *(chr(ord("A") + i) for i in range(47)))

    def encode(self, text, add_special_tokens=True):
        return [self.words.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def model_named(name: str, **fields):
    return lens_models.make(name, num_layers=2, **fields) if name.startswith("own") else lens_models.make(name)


def text(length: int = LENGTH) -> torch.Tensor:
    """Random ids, twice the same, so that every head has every score."""
    half = lens_models.text(1, length // 2)
    ids = torch.cat([half, half], 1)
    ids[0, 5:8] = torch.arange(3)
    return ids


def contents(written: str) -> dict:
    """The JSON in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.S)[1])


def unpacked(about: dict) -> torch.Tensor:
    """As the page's script unpacks an array."""
    kind = {"f32": "<f4", "u32": "<u4", "u16": "<u2", "u8": "u1"}[about["kind"]]
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(about["data"])), kind).astype(float)
    if "scale" in about:
        most = 2 ** int(about["kind"][1:]) - 1
        scale = np.repeat(about["scale"], len(numbers) // len(about["scale"]))
        numbers = scale * (numbers / most) ** about["power"]
    return torch.tensor(numbers).view(about["shape"])


def close(actual, expected, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected.double(), rtol=rtol, atol=atol)


def close_in_16_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The square roots of received weights (heads, L) agree to half a step, as shares of the largest of a head."""
    most = expected.amax(-1, keepdim=True).double()
    close((actual / most).sqrt(), (expected.double() / most).sqrt(), rtol=0, atol=0.51 / 65535)


# ---- the numbers ----


@pytest.fixture(scope="module")
def model():
    return model_named("own-gated")


@pytest.fixture(scope="module")
def made(model):
    return report.make_report(model, text(), title="A <small> model", tokenizer=Letters())


@pytest.fixture(scope="module")
def written(made):
    return page.make_page(made)


@pytest.fixture(scope="module")
def held(written):
    return contents(written)


def test_the_page_holds_the_scores_of_every_head(model, held):
    known = lens.head_report(model, text())
    for name in ("induction", "previous token", "duplicate token", "first token", "entropy", "mean distance"):
        close(held["scores"][name], getattr(known, name.replace(" ", "_")))
    assert set(held["scores"]) == {*(name.replace("_", " ") for name in report.SCORES), "largest weight"}
    assert held["chance"]["induction"] == known.chance["induction"]


def test_the_page_holds_what_each_head_reads_to_the_last_step_of_its_quantisation(model, held):
    names = [f"blocks.*.attention.{name}" for name in ("pattern", "max_weight")]
    with lens.watch(model, names) as seen, torch.no_grad():
        model(text())
    pattern = seen[names[0]][:, 0]
    close(held["scores"]["largest weight"], seen[names[1]][:, 0].mean(-1))
    assert held["detail"]["all"] and held["detail"]["top"] == report.TOP_KEYS
    for layer, about in enumerate(held["detail"]["layers"]):
        assert about["heads"] == list(range(4))
        close_in_16_bits(unpacked(about["received"]), pattern[layer].sum(1))
        best, order = pattern[layer].topk(report.TOP_KEYS, dim=-1)
        keys, weights = unpacked(about["keys"]).long(), unpacked(about["weights"])
        there = best > 0
        assert torch.equal(keys[there], order[there]) and (keys[~there] == page.NO_KEY).all()
        close(weights, best, rtol=0, atol=0.51 / 255)


def test_lags_are_told_one_by_one_and_then_in_bins_that_hold_every_lag_once(model, held):
    with lens.watch(model, "blocks.*.attention.pattern") as seen, torch.no_grad():
        model(text())
    pattern = seen["blocks.*.attention.pattern"][:, 0]
    bins = held["lags"]["bins"]
    assert [lag for start, to in bins for lag in range(start, to + 1)] == list(range(LENGTH))
    of_lags = torch.stack([pattern.diagonal(-lag, -2, -1).sum(-1) for lag in range(LENGTH)], -1) / LENGTH
    expected = torch.stack([of_lags[..., start : to + 1].sum(-1) for start, to in bins], -1)
    close(unpacked(held["lags"]["weights"]), expected)


@given(st.integers(1, 5000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_bins_of_lags_hold_every_lag_once(length, ahead):
    bins = page.lag_bins(length, ahead)
    lags = [lag for start, to in bins for lag in range(start, to + 1)]
    assert lags == list(range(1 - length if ahead else 0, length))
    assert len(bins) <= 2 * (page.EXACT_LAGS + 8 * page.BINS_PER_OCTAVE)


@given(st.lists(st.floats(0, 4096), min_size=1, max_size=50), st.sampled_from([("u8", 1), ("u16", 2)]))
@settings(max_examples=50, deadline=None)
def test_a_quantised_number_is_within_half_a_step(values, way):
    kind, power = way
    values = torch.tensor(values, dtype=torch.float64)
    most = float(values.max())
    back = unpacked(page.packed(values[None], kind, scale=values[None].amax(-1, keepdim=True), power=power))[0]
    half = 0.5 / (2 ** int(kind[1:]) - 1)
    roots = (values / max(most, 1e-300)) ** (1 / power)
    assert ((back - values).abs() <= most * ((roots + 1.01 * half) ** power - roots**power) + 1e-12).all()


def test_the_page_holds_the_logit_lens_with_the_next_token_as_target(model, held):
    ids = text()
    about = held["lens"]
    best = lens.logit_lens(model, ids, 1).tokens[-1, 0, -1, 0]
    targets = torch.cat([ids[:, 1:], best.view(1, 1)], 1)
    expected = lens.logit_lens(model, ids, report.LENS_TOP, targets)
    assert about["positions"] == list(range(LENGTH)) and held["target"] == int(best)
    assert torch.equal(unpacked(about["tokens"]).long(), expected.tokens[:, 0])
    assert torch.equal(unpacked(about["rank"]).long(), expected.target_rank[:, 0])
    for name, values in {
        "probabilities": expected.probabilities,
        "entropy": expected.entropy,
        "kl": expected.kl,
        "probability": expected.target_probability,
    }.items():
        close(unpacked(about[name]), values[:, 0])


def test_the_page_holds_the_attribution_of_the_two_most_probable_tokens(model, held):
    best = lens.logit_lens(model, text(), 2, positions=-1).tokens[-1, 0, 0].tolist()
    expected = lens.attribution(model, text(), *best)
    about = held["attribution"]
    assert [about["target"], about["against"]] == [Letters.words[i] for i in best]
    close(about["total"], expected.total[0])
    assert list(about["components"]) == list(expected.components)
    close(list(about["components"].values()), torch.stack(list(expected.components.values()))[:, 0])
    close(about["heads"], expected.heads[..., 0])
    assert len(about["sources"]) == report.SOURCES
    for name, values in about["sources"].items():
        layer, head = map(int, re.fullmatch(r"L(\d+)H(\d+)", name).groups())
        close(unpacked(values), expected.head_by_source(layer, head)[0])
        assert float(unpacked(values).sum()) == pytest.approx(about["components"][name], abs=1e-5)


def test_the_page_holds_the_neurons_that_write_the_target(model, held):
    expected = lens.neurons(model, held["target"], text(), top=report.TOP_NEURONS)
    assert [n["name"] for n in held["neurons"]] == [f"L{n.layer}N{n.neuron}" for n in expected.top]
    close([[n["congruence"], n["mean"]] for n in held["neurons"]], torch.tensor([n[2:4] for n in expected.top]))
    assert held["neurons"][0]["fires"] == [[f.position, f.contribution] for f in expected.top[0].fires]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "own-encoder", "own-attention-only"])
def test_every_family_has_a_page_and_what_it_cannot_be_asked_is_said(name):
    made = report.make_report(model_named(name), text(16), title=name)
    held = contents(page.make_page(made))
    assert len(held["scores"]["induction"]) == len(held["detail"]["layers"])
    refused = {"bert": {"attribution", "neurons"}, "own-attention-only": {"neurons"}}.get(name, set())
    assert set(held["missing"]) == refused
    for section in ("lens", "attribution", "neurons"):
        assert (held[section] is None) == (section in refused)
    # A model that looks ahead has weight before and behind.
    assert (held["lags"]["bins"][0][0] < 0) == (name in ("bert", "own-encoder"))


def test_word_pieces_and_words_read_as_they_stand_in_a_text(model):
    from needs_transformers import transformers

    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "the": 1, "play": 2, "##ing": 3, "cat": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Whitespace(), tokenizers.decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = torch.tensor([tokenizer.encode("the cat playing the cat")])
    held = contents(page.make_page(report.make_report(model, ids, title="", tokenizer=tokenizer, target=4)))
    assert [held["words"][str(i)] for i in ids[0].tolist()] == [" the", " cat", " play", "ing", " the", " cat"]


def test_a_target_alone_is_not_held_against_another(model):
    made = report.make_report(model, text(16), title="", tokenizer=Letters(), target="C")
    about = contents(page.make_page(made))["attribution"]
    assert about["target"] == "C" and about["against"] is None
    close(about["total"], lens.attribution(model, text(16), Letters.words.index("C")).total[0])


# ---- the size ----


def test_4096_tokens_of_a_small_model_are_below_5_megabytes():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "embed_dim": 16, "num_heads": 2, "num_layers": 1}
    model = TransformerModel(**sizes, positions="rotary").eval()
    made = report.make_report(model, text(page.MOST_TOKENS), title="long", tokenizer=Letters())
    written = page.make_page(made)
    assert len(written.encode()) < 5_000_000
    held = contents(written)
    assert held["detail"]["all"] and len(held["lens"]["positions"]) == report.LENS_POSITIONS
    for layer, about in enumerate(held["detail"]["layers"]):
        close_in_16_bits(unpacked(about["received"]), made.heads.received[layer])


@pytest.mark.parametrize(("heads", "fewest"), [(12, 12 * 12), (32, 1)])
def test_many_heads_at_4096_tokens_are_told_in_as_much_detail_as_fits(made, heads, fewest):
    """Random keys and weights: no real head is harder to deflate."""
    layers, length, top = heads, page.MOST_TOKENS, report.TOP_KEYS
    generator = torch.Generator().manual_seed(0)
    many = report.Heads(
        scores={name: torch.rand(layers, heads, generator=generator) for name in made.heads.scores},
        chance={},
        lag_profile=torch.zeros(1, 1, 1).expand(layers, heads, 2 * length - 1),
        received=torch.rand(1, heads, length, generator=generator).expand(layers, -1, -1),
        keys=torch.randint(length, (1, heads, length, top), generator=generator).expand(layers, -1, -1, -1),
        weights=torch.rand(1, heads, length, top, generator=generator).expand(layers, -1, -1, -1),
    )
    large = report.Report("many heads", "none", torch.zeros(length, dtype=torch.int64), made.words, None, many)
    written = page.make_page(large)
    detail = contents(written)["detail"]
    assert len(written.encode()) < 5_000_000
    told = [(layer, head) for layer, about in enumerate(detail["layers"]) for head in about["heads"]]
    assert fewest <= len(told) and detail["top"] >= 1
    named = ("induction", "previous_token", "duplicate_token")
    best = torch.stack([many.scores[name] for name in named]).amax(0)
    left = best.clone()
    left[tuple(torch.tensor(told).T)] = -1
    assert min(best[at] for at in told) >= left.max()


# ---- in a browser ----


@pytest.fixture(scope="module")
def opened():
    with browser() as window:
        yield window


@pytest.fixture(scope="module")
def file(written, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(written, encoding="utf-8")
    return path


@pytest.fixture
def shown(opened, file):
    """The page in a wide window, drawn, with no complaint so far."""
    opened.errors.clear()
    opened.open(file, 1280)
    opened.wait("document.body?.dataset.drawn")
    yield opened
    assert opened.errors == []


def words_of(window, selector: str) -> list[str]:
    return window.do(f"[...document.querySelectorAll({selector!r})].map((e) => e.innerText.trim())")


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "nan"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_without_complaint_and_nothing_sticks_out(opened, file, width, dark):
    opened.errors.clear()
    opened.open(file, width, dark=dark)
    opened.wait("document.body?.dataset.drawn")
    assert opened.do("document.documentElement.scrollWidth") == width
    # What is wider scrolls in its own frame.
    outside = """[...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll *, .text"))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"""
    assert opened.do(outside) == []
    bright = opened.do("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright != dark
    assert opened.errors == []


def test_it_shows_the_numbers_of_the_head_that_is_chosen_by_a_click(shown, held):
    before = words_of(shown, "#head-scores dd"), shown.do("document.querySelector('#lags').innerHTML")
    layer, head = 0, 3
    shown.point(f'#head-map [data-layer="{layer}"][data-head="{head}"]', click=True)
    shown.wait(f"document.body.dataset.head === '{layer}.{head}'")
    assert words_of(shown, "#head-name") == ["Layer 0, head 3"]
    numbers = [number(value) for value in words_of(shown, "#head-scores dd")]
    assert words_of(shown, "#head-scores dt") == list(held["scores"])
    close(numbers, torch.tensor([values[layer][head] for values in held["scores"].values()]), rtol=0, atol=5.1e-4)
    after = words_of(shown, "#head-scores dd"), shown.do("document.querySelector('#lags').innerHTML")
    assert after[0] != before[0] and after[1] != before[1]
    heights = shown.do("[...document.querySelectorAll('#lags i')].map((e) => parseFloat(e.style.height))")
    weights = unpacked(held["lags"]["weights"])[layer, head]
    close(heights, 100 * weights / weights.max(), rtol=1e-3, atol=1e-3)
    received = unpacked(held["detail"]["layers"][layer]["received"])[head]
    best = received.argsort(descending=True)[:8]
    assert [int(p) for p in words_of(shown, "#keys td:nth-child(2)")] == best.tolist()
    close([number(r) for r in words_of(shown, "#keys td:nth-child(3)")], received[best], rtol=0, atol=5.1e-4)


def test_the_map_is_coloured_by_the_score_that_is_picked(shown, held):
    for name in ("entropy", "mean distance"):
        shown.do(f"""(() => {{ const s = document.getElementById("score"); s.value = "{name}";
            s.dispatchEvent(new Event("change")); }})()""")
        cells = shown.do("""[...document.querySelectorAll("#head-map .cell")].map((e) =>
            [+e.dataset.layer, +e.dataset.head, +e.style.getPropertyValue("--share")])""")
        values = torch.tensor(held["scores"][name])
        assert len(cells) == values.numel()
        for layer, head, share in cells:
            assert share == pytest.approx(float(values[layer][head] / values.max()), abs=1e-4)


def test_the_token_under_the_pointer_shows_its_top_keys(shown, held):
    layer, head, query = 1, 2, 40
    shown.point(f'#head-map [data-layer="{layer}"][data-head="{head}"]', click=True)
    shown.wait(f"document.body.dataset.head === '{layer}.{head}'")
    shown.point(f"#text span:nth-child({query + 1})")
    about = held["detail"]["layers"][layer]
    keys, weights = unpacked(about["keys"])[head, query], unpacked(about["weights"])[head, query]
    assert [int(p) for p in words_of(shown, "#keys td:nth-child(2)")] == keys.tolist()
    close([number(w) for w in words_of(shown, "#keys td:nth-child(3)")], weights, rtol=0, atol=5.1e-4)
    shown.point("h1")
    assert words_of(shown, "#keys caption") == ["Tokens that receive most"]


@pytest.mark.parametrize("width", [1280, 400])
def test_the_text_stays_under_the_pointer_that_reads_it(shown, file, width):
    shown.open(file, width)
    shown.wait("document.body?.dataset.drawn")
    top = "scrollY + document.getElementById('text').getBoundingClientRect().top"
    before = shown.do(top)
    shown.point("#text span:nth-child(41)")
    assert "token 40" in words_of(shown, "#keys caption")[0] and shown.do(top) == before


def test_it_can_be_used_with_the_keyboard_alone(shown):
    shown.do("document.querySelector('#head-map [tabindex=\"0\"]').focus()")
    shown.press("ArrowRight")
    shown.wait("document.body.dataset.head === '1.1'")
    shown.press("ArrowDown")
    shown.wait("document.body.dataset.head === '0.1'")
    shown.do("document.querySelector('#text [tabindex=\"0\"]').focus()")
    shown.press("End")
    assert f"What token {LENGTH - 1}" in words_of(shown, "#keys caption")[0]
    stops = shown.do("document.querySelectorAll('[tabindex=\"0\"]').length")
    assert stops <= 6  # one stop of the Tab key a part, not one a token


def test_it_shows_the_lens_at_the_token_that_is_clicked(shown, held):
    place = 30
    shown.point(f"#lens-text span:nth-child({place + 1})", click=True)
    rows = words_of(shown, "#lens-table tbody tr")
    assert len(rows) == 3 and rows[0].startswith("output")
    about = held["lens"]
    for cell, name, digits in ((3, "entropy", 2), (4, "kl", 2), (5, "rank", 0), (6, "probability", 4)):
        values = [number(v) for v in words_of(shown, f"#lens-table td:nth-child({cell})")]
        close(values[::-1], unpacked(about[name])[:, place], rtol=0, atol=0.51 * 10**-digits)
    ids = unpacked(about["tokens"])[-1, place].int().tolist()
    best = words_of(shown, "#lens-table tbody tr:first-child td.best .token")
    assert best == [{"\n": "⏎", " ": "␣"}.get(Letters.words[i], Letters.words[i]) for i in ids]


def test_it_shows_the_bars_and_what_a_head_read(shown, held):
    about = held["attribution"]
    names, numbers = words_of(shown, "#bars > :nth-child(3n + 1)"), words_of(shown, "#bars > :nth-child(3n)")
    parts = sorted(about["components"].items(), key=lambda pair: -abs(pair[1]))[:20]
    assert names[: len(parts)] == [name for name, _ in parts] and names[-1] == "total"
    close([number(n) for n in numbers[: len(parts)]], torch.tensor([v for _, v in parts]), rtol=0, atol=5.1e-4)
    assert number(numbers[-1]) == pytest.approx(about["total"], abs=5.1e-4)
    name = list(about["sources"])[1]
    layer, head = map(int, re.fullmatch(r"L(\d+)H(\d+)", name).groups())
    shown.point(f'#attribution-map [data-layer="{layer}"][data-head="{head}"]', click=True)
    shown.wait(f"document.getElementById('sources-name').innerText.startsWith('{name}')")
    shown.wait(f"document.body.dataset.head === '{layer}.{head}'")
    titles = shown.do("[...document.querySelectorAll('#sources span')].map((e) => e.title)")
    close([number(t) for t in titles], unpacked(about["sources"][name]), rtol=0, atol=5.1e-4)


def test_it_shows_the_neurons(shown, held):
    assert words_of(shown, "#neurons-table td:first-child") == [n["name"] for n in held["neurons"]]
    means = [number(m) for m in words_of(shown, "#neurons-table td:nth-child(2)")]
    close(means, torch.tensor([n["mean"] for n in held["neurons"]]), rtol=0, atol=5.1e-5)


def test_a_token_that_looks_like_html_is_text(shown, written):
    assert written.count("</script>") == 2
    assert words_of(shown, "#text span:nth-child(6)") == ["</script><b>"] and words_of(shown, "h1") == [
        "A <small> model"
    ]


def test_a_page_with_sections_missing_and_heads_without_detail_says_so(opened, tmp_path):
    made = report.make_report(model_named("bert"), text(16), title="bert")
    path = tmp_path / "bert.html"
    full = page.make_page(made)
    path.write_text(page.make_page(made, limit=len(full) - 2000), encoding="utf-8")
    opened.errors.clear()
    opened.open(path, 400)
    opened.wait("document.body?.dataset.drawn")
    assert "activation" in words_of(opened, "#attribution")[0] and words_of(opened, "#neurons")[0]
    assert opened.do("document.documentElement.scrollWidth") == 400
    path.write_text(page.make_page(made, limit=0), encoding="utf-8")
    opened.open(path, 1280)
    opened.wait("document.body?.dataset.drawn && document.getElementById('reading').hidden")
    assert "not in the page" in words_of(opened, "#no-reading")[0] and opened.errors == []


# ---- the command ----


@pytest.mark.real
def test_smollm2_is_looked_at_on_a_fact():
    if not real_models.SMOLLM2.exists():
        pytest.skip(f"{real_models.SMOLLM2} does not exist; `make real` fetches it")
    subject = subjects.find_subject("smollm2", torch.device("cpu"))
    ids = torch.tensor([subject.tokenizer.encode("The Eiffel Tower is located in the city of")])
    made = report.make_report(subject.model, ids, title=subject.title, tokenizer=subject.tokenizer)
    held = contents(page.make_page(made))
    with torch.no_grad():
        own = subject.model(ids).logits[0, -1]
    best = own.topk(2)
    assert held["attribution"]["target"] == " Paris" == subject.tokenizer.decode([int(best.indices[0])])
    close(held["attribution"]["total"], best.values[0] - best.values[1], rtol=1e-4, atol=1e-4)
    assert unpacked(held["lens"]["rank"])[-1, -1] == 1 and len(held["scores"]["induction"]) == 30


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama and a tokenizer of words."""
    from needs_transformers import transformers

    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "tiny-llama"
    model_named("llama").float().save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(("<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "dog"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the cat sat on a mat and the cat sat on the dog")
    return folder


def test_a_checkpoint_in_a_folder_is_looked_at(checkpoint, tmp_path, capsys):
    out = tmp_path / "page.html"
    options = ["--text", str(tmp_path / "text.txt"), "--out", str(out), "--tokens", "10", "--device", "cpu"]
    assert main(["look", str(checkpoint), *options, "--target", "dog"]) == 0
    assert f"{out}, 0." in capsys.readouterr().out
    held = contents(out.read_text(encoding="utf-8"))
    assert held["family"] == "Llama" and held["cut"] == 13 and "tiny-llama" in held["title"]
    assert held["tokens"]["shape"] == [10] and held["attribution"]["target"] == " dog"


def test_the_demo_is_trained_and_looked_at(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("fastattn.demo.INDUCTION_STEPS", 2)
    out = tmp_path / "page.html"
    assert main(["look", "demo", "--out", str(out), "--device", "cpu", "--tokens", "40"]) == 0
    held = contents(out.read_text(encoding="utf-8"))
    ids = unpacked(held["tokens"]).int().tolist()
    assert "".join(held["words"][str(i)] for i in ids) == "<start>" + subjects.DEMO_TEXT[:39]


def test_the_characters_of_the_demo_are_its_words():
    letters = subjects.Characters()
    assert len(set(letters.words)) == induction.VOCABULARY and letters.start == induction.START
    assert (
        letters.decode(letters.encode("Small, 7 (é)!\n", add_special_tokens=False))
        == "small, 7 (\N{REPLACEMENT CHARACTER})!\n"
    )


WRONG = [
    (
        ["nowhere"],
        "MODEL must be demo, smollm2, or a folder with a Hugging Face checkpoint; nowhere has no config.json",
    ),
    (["smollm2"], "`make real` in a checkout of fastattn fetches SmolLM2-135M"),
    (["{checkpoint}", "--target", "the cat"], "--target must be one token, and 'the cat' is 2"),
    (["{checkpoint}", "--against", "dog"], "--against needs --target"),
    (["{checkpoint}", "--tokens", "5000"], "--tokens must be from 2 to 4096, got 5000"),
    (
        ["{checkpoint}", "--out", "{folder}/no/page.html"],
        "--out {folder}/no/page.html: there is no folder {folder}/no",
    ),
    (["{checkpoint}", "--text", "{folder}/absent"], "--text {folder}/absent: No such file or directory"),
    (["{checkpoint}", "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_what_is_wrong_is_said_in_one_sentence(arguments, sentence, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places = {"checkpoint": checkpoint, "folder": tmp_path}
    defaults = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "page.html"), "--device", "cpu"]
    assert main(["look", *defaults, *(a.format(**places) for a in arguments)]) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("fastattn look: ") and sentence.format(**places) in printed
    assert not (tmp_path / "page.html").exists()


def test_a_model_without_a_family_is_said_with_those_that_have_one(checkpoint, tmp_path, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    assert main(["look", str(checkpoint), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]) == 1
    assert "holds a MambaForCausalLM. The lens knows GPT2LMHeadModel" in capsys.readouterr().err
