"""Proof records: what `fastattn prove` found out about the kernels on a GPU, and what that decides.

A record is a JSON file about one GPU and one set of versions. It has a row for each family, direction, kind,
dtype, width and size of a call: whether the kernel is right there, and how many times as fast as what would serve
otherwise. Records lie in the user's cache folder; the package ships those of its repository (fastattn/proofs). A
record counts only where GPU, versions and kernels are the same. Records are read once, when the first call on a
GPU needs to know. FASTATTN_PROOFS=off reads none; FASTATTN_PROOFS=PATH reads that file or folder instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.core import plans
from fastattn.ground.version import VERSION

PROVEN, WRONG, SLOWER = "proven", "wrong", "slower"
SPILLS, HUNG, NOT_COMPILED = "spills", "hung", "not compiled"
VERDICTS = (PROVEN, WRONG, SLOWER, SPILLS, HUNG, NOT_COMPILED)
VARIABLE = "FASTATTN_PROOFS"
FORMAT = 1  # of the files; others are ignored
SHIPPED = Path(__file__).parents[1] / "proofs"
KERNELS = Path(__file__).parents[1] / "kernels"

log = logging.getLogger("fastattn")


# Classes of sizes, by what is below each: scores of attention, of a cache those with all that it has room for;
# rows of an MLP; logits of a loss; elements of the others.
SIZES = {
    "attention": {"small": 2**23, "medium": 2**28},
    "statistics": {"small": 2**23, "medium": 2**28},
    "heads": {"small": 2**20, "medium": 2**25},
    "cache": {"small": 2**18, "medium": 2**23},
    "loss": {"small": 2**23, "medium": 2**27},
    "mlp": {"small": 512, "medium": 8192},
    "norm": {"small": 2**20, "medium": 2**25},
}
LARGE = "large"
CLASSES = ("small", "medium", LARGE)


def size_class(family: str, size: int) -> str:
    return next((name for name, bound in SIZES[family].items() if size < bound), LARGE)


# Block sizes for queries and keys, warps, stages, and whether products are issued ahead: a launch.Tiling.
Tiling = tuple[int, int, int, int, bool]


class Key(NamedTuple):
    """Which calls a row is about. Width and size are classes, see fastattn.core.capabilities."""

    family: str
    direction: str
    kind: str
    dtype: str
    width: int
    size: str


class Question(NamedTuple):
    """What a call depends on. Our kernels serve it where they are right for all its kinds, and not slower for one
    of the deciding ones: what PyTorch does for several of these takes at least as long as for the slowest."""

    family: str
    direction: str
    kinds: tuple[str, ...]
    deciding: tuple[str, ...]  # some of the kinds
    dtype: str
    width: int
    size: str

    def key(self, kind: str) -> Key:
        return Key(self.family, self.direction, kind, self.dtype, self.width, self.size)


@dataclass(frozen=True)
class Row:
    """A verdict about one kind of call.

    ratio: the time of what would serve otherwise, divided by ours, host time included; None if it was not timed.
    error, allowed: the largest error against float64, and the largest that the tests' rule allows; None if the
        kernel gave no result.
    reason: why it is not proven, in words.
    against: what it was timed against, in words; "" where that is not told.
    tilings: by the names of launch tables, those that were faster than the tables' in such calls and took part in
        the ratio; they serve heads that are `tilings_width` wide.
    """

    key: Key
    verdict: str
    ratio: float | None = None
    error: float | None = None
    allowed: float | None = None
    reason: str = ""
    against: str = ""
    tilings: dict[str, Tiling] = field(default_factory=dict)
    tilings_width: int = 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> Row:
        rest = {name: given[name] for name in ("verdict", "ratio", "error", "allowed", "reason")}
        rest |= {name: given[name] for name in ("against", "tilings_width") if name in given}
        rest["tilings"] = tilings_of(given)
        row = cls(Key(*(given[name] for name in Key._fields)), **rest)
        if row.verdict not in VERDICTS:
            raise ValueError(f"unknown verdict {row.verdict!r}")
        return row

    def as_json(self) -> dict[str, Any]:
        return {**self.key._asdict(), **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}}


def tilings_of(given: dict[str, Any]) -> dict[str, Tiling]:
    """The tilings of what came as JSON, none if it has none."""
    return {table: _tiling(numbers) for table, numbers in given.get("tilings", {}).items()}


def _tiling(numbers: Any) -> Tiling:
    m, n, warps, stages, ahead = numbers
    if not all(type(number) is int and number > 0 for number in (m, n, warps, stages)) or type(ahead) is not bool:
        raise ValueError(f"unknown tiling {numbers!r}")
    return m, n, warps, stages, ahead


@dataclass(frozen=True)
class Machine:
    """What a record is about, and what must be the same for it to count. Drivers and dates are noted only."""

    gpu: str
    architecture: str
    torch: str
    triton: str
    fastattn: str
    kernels: str  # a hash of their sources

    def difference(self, other: Machine) -> str:
        """What differs in the other one, in words; "" if nothing does."""
        for name, mine, theirs in zip(_NAMES, dataclasses.astuple(self), dataclasses.astuple(other), strict=True):
            if mine != theirs:
                return "it is about other kernels" if name == "kernels" else f"{name} was {theirs}, is {mine}"
        return ""


_NAMES = tuple(f.name for f in dataclasses.fields(Machine))


@dataclass(frozen=True)
class Record:
    machine: Machine
    driver: str | None = None
    date: str = ""
    rows: dict[Key, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Record:
        """From what `as_json` returns. Raises ValueError, KeyError or TypeError if it is something else."""
        if given["format"] != FORMAT:
            raise ValueError(f"its format is {given['format']}, this fastattn reads {FORMAT}")
        rows = (Row.of(row) for row in given["rows"])
        machine = Machine(*(given[name] for name in _NAMES))
        return cls(machine, given["driver"], given["date"], {row.key: row for row in rows})

    def as_json(self) -> dict[str, Any]:
        rows = [row.as_json() for row in self.rows.values()]
        about = {**dataclasses.asdict(self.machine), "driver": self.driver, "date": self.date}
        return {"format": FORMAT, **about, "rows": rows}

    def joined(self, newer: Record) -> Record:
        """The rows of both; where both have one, the newer's."""
        return dataclasses.replace(newer, rows={**self.rows, **newer.rows})

    @functools.cached_property
    def families(self) -> frozenset[str]:
        """Those of which some calls are proven."""
        return frozenset(key.family for key, row in self.rows.items() if row.verdict == PROVEN)

    @functools.cached_property
    def tiled(self) -> dict[tuple[str, str, str, int, str], Row]:
        """The rows about attention that name tilings, by direction, kind, dtype, width of heads and size."""
        return {
            (key.direction, key.kind, key.dtype, row.tilings_width, key.size): row
            for key, row in self.rows.items()
            if key.family == "attention" and row.tilings and row.verdict in (PROVEN, SLOWER)
        }

    def obstacle(self, question: Question) -> str:
        """Why the kernels do not serve such a call, in words; "" if they do."""
        for kind in question.kinds:
            row = self.rows.get(question.key(kind))
            if row is None or row.verdict not in (PROVEN, SLOWER):
                return f"{'not proven' if row is None else row.verdict}: {describe(question.key(kind))}"
        if any(self.rows[question.key(kind)].verdict == PROVEN for kind in question.deciding):
            return ""
        return f"slower: {', '.join(describe(question.key(kind)) for kind in question.deciding)}"


