"""However it is installed, fastattn imports and computes outside its checkout, kernels included."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from hardware import DEVICE, ON_GPU

CHECKOUT = Path(__file__).parents[1]

# Triton reads a kernel's source with inspect: it must be there too.
PROGRAM = f"""
import inspect, sys, torch, fastattn
q, k, v = (torch.randn(1, 2, 40, 16, device={DEVICE!r}, requires_grad=True) for _ in range(3))
outs = [fastattn.attention(q, k, v, causal=True, backend=b) for b in ("triton", "portable", "reference")]
for out in outs:
    torch.testing.assert_close(out, outs[-1], rtol=0, atol=1e-5)
    out.sum().backward()
from fastattn.kernels.attention import forward as attention_forward
assert "tl.dot" in inspect.getsource(attention_forward)
import fastattn.cli, fastattn.lens, fastattn.nn
from importlib import resources
assert "{{{{data}}}}" in (resources.files("fastattn.looking") / "page.html").read_text(encoding="utf-8")
print(fastattn.__file__)
"""


def run(*command: object, **options) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def environment(folder: Path) -> Path:
    """A virtual environment that has this one's libraries but not its fastattn; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path line adds a folder without running the .pth files in it, so an editable fastattn stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files git would hand out, so that building leaves the checkout alone."""
    folder = tmp_path_factory.mktemp("source") / "fastattn"
    folder.mkdir()
    names = ["pyproject.toml", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt", ".ci"]
    names += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "MIGRATION.md"]
    names += ["fastattn", "kernels", "tests", "benchmarks"]
    run("cp", "-a", *(CHECKOUT / n for n in names if (CHECKOUT / n).exists()), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "editable", "wheel", "sdist"])
def test_installed_fastattn_imports_and_computes_outside_the_checkout(
    way: str, source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    python = environment(tmp_path / "venv")
    what: list[object] = [source]
    if way == "editable":
        what = ["--editable", source]
    elif way in ("wheel", "sdist"):
        pytest.importorskip("build")
        run(sys.executable, "-m", "build", "--no-isolation", f"--{way}", "--outdir", tmp_path / "dist", source)
        what = list((tmp_path / "dist").iterdir())
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--no-build-isolation", *what,
    )  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if not ON_GPU:
        clean["TRITON_INTERPRET"] = "1"
    where = run(python, "-c", PROGRAM, cwd=tmp_path, env=clean).strip()
    assert Path(where).is_relative_to(source if way == "editable" else tmp_path / "venv")
    assert run(python.parent / "fastattn", "--version", cwd=tmp_path, env=clean).split()[-1] == "0.1.0"


@pytest.mark.slow
def test_the_tests_run_in_an_unpacked_sdist(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path / "dist", source)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for folder in ("tests", "benchmarks"):
        names = {p.relative_to(CHECKOUT) for p in (CHECKOUT / folder).rglob("*.py")}
        assert not [name for name in sorted(names) if not (unpacked / name).exists()]
    for name in ("Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "MIGRATION.md", "LICENSE"):
        assert (unpacked / name).exists(), name
    assert "Project-URL: Changelog, https://" in (unpacked / "PKG-INFO").read_text()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = run(sys.executable, "-c", "import fastattn; print(fastattn.__file__)", cwd=unpacked, env=clean)
    assert Path(where.strip()).is_relative_to(unpacked)
    few = [
        "tests/test_packaging.py",
        "tests/attention/test_attention_kernels.py",
        "tests/attention/test_operators.py",
    ]
    run(
        sys.executable, "-m", "pytest", "-q", "-x", "-o", "pythonpath=", "-p", "no:cacheprovider", *few,
        "-k", "package_list or kernels_import or asked_for or visits_every_tile or autocast_lowers",
        cwd=unpacked, env=clean,
    )  # fmt: skip


def test_what_is_imported_when_asked_for_is_there_without_an_import_of_its_own() -> None:
    program = """
import sys, fastattn
assert fastattn.flash_attn.flash_attn_func and fastattn.integrations and fastattn.lens.head_scores
assert "integrations" in dir(fastattn) and not hasattr(fastattn, "flash_atn")
assert "transformers" not in sys.modules
assert "fastattn.distributed" not in sys.modules and "torch.distributed.tensor" not in sys.modules
assert fastattn.distributed.layout
"""
    run(sys.executable, "-c", program, cwd=CHECKOUT)


def test_the_package_list_is_complete() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text()
    for folder in sorted(
        {p.parent for p in (CHECKOUT / "fastattn").rglob("*.py")}
        | {CHECKOUT / "fastattn" / p.parent.relative_to(CHECKOUT) for p in (CHECKOUT / "kernels").rglob("*.py")}
    ):
        package = ".".join(folder.relative_to(CHECKOUT).parts)
        assert f'"{package}"' in text, f"{package} is missing from packages in pyproject.toml"


def test_kernels_import_nothing_of_fastattn_and_shadow_no_package() -> None:
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
    for file in (CHECKOUT / "kernels").rglob("*.py"):
        assert "fastattn" not in file.read_text().replace("fastattn.kernels", ""), file
