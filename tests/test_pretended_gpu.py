"""Every public call, through Triton's real binder, compiler and launcher, on GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests import pretended_gpu

ROOT = Path(__file__).parents[1]
# For two workers.
SHARES = 2


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, in which kernels are compiled, not interpreted."""
    environment = {**os.environ, "FASTATTN_BACKEND": "triton", "PYTHONPATH": str(ROOT)}
    del environment["TRITON_INTERPRET"]
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _skip_where_no_gpu_can_be_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    if reason := pretended_gpu.obstacle():
        pytest.skip(f"no GPU can be pretended: {reason}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
@pytest.mark.parametrize("share", range(1, SHARES + 1))
def test_every_public_call_is_launched(share: int) -> None:
    """Each on one of an H100, an A100, an RTX 4090 and a B200, by turns. The compiler stops after its front end:
    the rest would take half an hour, and the compile report runs it. `make pretended` makes the calls under the
    oldest and the newest Triton."""
    done = run("-m", "tests.pretended_gpu", "--each-on-one", "--until", "ttir", "--share", f"{share}/{SHARES}")
    assert done.returncode == 0, done.stdout + done.stderr


# Of the public functions and classes those that launch no kernel of ours, or make calls that others make.
WITHOUT_A_CALL = {
    "fastattn": {"by_rows", "dropout_mask", "merge_states", "patch", "prove", "t5_relative_bias", "unpatch"},
    "fastattn.nn": {"DecodingCache", "Generation", "Rotary", "TransformerConfig"},
    "fastattn.lens": {
        "ablate", "adapt", "attribution", "causal_trace", "composition", "copying_scores", "even_scores",
        "families", "gather_weights", "head_report", "knock_out", "logit_lens", "neurons", "patch_activations",
        "patch_pattern", "path_patch", "register", "rollout", "scale_heads", "steer", "virtual_weights",
    },
    "fastattn.flash_attn": set(),
    "fastattn.kv_cache": {"OutOfPages"},
}  # fmt: skip


def test_every_public_function_that_launches_is_among_the_calls() -> None:
    calls = (ROOT / "tests/pretended_gpu/calls.py").read_text()
    named: dict[str, set[str]] = {module: set() for module in WITHOUT_A_CALL}
    for line in (ROOT / "tests/public_api.txt").read_text().splitlines():
        module, _, name = line.partition("(")[0].rpartition(".")
        result = module == "fastattn.lens" and name[0].isupper()  # what functions return
        if "(" in line and module in named and not result:
            named[module].add(name)
    for module, names in named.items():
        assert {name for name in names if not re.search(rf"\b{name}\b", calls)} == WITHOUT_A_CALL[module]


PRELUDE = """
import warnings; warnings.simplefilter("ignore")
import torch, triton, triton.language as tl
import fastattn
from fastattn.kernels import launch
from fastattn.kernels.attention.forward import attention_forward, attention_forward_kernel
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from tests.pretended_gpu import GPUS, pretended_gpus

@triton.jit
def touch(pointer):
    tl.store(pointer, 0.0)

def refusal(launched):
    try:
        launched()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "launched"
"""


@pytest.fixture
def printed(tmp_path: Path) -> Callable[[str], list[str]]:
    """The lines that a script prints. It stands in a file: Triton reads a kernel's source there."""

    def lines(script: str) -> list[str]:
        file = tmp_path / "script.py"
        file.write_text(PRELUDE + script)
        done = run(str(file))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return lines


def test_the_pretended_driver_refuses_what_a_real_one_refuses(printed) -> None:
    assert printed("""
with pretended_gpus(GPUS["H100"], GPUS["RTX 4090"]) as driver:
    here, there = (torch.empty(4, device=f"cuda:{n}") for n in (0, 1))
    print(refusal(lambda: touch[(2**31 - 1,)](here)), driver.launches(), *driver.last_launch().grid)
    print(refusal(lambda: touch[(1, 65536)](here)))
    print(refusal(lambda: touch[(1, 1, 65536)](here)))
    print(refusal(lambda: touch[(1,)](torch.empty(4))))
    print(refusal(lambda: touch[(1,)](there)).split(":")[0])
""") == [
        "launched 1 2147483647 1 1",
        "RuntimeError: Triton Error [CUDA]: invalid argument",
        "RuntimeError: Triton Error [CUDA]: invalid argument",
        "ValueError: Pointer argument cannot be accessed from Triton (cpu tensor?)",
        "RuntimeError",
    ]


def test_a_pretended_gpu_tells_what_an_assembled_kernel_spills(printed) -> None:
    """`make pretended` fails on spills under the oldest Triton: those that a GPU with that Triton would refuse."""
    assert printed("""
from tests.pretended_gpu.__main__ import Spilling
from tests.pretended_gpu import known_spills
from fastattn.measuring.prove_worker import launched

@triton.jit
def crowded(pointer):  # 256 numbers of a thread at once
    pointers = pointer + tl.arange(0, 8192)
    values = tl.load(pointers)
    tl.store(pointers, values / tl.sum(values, 0))

spilling = Spilling()
with pretended_gpus(GPUS["A100"], until="cubin"), launched(spilling.note):
    touch[(1,)](torch.empty(4, device="cuda"))
    print(spilling.complaints("A100", "a call"))
    crowded[(1,)](torch.empty(8192, device="cuda"), num_warps=1)
    (said,) = spilling.complaints("A100", "a call")
    print(said.split(" spills ")[0], spilling.complaints("A100", "a call"))
known = known_spills.Known("a call", "crowded", 1000, "few make it", ("A100",))
print(known.covers("A100", "a call", "crowded", 1000), known.covers("A100", "a call", "crowded", 1001),
      known.covers("H100", "a call", "crowded", 9), known.covers("A100", "another", "crowded", 9))
""") == ["[]", "crowded []", "True False False False"]


def test_what_is_kept_in_place_of_machine_code_is_never_taken_for_it(printed) -> None:
    """Triton's cache on disk goes by this hash, among others."""
    assert printed("""
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

backend = CUDABackend(GPUTarget("cuda", 90, 32))
hashes = [backend.hash()]
for until in ("ttir", "ttgir", "ptx", "cubin"):
    with pretended_gpus(GPUS["H100"], until=until):
        hashes.append(backend.hash())
print(len(set(hashes)), hashes[0] == hashes[-1] == backend.hash())
""") == ["4 True"]


def test_kernels_are_launched_though_the_compiler_stops_early(printed) -> None:
    """So that all calls can be made under the oldest and the newest Triton in a few minutes: `make pretended`."""
    assert printed("""
from fastattn.measuring.prove_worker import launched

@triton.jit
def impossible(pointer):
    tl.store(pointer, undefined)

for until in ("ttir", "ttgir"):
    touch.device_caches.clear()
    with pretended_gpus(GPUS["H100"], until=until) as driver, launched(lambda _, kernel: asm.update(kernel.asm)):
        asm = {}
        touch[(1,)](torch.empty(4, device="cuda"))
        print(driver.launches(), asm["ttgir"].count("ttg.num-warps"), repr(asm["llir"]), repr(asm["ptx"]))
        print(refusal(lambda: impossible[(1,)](torch.empty(4, device="cuda"))).split(":")[0])
""") == ["1 0 '' ''", "CompilationError", "2 1 '' ''", "CompilationError"]


def test_each_gpu_of_a_process_gets_the_rows_of_its_own_family(printed) -> None:
    assert printed("""
gpus = [GPUS[name] for name in ("H100", "RTX 4090", "A100")]
with pretended_gpus(*gpus) as driver:
    for number in (2, 1, 0):
        print(launch.family(attention_forward_kernel, torch.device("cuda", number)), driver.device())
    for number in (1, 0):
        # The H100's row would not fit the RTX 4090's shared memory.
        q = torch.empty(1, 64, 512, 64, dtype=torch.bfloat16, device=f"cuda:{number}", requires_grad=True)
        fastattn.prepare_heads(q, norm=True).sum().backward()
        out = fastattn.attention(q.detach(), q, q)
        print(driver.last_launch().shared // 1024, out.device, driver.device())
        out.sum().backward()
""") == ["sm_80 0", "sm_86 0", "sm_90 0", "48 cuda:1 0", "72 cuda:0 0"]


def test_no_grid_grows_in_y_or_z(printed) -> None:
    """There may be more batch entries times heads than the 65,535 that fit there: Swin's windows, triangles."""
    assert printed("""
with pretended_gpus(GPUS["H100"], until="ttir") as driver:
    grids, run = set(), triton.runtime.jit.JITFunction.run
    def recorded(kernel, *arguments, grid, **keywords):
        grids.add((kernel.__name__, len(grid)))
        return run(kernel, *arguments, grid=grid, **keywords)
    triton.runtime.jit.JITFunction.run = recorded
    q = torch.empty(8209, 8, 5, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    relative = torch.empty(8, 9, device="cuda", requires_grad=True)
    fastattn.attention(q, q, q, relative_bias=relative).sum().backward()
    mask = fastattn.masks.global_tokens([3]) | fastattn.masks.from_function(lambda b, h, i, j: i // 64 == j // 64)
    lists = mask.lower(1, 1, 800, 800, torch.device("cuda", 0)).lists
    q = torch.empty(1, 1, 800, 8, dtype=torch.bfloat16, device="cuda").expand(66000, -1, -1, -1)
    attention_forward(q, q, q, AttentionSpec(), ScoreTensors(), lists)
    x = torch.empty(2, 9000, device="cuda", requires_grad=True)
    fastattn.layer_norm(x, torch.empty(9000, device="cuda", requires_grad=True)).sum().backward()
    print(*sorted(name for name, sides in grids), *{sides for name, sides in grids})
""") == [
        "attention_delta_kernel attention_dkdv_kernel attention_dq_kernel attention_forward_kernel "
        "attention_remainder_kernel "
        "diagonal_sums_kernel merge_kernel norm_gradient_kernel norm_kernel norm_sums_kernel 1"
    ]


def test_a_summed_loss_compiles_nothing_that_another_loss_does_not(printed) -> None:
    """The gradient that comes to a sum is one number, expanded: kernels must not be specialised for it."""
    assert printed("""
with pretended_gpus(GPUS["H100"], until="ttir") as driver:
    compiled = []
    compile_one = triton.runtime.jit.JITFunction._do_compile
    def counted(kernel, *arguments):
        compiled.append(kernel.__name__)
        return compile_one(kernel, *arguments)
    triton.runtime.jit.JITFunction._do_compile = counted
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.empty(1, 2, 128, 64, **half).requires_grad_()
    x, weight = torch.empty(128, 128, **half).requires_grad_(), torch.empty(128, 128, **half)
    calls = {
        "attention": lambda: fastattn.attention(q, q, q, return_lse=True),
        "heads": lambda: [fastattn.prepare_heads(q, norm=True)],
        "norm": lambda: fastattn.rms_norm(x, weight[0], residual=x),
        "mlp": lambda: [fastattn.mlp(x, weight, None, weight, None)],
    }
    for name, call in calls.items():
        results = call()
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])
        before = len(compiled)
        sum(t.sum() for t in call()).backward()
        print(name, before > 0, compiled[before:])
""") == [f"{name} True []" for name in ("attention", "heads", "norm", "mlp")]


def test_the_gradient_of_a_bias_that_broadcasts_is_shared_out(printed) -> None:
    assert printed("""
with pretended_gpus(GPUS["H100"], until="ttir") as driver:
    grids, run = {}, triton.runtime.jit.JITFunction.run
    def recorded(kernel, *arguments, grid, **keywords):
        grids[kernel.__name__] = grid
        return run(kernel, *arguments, grid=grid, **keywords)
    triton.runtime.jit.JITFunction.run = recorded
    q = torch.empty(2, 8, 1024, 64, dtype=torch.bfloat16, device="cuda")
    for shape in ((1, 1, 1, 1), (1, 8, 1, 1), (2, 8, 1, 1), (1, 1, 1024, 1024)):
        bias = torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        fastattn.attention(q, q, q, bias=bias).sum().backward()
        print(*grids["bias_gradient_kernel"], tuple(bias.grad.shape) == shape)
""") == ["132 True", "128 True", "128 True", "256 True"]


def test_training_on_any_batch_and_length_compiles_a_handful_of_kernels(printed) -> None:
    """Triton compiles again for an integer that is 1 or a multiple of 16, of which a launch has many."""
    counts = printed("""
import collections, random
from triton.runtime.jit import JITFunction
compiled = collections.Counter()

class Launchable:
    packed_metadata = function = None
    launch_metadata = run = lambda *_: None

def compile(self, key, signature, device, *_):
    compiled[self.fn.__name__] += 1
    self.device_caches[device][0][key] = Launchable()
    return Launchable()

JITFunction._do_compile = compile
random.seed(0)
lengths = [1, 2, 16, 17, 4096, *(random.randint(1, 4096) for _ in range(195))]
with pretended_gpus(GPUS["H100"]):
    for length in lengths:
        batch = random.choice((1, 2, 3, 4, 8, 16))
        q, k, v = (torch.empty(batch, 4, length, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        out = fastattn.attention(q, k.requires_grad_(), v, causal=True)
        out.backward(torch.empty_like(out))
for name, count in compiled.items():
    print(name, count)
""")
    by_name = dict(line.split() for line in counts)
    assert set(by_name) >= {"attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
    # Lengths of 1, of a multiple of 16 or neither; many programs, few (theirs is another row), or loops that they
    # split. Partial results of these count batch entries: 1, a multiple of 16 or neither.
    assert int(by_name.pop("attention_forward_kernel")) <= 10, counts
    assert all(int(count) <= 5 for count in by_name.values()), counts
