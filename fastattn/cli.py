"""The command line: fastattn demo | look | generate | doctor | prove | bench."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from fastattn.errors import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A problem that the user can solve is one sentence on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except CommandError as error:
        return _fail(options.command, str(error))
    except BrokenPipeError:
        # The reader of our output is gone. Redirect it, so that Python does not fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(options.command, f"{error.strerror or error}{where}")
    except torch.OutOfMemoryError as error:
        return _fail(options.command, str(error).splitlines()[0])
    except KeyboardInterrupt:
        return _fail(options.command, "interrupted", status=130)


def _fail(command: str, sentence: str, status: int = 1) -> int:
    print(f"fastattn {command}: {sentence}", file=sys.stderr)
    return status


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only the module of the command that is called is imported."""
    parser = argparse.ArgumentParser(
        prog="fastattn", description="Fused attention and MLP for PyTorch: exact, drop-in, open to look into."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, (explanation, load) in COMMANDS.items():
        command = commands.add_parser(name, help=explanation, description=explanation)
        if name in arguments:
            add_arguments, run = load()
            add_arguments(command)
            command.set_defaults(run=run)
    return parser


def _version() -> str:
    from fastattn import __version__

    return f"fastattn {__version__}"


Loader = Callable[[], tuple[Callable, Callable]]


def _demo() -> tuple[Callable, Callable]:
    from fastattn import demo

    return demo.add_arguments, demo.run


def _look() -> tuple[Callable, Callable]:
    from fastattn import looking

    return looking.add_arguments, looking.run


def _generate() -> tuple[Callable, Callable]:
    from fastattn import generating

    return generating.add_arguments, generating.run


def _doctor() -> tuple[Callable, Callable]:
    from fastattn.measuring import doctor

    return doctor.add_arguments, doctor.run


def _prove() -> tuple[Callable, Callable]:
    from fastattn.measuring import prove

    return prove.add_arguments, prove.run


def _bench() -> tuple[Callable, Callable]:
    from fastattn.measuring import bench

    return bench.add_arguments, bench.run


COMMANDS: dict[str, tuple[str, Loader]] = {
    "demo": ("train a transformer on these modules, beside an eager one, and look inside", _demo),
    "look": ("write a page about what happens inside a model on a text: heads, layers, neurons", _look),
    "generate": ("go on with a text by a model, word by word", _generate),
    "doctor": ("say what serves on this machine and why, and test that it computes right", _doctor),
    "prove": ("test and time the kernels on this GPU, so that those serve that are right and faster", _prove),
    "bench": ("a short comparison with other implementations on this machine", _bench),
}


if __name__ == "__main__":
    sys.exit(main())