def describe(key: Key) -> str:
    return f"{key.family} {key.direction}, {key.kind}, {key.dtype}, width {key.width}, {key.size}"


# ---- this machine ----


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


def architecture(index: int | None) -> str:
    """ "sm_90" and the like, or AMD's name."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def machine(device: torch.device) -> Machine:
    """This machine, with this device. Triton's interpreter stands in for a GPU on the CPU."""
    on_gpu = device.type == "cuda"
    return Machine(
        torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter",
        architecture(device.index) if on_gpu else "cpu",
        torch.__version__.split("+")[0],
        _triton_version(),
        VERSION,
        kernels_hash(),
    )


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def kernels_hash() -> str:
    """Of the sources of the kernels and their launch tables."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(f"{path.relative_to(KERNELS)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# ---- files ----


def folder() -> Path:
    """The user's: $XDG_CACHE_HOME/fastattn/proofs, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn" / "proofs"


def switched_off() -> bool:
    return os.environ.get(VARIABLE, "").lower() in ("off", "0", "none")


def files() -> list[Path]:
    """Every record that may count; where two speak of the same call, the later one does."""
    if switched_off():
        return []
    asked = os.environ.get(VARIABLE)
    folders = [Path(asked)] if asked else [SHIPPED, folder()]
    found: list[Path] = []
    for path in folders:
        # A folder that cannot be read has no records. A file that was asked for and is not there is told of.
        with contextlib.suppress(OSError):
            found += sorted(path.glob("*.json")) if not asked or path.is_dir() else [path]
    return found


