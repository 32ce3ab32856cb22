"""Command line: parses and checks the arguments, then runs the command. torch is imported only after the input is checked.

Exit codes are those of exit_codes.py. A command whose output is closed early, as by `| head -1`, ends without a message; its
code is 141 (128 + SIGPIPE), as that of a program ended by this signal.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kd_accel import __version__
from kd_accel.config.command_line import HELP_OF_ALLOW, CommandParser
from kd_accel.config.evaluation import is_evaluation_setting, parse_evaluation
from kd_accel.config.fields import nearest
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.config.seeds import HELP as HELP_OF_SEEDS
from kd_accel.config.seeds import parse_seeds, with_seed
from kd_accel.config.sweep import parse_sweep
from kd_accel.config.wandb_sweep import agent_run_id, as_trial_of_agent
from kd_accel.errors import OutputClosed, UserError
from kd_accel.exit_codes import exit_codes
from kd_accel.io.files import is_directory
from kd_accel.io.user_code import allow, take_allowance
from kd_accel.losses.registry import names

_LOSSES = {"logits": names("logits"), "features": names("features")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit the process with its code."""
    with exit_codes(), _flushed_stdout():
        command, *arguments = take_allowance(sys.argv[1:] if argv is None else argv) or ["--help"]
        _handler(command)(arguments)


@contextmanager
def _flushed_stdout() -> Iterator[None]:
    """Flush stdout at the end, and raise OutputClosed if it has no reader; the interpreter's own flush would print an error."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    is_open = _flush_stdout() and not (isinstance(error, BrokenPipeError) and _has_no_reader())
    is_success = error is None or (isinstance(error, SystemExit) and not error.code)
    if not is_open and (is_success or isinstance(error, BrokenPipeError)):
        raise OutputClosed from None
    if error is not None:
        raise error


def _flush_stdout() -> bool:
    """Flush stdout and return whether it has a reader. What cannot be written is discarded."""
    if sys.stdout is None:  # closed by the shell, as by `>&-`
        return True
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return False
        raise UserError(f"stdout: cannot write ({error.strerror}); free disk space, or redirect to another file") from None
    return True


def _has_no_reader() -> bool:
    """Return whether stdout is a pipe closed at its other end. With unbuffered output a flush has nothing to fail on."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):  # no stdout, or an object of the caller of `main`
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _handler(command: str) -> Callable[[list[str]], None]:
    if command in _COMMANDS:
        return _COMMANDS[command][1]
    if command in ("-h", "--help"):
        return _overview
    if command == "--version":
        return lambda _: print(__version__)
    raise UserError(f"{command!r} is not a command{nearest(command, list(_COMMANDS))} (commands: {', '.join(_COMMANDS)})")


def _overview(_: list[str]) -> None:
    print("usage: kd-accel COMMAND ...\n")
    print("\n".join(f"  {name:10} {text}" for name, (text, _) in _COMMANDS.items()))
    print(f"\n{HELP_OF_ALLOW}\nkd-accel COMMAND --help lists the arguments and settings of a command.")


def _run_parser(command: str, description: str, arguments: str = "") -> CommandParser:
    return CommandParser(command, arguments, description, config_class=RunConfig, takes_files=True, losses=_LOSSES)


def _train(argv: list[str]) -> None:
    parser = _run_parser("train", "Train as configured, or resume from the latest checkpoint.", "[--seeds N]")
    parser.add_argument("--seeds", metavar="N", help=f"{HELP_OF_SEEDS} Runs in turn, in NAME-seedK each.")
    config, values = parse_config(RunConfig, argv, parser=parser)
    configs = [as_trial_of_agent(config)]
    if values.seeds is not None:
        mistakes: list[str] = []
        if agent_run_id():
            mistakes.append("--seeds: several runs cannot share the W&B run of an agent; make seed a parameter of the sweep")
        configs = [with_seed(configs[0], seed) for seed in parse_seeds(values.seeds, mistakes)]
        if mistakes:
            raise UserError("\n".join(mistakes))
    from kd_accel.commands.train import run_training

    for each in configs:
        run_training(each)


def _cache(argv: list[str]) -> None:
    action, *rest = argv or ["--help"]
    if action in ("-h", "--help"):
        print("usage: kd-accel cache build|verify|info [FILE ...] [--a.b VALUE ...]\n")
        print("\n".join(f"  {name:8} {text}" for name, text in _CACHE_ACTIONS.items()))
        return
    if action not in _CACHE_ACTIONS:
        raise UserError(f"cache {action!r} is not a command{nearest(action, list(_CACHE_ACTIONS))} (build, verify or info)")
    parser = _run_parser(f"cache {action}", _CACHE_ACTIONS[action])
    if action != "build":
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    config, values = parse_config(RunConfig, rest, parser=parser)
    from kd_accel.commands import cache

    if action == "build":
        cache.run_cache_build(config)
    elif action == "verify":
        cache.run_cache_verify(config, as_json=values.json)
    else:
        cache.run_cache_info(config, as_json=values.json)


