"""Claims about `fastattn generate`: it prints what the model says, while it says it; errors are one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from real_models import SMOLLM2

from fastattn import generating
from fastattn.cli import main
from fastattn.looking import subjects
from fastattn.nn import TransformerModel

WORDS = "[UNK] who built the old stone bridge in a small town north of by two masons after long war river"


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama whose words are WORDS."""
    from needs_transformers import transformers

    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS.split()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_it_prints_what_eager_attention_says(checkpoint, capsys):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    inputs = tokenizer("who built the bridge", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 4:]
    capsys.readouterr()
    command = ["generate", str(checkpoint), "--prompt", "who built the bridge", "--tokens", "9"]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_words_appear_one_by_one_and_draws_follow_the_seed(checkpoint, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(generating, "show", shown.append)
    command = ["generate", str(checkpoint), "--prompt", "who built", "--tokens", "12", "--temperature", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        shown.clear()
        assert main([*command, "--top-k", "9", "--top-p", "0.99", "--seed", seed]) == 0
        assert len([word for word in shown if word.strip()]) > 4
        texts.append("".join(shown))
    assert texts[0] == texts[1] != texts[2]


def test_the_demos_model_goes_on_with_a_text(capsys, monkeypatch):
    tokenizer = subjects.Characters()
    model = TransformerModel(
        vocab_size=len(tokenizer.words) + 1, embed_dim=32, num_heads=4, num_layers=1, max_length=40
    )
    subject = subjects.Subject("a model", model.eval(), tokenizer)
    monkeypatch.setattr(subjects, "_demo", lambda device: subject)
    assert main(["generate", "demo", "--prompt", "one two", "--tokens", "6", "--device", "cpu"]) == 0
    ids = model.generate(torch.tensor([tokenizer.encode("one two")]), 6).tokens[0, 8:]
    assert capsys.readouterr().out == tokenizer.decode(ids.tolist()) + "\n"
    assert main(["generate", "demo", "--prompt", "x" * 60, "--device", "cpu"]) == 1
    assert "--prompt must have at most 39 characters for the demo's model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be at least 0 and finite, got -1.0"),
        (["--top-p", "0.5"], "--top-p needs a temperature above 0: at 0 the likeliest token is always taken"),
        (["--seed", str(2**64)], "--seed must have at most 64 bits, got 18446744073709551616"),
        (["--prompt", ""], "--prompt must have at least one character"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (
            [],
            "MODEL must be demo, smollm2, or a folder with a Hugging Face checkpoint; nowhere has no config.json",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, sentence, capsys):
    assert main(["generate", "nowhere", "--prompt", "who", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"fastattn generate: {sentence}\n"


def test_a_checkpoint_of_another_kind_is_refused_in_one_sentence(tmp_path, capsys):
    import needs_transformers  # noqa: F401

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert main(["generate", str(tmp_path), "--prompt", "who"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastattn generate: {tmp_path}: Unrecognized configuration class")
    assert len(error.splitlines()) == 1


@pytest.mark.real
def test_smollm2_says_where_the_eiffel_tower_is(capsys):
    import needs_transformers  # noqa: F401

    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} does not exist; `make real` fetches it")
    prompt = "The Eiffel Tower is located in the city of"
    assert main(["generate", "smollm2", "--prompt", prompt, "--tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(" Paris, France.")
