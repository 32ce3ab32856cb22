"""The command line: parse and check, then hand over to the command. torch is imported only once the input is known to be good.

Exit codes: 0 done; 2 the user's mistake, one paragraph on stderr from one process; 1 a fault of the program (traceback);
128 + N stopped by signal N, after a checkpoint.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kd_accel import __version__
from kd_accel.config.parsing import HELP_OF_ALLOW, build_parser, nearest, parse_arguments, parse_config, plain_parser
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.errors import PeerLost, Preempted, UserError
from kd_accel.io.user_code import allow, take_allowance

_OTHER_RANKS_WAIT_S = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave the process with its exit code."""
    try:
        processes, _ = _of_launch("WORLD_SIZE", 1, "number of processes"), _of_launch("RANK", 0, "number of a process")
    except UserError as error:
        print(f"kd-accel: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if processes > 1:
        _leave_at_once(code)
    if code:
        raise SystemExit(code)


def _of_launch(variable: str, default: int, meaning: str) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable}: {text!r} is no {meaning}; start with one of the files in launch/, or unset it")
    return int(text)


def _run(arguments: list[str]) -> int:
    try:
        _dispatch(take_allowance(arguments))
    except UserError as error:
        _report_once(str(error))
        return 2
    except Preempted as stop:
        if not _is_another_rank():
            print(f"kd-accel: {stop}", file=sys.stderr, flush=True)
        return 128 + stop.number
    except KeyboardInterrupt:
        if not _is_another_rank():
            print("kd-accel: stopped by SIGINT; what was written last is whole", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except PeerLost as lost:  # of another rank: most likely rank 0 has left with a mistake, and the launcher will end this one
        _wait_for_rank_0()
        print(f"kd-accel: {lost}", file=sys.stderr, flush=True)
        return 1
    except Exception:
        _wait_for_rank_0()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        traceback.print_exc()  # not raised: the interpreter's end may wait for NCCL, and the other ranks for this one
        return 1
    return 0


def _leave_at_once(code: int) -> None:
    """One of several processes ends without the interpreter's own clean-up: threads of the communication library can still be
    there, and were seen to abort, then, a process that had done all its work.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(__version__)
    elif command in _COMMANDS:
        _COMMANDS[command][1](arguments[1:])
    else:
        raise UserError(f"{command!r} is no command{nearest(command, list(_COMMANDS))} (there are: {', '.join(_COMMANDS)})")


def _overview() -> str:
    lines = ["usage: kd-accel COMMAND ...", "", *(f"  {name:10} {text}" for name, (text, _) in _COMMANDS.items()), ""]
    return "\n".join([*lines, HELP_OF_ALLOW, "kd-accel COMMAND --help lists what a command takes."])


def _report_once(message: str) -> None:
    """Print from one process: the others wait, and rank 0 ends the launch meanwhile, unless it had no mistake to report."""
    _wait_for_rank_0()
    printable = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message)
    print(f"kd-accel: {printable}", file=sys.stderr, flush=True)  # what a file says must not steer the terminal


def _wait_for_rank_0() -> None:
    if _is_another_rank():
        time.sleep(_OTHER_RANKS_WAIT_S)


def _is_another_rank() -> bool:
    return int(os.environ.get("RANK", "0")) != 0


def _train(argv: list[str]) -> None:
    parser = build_parser(RunConfig, prog="kd-accel train", description="Train what the config says.")
    config, _ = parse_config(RunConfig, argv, parser=parser)
    from kd_accel.commands.train import run_training

    run_training(config)


def _cache(argv: list[str]) -> None:
    action, *rest = argv or ["--help"]
    if action in ("-h", "--help"):
        print("usage: kd-accel cache build|verify|info --config F [--a.b value ...]\n")
        print("\n".join(f"  {name:8} {text}" for name, text in _CACHE_ACTIONS.items()))
        return
    if action not in _CACHE_ACTIONS:
        raise UserError(f"cache {action!r} is no command{nearest(action, list(_CACHE_ACTIONS))} (build, verify or info)")
    parser = build_parser(RunConfig, prog=f"kd-accel cache {action}", description=_CACHE_ACTIONS[action])
    if action != "build":
        parser.add_argument("--json", action="store_true", help="print JSON")
    config, values = parse_config(RunConfig, rest, parser=parser)
    from kd_accel.commands import cache, cache_report

    if action == "build":
        cache.run_cache_build(config)
    elif action == "verify":
        cache_report.run_cache_verify(config, as_json=values["json"])
    else:
        cache_report.run_cache_info(config, as_json=values["json"])


def _plan(argv: list[str]) -> None:
    parser = build_parser(RunConfig, prog="kd-accel plan", description="What live and cached signals would cost here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    config, values = parse_config(RunConfig, argv, parser=parser)
    from kd_accel.commands.plan import run_plan

    run_plan(config, as_json=values["json"])


def _evaluate(argv: list[str]) -> None:
    parser = _parser("evaluate", "RUN [--split test|val]", "Accuracy, loss and agreement with the teacher of a trained run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="held-out samples to evaluate on")
    values = parse_arguments(parser, argv)
    from kd_accel.commands.evaluate import run_evaluation

    run_evaluation(values.run, split=values.split)


def _bench(argv: list[str]) -> None:
    parser = build_parser(
        BenchConfig,
        prog="kd-accel bench",
        description="Parameters, MACs and latency.",
        arguments="RUN_OR_ARCH ... [--out FILE]",
    )
    parser.add_argument("models", metavar="RUN_OR_ARCH", nargs="+", help="run directories or archs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures; without it they are printed")
    config, values = parse_config(BenchConfig, argv, parser=parser)
    allow([name for name in values["models"] if not Path(name).is_dir()])
    from kd_accel.commands.bench import run_bench

    run_bench(values["models"], config, out=values["out"])


def _report(argv: list[str]) -> None:
    parser = _parser("report", "RUN ... --out DIR [--bench FILE]", "The table of results and the pictures.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories, in the order of the table")
    parser.add_argument("--out", type=Path, required=True, help="directory for results.md, results.json and pictures")
    parser.add_argument("--bench", type=Path, default=None, help="JSON file of `kd-accel bench --out`")
    values = parse_arguments(parser, argv)
    from kd_accel.commands.report import run_report

    run_report(values.runs, out=values.out, bench_file=values.bench)


def _reproduce(argv: list[str]) -> None:
    own, overrides = _split_at_dashes(argv)
    parser = build_parser(
        ReproduceConfig,
        prog="kd-accel reproduce",
        description="Train the runs of a chain, each in its own launch, then bench and report; what is done is skipped. "
        "Flags after -- go to every training.",
    )
    config, _ = parse_config(ReproduceConfig, own, parser=parser)
    from kd_accel.commands.reproduce import run_chain

    run_chain(config, overrides=overrides)


def _split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _parser(command: str, arguments: str, description: str) -> ArgumentParser:
    prog, usage = f"kd-accel {command}", f"%(prog)s {arguments}"
    return plain_parser(prog, usage, description)


_CACHE_ACTIONS = {
    "build": "let the teacher answer for all samples and views, and write what the cache lacks",
    "verify": "check every byte, and a few answers against the teacher",
    "info": "what a cache holds",
}

_COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "train": ("train a teacher, a student, or a student with its teacher", _train),
    "cache": ("keep what a teacher says: build, verify, info", _cache),
    "plan": ("what a live teacher and a cached one would cost here", _plan),
    "evaluate": ("accuracy, loss and agreement of a trained run", _evaluate),
    "bench": ("parameters, MACs and latency of runs or architectures", _bench),
    "report": ("table and pictures of several runs", _report),
    "reproduce": ("a whole chain of trainings, measured and compared", _reproduce),
}