def _data(argv: list[str]) -> None:
    action, *rest = argv or ["--help"]
    if action in ("-h", "--help"):
        print("usage: kd-accel data check [FILE ...] [--data.NAME VALUE ...] [--json]\n")
        print(f"  check    {_DATA_CHECK}")
        return
    if action != "check":
        raise UserError(f"data {action!r} is not a command{nearest(action, ['check'])} (check)")
    parser = _run_parser("data check", _DATA_CHECK, "[--json]")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    config, values = parse_config(RunConfig, rest, parser=parser)
    from kd_accel.commands.data import run_data_check

    run_data_check(config, as_json=values.json)


def _plan(argv: list[str]) -> None:
    parser = _run_parser("plan", "Estimate the cost of live and cached teacher outputs on this machine.", "[--json]")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    config, values = parse_config(RunConfig, argv, parser=parser)
    from kd_accel.commands.plan import run_plan

    run_plan(config, as_json=values.json)


def _evaluate(argv: list[str]) -> None:
    description = "Evaluate finished runs: accuracy, of each class too, loss, calibration, agreement with the teacher."
    parser = CommandParser(
        "evaluate",
        "RUN ... [--split test|val] [--out FILE]",
        description,
        config_class=RunConfig,
        is_taken=is_evaluation_setting,
        losses=_LOSSES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="Run directories, evaluated in turn.")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="Held-out split to evaluate on.")
    parser.add_argument("--out", type=Path, default=None, help="Parquet file for the predictions, one row per sample.")
    configs, values = parse_evaluation(argv, parser=parser)
    from kd_accel.commands.evaluate import run_evaluations

    run_evaluations(values.runs, configs, split=values.split, out=values.out)


def _predict(argv: list[str]) -> None:
    description = "Predict the classes of image files; unreadable files are named, and make the exit code 2."
    parser = CommandParser("predict", "RUN FILE ... [--top_k N] [--batch_size N] [--out FILE]", description)
    parser.add_argument("run", metavar="RUN", type=Path, help="Run directory.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="Image files, and directories, of which all images are used.")
    parser.add_argument("--top_k", type=int, default=None, help="Number of classes whose scores are added to each line.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images per forward.")
    parser.add_argument("--out", type=Path, default=None, help="Parquet file for the predictions, which are also printed.")
    values = parser.parse(argv)
    from kd_accel.commands.predict import run_predictions

    run_predictions(values.run, values.files, top_k=values.top_k, batch_size=values.batch_size, out=values.out)


def _export(argv: list[str]) -> None:
    description = "Write the network of a finished run as a file to deploy, once its logits are found equal to the network's."
    parser = CommandParser("export", "RUN --format onnx|torch|hub [--normalize] [--out PATH]", description)
    parser.add_argument("run", metavar="RUN", type=Path, help="Run directory.")
    parser.add_argument(
        "--format",
        choices=["onnx", "torch", "hub"],
        required=True,
        help="onnx = model.onnx; torch = model.pt2 of torch.export; hub = folder for the Hugging Face Hub.",
    )
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="Put the normalization into the file, whose input is then uint8 [B, 3, S, S]; else it is normalized float32.",
    )
    parser.add_argument("--out", type=Path, default=None, help="File or folder to write; by default in RUN/export.")
    values = parser.parse(argv)
    from kd_accel.commands.export import run_export

    run_export(values.run, file_format=values.format, normalizes=values.normalize, out=values.out)


def _bench(argv: list[str]) -> None:
    description, arguments = "Measure parameters, MACs and latency.", "RUN_OR_ARCH ... [--out FILE]"
    parser = CommandParser("bench", arguments, description, config_class=BenchConfig)
    parser.add_argument("models", metavar="RUN_OR_ARCH", nargs="+", help="Run directories or architectures.")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the results, which are also printed.")
    config, values = parse_config(BenchConfig, argv, parser=parser)
    allow([name for name in values.models if not is_directory(name)])
    from kd_accel.commands.bench import run_bench

    run_bench(values.models, config, out=values.out)