def read(path: Path) -> Record:
    """Raises OSError, or ValueError, KeyError or TypeError if it is no record."""
    return Record.of(json.loads(path.read_text(encoding="utf-8")))


def keep(record: Record) -> Path:
    """Add a record's rows to the file of its machine in the user's folder; returns the file.

    Several processes may do so at once. The file is replaced in one step, so that nobody reads half of it. Raises
    OSError if it cannot be written; then the file stays as it was. FASTATTN_PROOFS=PATH is written to instead.
    """
    asked = None if switched_off() else os.environ.get(VARIABLE)
    named = Path(asked) if asked else folder()
    path = named if asked and named.suffix == ".json" else named / file_name(record.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            older = read(path)
            record = older.joined(record) if older.machine == record.machine else record
        write(path, record)
    forget()
    return path


def file_name(about: Machine) -> str:
    """The GPU's name, and a hash of it all: records of other versions lie beside this one."""
    slug = re.sub(r"[^a-z0-9]+", "-", about.gpu.lower()).strip("-")
    return f"{slug}-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}.json"


def write(path: Path, record: Record) -> None:
    """Write beside the file, then rename: the file is the old one or the new one, and never a part."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(record.as_json(), stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time, where the system and the disk can do that."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (place / ".lock").open("a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- what counts here ----


class Shelf(NamedTuple):
    """All records that could be read, with their files, and a sentence about each that could not."""

    records: list[tuple[Path, Record]]
    unreadable: list[str]


_lock = threading.RLock()
_shelf: Shelf | None = None
_found: dict[torch.device, Record | None] = {}
_held: list[Record] = []
_told: set[torch.device | str] = set()


def shelf() -> Shelf:
    """Reads the files once."""
    global _shelf
    with _lock:
        if _shelf is None:
            records, unreadable = [], []
            for path in files():
                try:
                    records.append((path, read(path)))
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    unreadable.append(f"{path} is no proof record ({type(error).__name__}: {error})")
            _shelf = Shelf(records, unreadable)
        return _shelf


def record_of(device: torch.device) -> Record | None:
    """The rows that count on this device; None if there are none. On a CPU only Triton's interpreter has some."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return None
    if device in _found:
        return _found[device]
    with _lock:
        here, found = machine(device), None
        for record in (*(record for _, record in shelf().records), *_held):
            if record.machine == here:
                found = record if found is None else found.joined(record)
        _found[device] = found
    return found


def ignored(device: torch.device) -> list[str]:
    """A sentence about each record of this GPU that does not count, and about each file that is none."""
    here = machine(device)
    of_this_gpu = [(p, r) for p, r in shelf().records if r.machine.gpu == here.gpu and r.machine != here]
    stale = [f"{p} is ignored: {here.difference(r.machine)}" for p, r in of_this_gpu]
    return stale + [f"{sentence}; it is ignored" for sentence in shelf().unreadable]


def hold(record: Record) -> None:
    """Let a record count in this process only: for one that could not be written."""
    _held.append(record)
    forget()


def forget() -> None:
    """Read everything anew when it is needed next, and decide anew what serves."""
    global _shelf
    with _lock:
        _shelf = None
        _found.clear()
    plans.forget()


def tell_once(device: torch.device) -> None:
    """Say in the log, once for each GPU, that nothing is proven on it and what to do."""
    if device in _told or device.type != "cuda" or switched_off():
        return
    _told.add(device)
    name = torch.cuda.get_device_name(device)
    if name not in _told:
        _told.add(name)
        stale = "".join(f" {sentence}." for sentence in ignored(device))
        log.warning(
            "fastattn's kernels are not proven on this %s, so PyTorch's own serve.%s `fastattn prove` tests and"
            " times them here in two minutes; those that are right and not slower serve from then on."
            " FASTATTN_PROOFS=off turns this message off.",
            name,
            stale,
        )