def _report(argv: list[str]) -> None:
    parser = CommandParser(
        "report", "RUN ... --out DIR [--bench FILE]", "Write tables, pictures and one HTML page on several runs."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="Run directories, in the order of the table.")
    parser.add_argument(
        "--out", type=Path, required=True, help="Directory for results.md, results.json, index.html, and the plots."
    )
    parser.add_argument("--bench", type=Path, default=None, help="JSON file of `kd-accel bench --out`.")
    values = parser.parse(argv)
    from kd_accel.commands.report import run_report

    run_report(values.runs, out=values.out, bench_file=values.bench)


def _losses(argv: list[str]) -> None:
    parser = CommandParser("losses", "[NAME]", "Print the registered losses, or one loss with its settings.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="Registered name, or import:package.module:Class.")
    name = parser.parse(argv).name
    allow([name] if name else [])
    from kd_accel.commands.losses import run_losses

    run_losses(name)


def _layers(argv: list[str]) -> None:
    description = "Print the layers of a network that a feature loss can compare, with their shapes."
    parser = CommandParser("layers", "RUN_OR_ARCH [--image_size N] [--stem NAME] [--arch_args MAPPING] [--all]", description)
    parser.add_argument("network", metavar="RUN_OR_ARCH", help="Run directory or architecture.")
    parser.add_argument("--image_size", type=int, help="Side of the images in pixels; by default that of the run, or 32.")
    parser.add_argument(
        "--stem", choices=["imagenet", "no_pool", "cifar"], default="imagenet", help="First layers of a ResNet."
    )
    parser.add_argument(
        "--arch_args", metavar="MAPPING", help="Arguments of an architecture's builder, as model.arch_args: '{img_size: 32}'."
    )
    parser.add_argument("--all", action="store_true", help="Also print the layers inside other layers.")
    values = parser.parse(argv)
    allow([values.network])
    from kd_accel.commands.layers import run_layers

    run_layers(values.network, image_size=values.image_size, stem=values.stem, arch_args=values.arch_args, is_deep=values.all)


def _reproduce(argv: list[str]) -> None:
    end = argv.index("--") if "--" in argv else len(argv)
    description = (
        "Run a chain of trainings, each in its own launch, then bench and report; completed steps are skipped. "
        "Flags after -- are added to every training."
    )
    parser = CommandParser("reproduce", "", description, config_class=ReproduceConfig, takes_files=True)
    config, _ = parse_config(ReproduceConfig, argv[:end], parser=parser)
    from kd_accel.commands.reproduce import run_chain

    run_chain(config, overrides=argv[end + 1 :])


def _sweep_parser() -> CommandParser:
    description = (
        "Train a student for each point of a grid of settings, with several seeds, from one cache, and write the table of the "
        "results; finished runs are skipped."
    )
    parser = _run_parser("sweep", description, "--over NAME=V1,V2,... [--seeds N] [--out DIR] [--launch FILE]")
    add = parser.add_argument
    add("--over", metavar="NAME=V1,V2,...", action="append", required=True, help="Setting with its values; repeat for a grid.")
    add("--seeds", metavar="N", help=HELP_OF_SEEDS)
    add("--out", metavar="DIR", type=Path, help="Directory of the sweep; by default that of a run, with -sweep.")
    add("--launch", metavar="FILE", help="Config file of `accelerate launch`; by default one process without a launcher.")
    return parser


def _sweep(argv: list[str]) -> None:
    sweep, values = parse_sweep(argv, parser=_sweep_parser())
    from kd_accel.commands.sweep import run_sweep

    run_sweep(sweep, launch=values.launch)


_CACHE_ACTIONS = {
    "build": "Run the teacher over all samples and views, and write the files that the cache lacks.",
    "verify": "Check every byte, and recompute a few outputs with the teacher.",
    "info": "Print the contents of a cache.",
}

_DATA_CHECK = "Decode every image once, and list what is unreadable, left out, repeated or of one color."

_COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "train": ("Train a teacher, a student, or a student with its teacher.", _train),
    "cache": ("Store the outputs of a teacher: build, verify, info.", _cache),
    "data": ("Check the images and labels of a data set: check.", _data),
    "plan": ("Estimate the cost of a live and of a cached teacher on this machine.", _plan),
    "evaluate": ("Evaluate finished runs, and write their predictions.", _evaluate),
    "predict": ("Predict the classes of image files with a finished run.", _predict),
    "export": ("Write the network of a run as a file or a folder to deploy.", _export),
    "bench": ("Measure parameters, MACs and latency of runs or architectures.", _bench),
    "report": ("Write tables, pictures and one HTML page on several runs.", _report),
    "layers": ("Print the layers of a network that a feature loss can compare.", _layers),
    "losses": ("Print the registered losses and their settings.", _losses),
    "reproduce": ("Run a chain of trainings, then bench and report.", _reproduce),
    "sweep": ("Train students over a grid of settings, from one cache.", _sweep),
}
