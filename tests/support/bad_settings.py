"""Bad settings, bad files of weights and untrusted code: cases of tests/io/test_bad_inputs.py.

A case is (name, function that prepares its directory, command, part of the message). `...` in a message stands for any text,
and `{p}` in a command for the directory of the case.
"""

from tests.support import bad_files as make
from tests.support.bad_files import config, cut, header, put, tensor, weights, write
from tests.support.launching import ROOT, SMALL

PARSE = ["train", "--config={p}/bad.yaml"]
WEIGHTS = ["train", *SMALL, "--run_dir={p}/new", "--model.weights={p}/w.safetensors"]
TEACHER = ["train", *SMALL, "--run_dir={p}/new", "--teacher.run={p}/run"]
OWN = ["train", "--run_dir={p}/new", "--tracking.wandb=disabled"]

CONFIGS = [
    ("unknown key", config("optim: {lrr: 1}"), PARSE, "optim.lrr: no such setting; did you mean optim.lr?"),
    ("python tag", config("name: !!python/object/apply:os.system [true]"), PARSE, "could not determine a constructor"),
    ("python name", config("name: !!python/name:os.system"), PARSE, "could not determine a constructor"),
    ("tag of another type", config("name: !!bool perhaps"), PARSE, "a value does not fit its tag"),
    ("billion laughs", config(make.LAUGHS), PARSE, "more than 20000 values, its aliases expanded"),
    ("recursive alias", config("data: &a {x: *a}"), PARSE, "an alias contains itself"),
    ("nested deeply", config(f"name: {make.nested(5000)}"), PARSE, "nested more than 32 deep"),
    ("nested quite deeply", config(f"name: {make.nested(60)}"), PARSE, "nested more than 32 deep"),
    ("duplicate key", config("seed: 1\nseed: 2"), PARSE, "duplicate key seed"),
    ("long file", config("#" * 300_000), PARSE, "more than 256 KiB, too long for settings"),
    ("binary file", config(b"\xff\xfe\x00"), PARSE, "is not valid YAML"),
    ("list", config("[1, 2]"), PARSE, "holds a list; it must hold settings"),
    ("empty file", config(""), PARSE, "holds nothing"),
    ("missing file", lambda place: None, PARSE, "bad.yaml' not found"),
    ("infinite", config("optim: {weight_decay: .inf}"), PARSE, "optim.weight_decay: inf must be a finite number"),
    ("too large for a float", config("optim: {lr: 1.0e+999}"), PARSE, "optim.lr: inf must be a finite number"),
    ("not a number", config("optim: {step_gamma: .nan}"), PARSE, "optim.step_gamma: nan must be a finite number"),
    ("thousands of digits", config(f"seed: {'9' * 5000}"), PARSE, "Exceeds the limit"),
    (
        "large integer",
        config(f"train: {{epochs: {10**30}}}"),
        PARSE,
        "train.epochs: 10000000000000000000 is out of range",
    ),
    ("null for a text", config("data: {source: null}"), PARSE, "data.source: must be text, not null"),
    ("null for a number", config("seed: null"), PARSE, "seed: must be an integer, not null"),
    ("boolean for a number", config("train: {epochs: true}"), PARSE, "train.epochs: must be an integer, not True"),
    (
        "zero byte",
        config('data: {source: "parquet:a\\0b"}'),
        PARSE,
        "data.source: 'parquet:a\\x00b' has control characters",
    ),
    ("lone surrogate", config('name: "\\ud800"'), PARSE, "has control characters or lone surrogates"),
    ("terminal escape", config('"\\e[2J": 1'), PARSE, "\\x1b[2J: no such setting"),
    ("name with a path", config("name: ../../x"), PARSE, "must be a single directory name"),
    ("name of the parent directory", config("name: .."), PARSE, "must be a single directory name"),
    ("directory like an option", config("run_dir: --allow_import"), PARSE, "would be parsed as an option"),
    (
        "class to be imported",
        config("model: {arch_args: {x: {class_path: antigravity.Class, init_args: {}}}}"),
        PARSE,
        "model.arch_args.x: must be a number, text, true, false, or a list of these, not {'class_path'",
    ),
    ("lone surrogate in a key", config('"\\ud800": 1'), PARSE, "surrogate pair"),
    ("lone surrogate in a nested key", config('distill: {features: {"\\ud800": false}}'), PARSE, "surrogate pair"),
    (
        "lone surrogate in a flag",
        None,
        ["train", "--teacher.run=x", '--distill.features={"\\ud800": false}'],
        "distill.features",
    ),
    ("lone surrogate in arguments", None, ["train", '--model.arch_args={"\\ud800": [[]]}'], "model.arch_args"),
    ("huge image size", config("data: {image_size: 100000}"), PARSE, "data.image_size: 100000 must be at most 4096"),
    ("more memory than allowed", config("data: {image_size: 4000}"), PARSE, "data.memory_limit_mib: 4096"),
    (
        "huge padding",
        config("data: {transform: {random_crop: {padding: 1000000}}}"),
        PARSE,
        "data.transform.random_crop.padding: 1000000 must be",
    ),
    ("a million workers", config("data: {num_workers: 1000000}"), PARSE, "data.num_workers: 1000000 must be at most 1024"),
    ("allow_import in a file", config("allow_import: true"), PARSE, "allow_import: no such setting"),
    ("allow_import with a value", None, ["train", "--allow_import=yes"], "allow_import: no such setting"),
    ("unknown command", None, ["trian"], "did you mean train?"),
    ("deeply nested flag", None, ["train", f"--model.arch_args={make.nested(3000)}"], "model.arch_args: must be settings"),
    ("batch of terabytes", None, ["bench", "torchvision/resnet18", "--batch_sizes=[900000000]"], "do not fit in memory"),
    ("report directory that is a file", write("out", ""), ["report", "{p}/run", "--out={p}/out"], "cannot write to"),
]

FILES_OF_WEIGHTS = [
    ("pickle", make.pickled("w.pt"), [*WEIGHTS[:-1], "--model.weights={p}/w.pt"], "is a pickle"),
    ("pickle under another name", make.pickled("w.safetensors"), WEIGHTS, "its header claims"),
    ("empty", write("w.safetensors", b""), WEIGHTS, "its header claims 0 bytes"),
    ("truncated", lambda place: (weights(dict)(place), cut("w.safetensors")(place)), WEIGHTS, "damaged or not a safetensors"),
    ("header beyond the end", header({}, length=1000), WEIGHTS, "its header claims 1000 bytes"),
    ("header of exabytes", header({}, length=2**60), WEIGHTS, f"its header claims {2**60} bytes"),
    ("header of megabytes", header(b" " * (17 * 2**20)), WEIGHTS, "17825792 bytes"),
    ("header that is not JSON", header(b"{{{"), WEIGHTS, "damaged or not a safetensors"),
    ("header nested deeply", header(b'{"x":' + b"[" * 9000 + b"]" * 9000 + b"}"), WEIGHTS, "damaged or not a safetensors"),
    ("tensor of terabytes", header(tensor("F32", [2**40], 0, 2**42)), WEIGHTS, "damaged or not a safetensors"),
    ("overflowing shape", header(tensor("F32", [2**62, 8], 0, 4), b"1234"), WEIGHTS, "damaged or not a safetensors"),
    ("data outside the file", header(tensor("F32", [1], 2**40, 2**40 + 4)), WEIGHTS, "damaged or not a safetensors"),
    ("unknown type", header(tensor("Q7", [1], 0, 4), b"1234"), WEIGHTS, "damaged or not a safetensors"),
    ("directory", lambda place: (place / "w.safetensors").mkdir(), WEIGHTS, "no finished run"),
    ("pipe", make.pipe("w.safetensors"), WEIGHTS, "is not a regular file"),
    ("other keys", header(tensor("F32", [1], 0, 4), b"1234"), WEIGHTS, "does not fit import:tests.support.models:student"),
    (
        "other shape",
        weights(lambda t: t.update({"layer2.0.bias": t["layer2.0.bias"][:2].clone()})),
        WEIGHTS,
        "of another shape (layer2.0.bias)",
    ),
    (
        "non-finite values",
        weights(lambda t: t["fc.bias"].fill_(float("nan"))),
        WEIGHTS,
        "values that are not finite",
    ),
]

OWN_CODE = [
    (
        "function of one argument",
        make.module("bad_one", "def f(split): pass"),
        [*OWN, "--data.source=import:bad_one:f"],
        "data.source: import:bad_one:f does not accept its arguments",
    ),
    (
        "function that fails",
        make.module("bad_two", "def f(*a):\n    return 1 / 0"),
        [*OWN, "--data.source=import:bad_two:f"],
        "fails with ZeroDivisionError: division by zero in ...bad_two.py, line 2",
    ),
    (
        "module that fails",
        make.module("bad_three", "1 / 0"),
        [*OWN, "--data.source=import:bad_three:f"],
        "importing 'bad_three' fails with ZeroDivisionError",
    ),
    (
        "module that exits",
        make.module("bad_four", "import sys; sys.exit(0)"),
        [*OWN, "--model.arch=import:bad_four:f"],
        "importing 'bad_four' fails with SystemExit",
    ),
    (
        "model that exits",
        make.module("bad_five", "def f(num_classes): raise SystemExit"),
        [*OWN, "--model.arch=import:bad_five:f"],
        "fails with SystemExit",
    ),
    (
        "function that returns no model",
        None,
        [*OWN, "--model.arch=import:builtins:dict"],
        "returns dict, not a torch.nn.Module",
    ),
    (
        "function that returns no images",
        None,
        [*OWN, "--data.source=import:tests.support.models:no_images"],
        "must return a data set of pairs or dicts, or a mapping",
    ),
    ("malformed name", None, [*OWN, "--data.source=import:x"], "must have the form"),
]
"""Code that is typed by the user, and so is run."""

SPY = make.module("spy", "open('was_here', 'w')\ndef f(*a, **k): pass")
BOTH = lambda text: lambda place: (SPY(place), config(text)(place))  # noqa: E731
FOREIGN = [
    (
        "source",
        BOTH("data: {source: import:spy:f}"),
        PARSE,
        "data.source: ...bad.yaml names 'import:spy:f', code that was not typed",
    ),
    ("model", BOTH("model: {arch: import:spy:f}"), PARSE, "model.arch: ...bad.yaml names 'import:spy:f'"),
    (
        "teacher",
        BOTH("teacher: {arch: import:spy:f, weights: w, mean: [0, 0, 0], std: [1, 1, 1]}"),
        PARSE,
        "teacher.arch: ...bad.yaml names",
    ),
    (
        "logit loss",
        BOTH("teacher: {run: x}\ndistill: {logits: {loss: import:spy:f}}"),
        PARSE,
        "distill.logits.loss: ...bad.yaml names 'import:spy:f'",
    ),
    (
        "feature loss",
        BOTH("teacher: {run: x}\ndistill: {features: {mine: {loss: import:spy:f}}}"),
        [*PARSE, "--distill.features.mine.weight=0.2"],
        "distill.features.mine.loss: ...bad.yaml names 'import:spy:f'",
    ),
    (
        "feature loss by its name",
        BOTH("teacher: {run: x}\ndistill: {features: {'import:spy:f': {weight: 1.0}}}"),
        PARSE,
        "distill.features: ...bad.yaml names 'import:spy:f'",
    ),
    (
        "argument of the builder",
        BOTH("model: {arch_args: {layer: [import:spy:f]}}"),
        PARSE,
        "model.arch_args.layer: ...bad.yaml names 'import:spy:f'",
    ),
    (
        "another name typed as a flag",
        BOTH("data: {source: import:spy:f}"),
        [*PARSE, "--model.arch=import:spy:g"],
        "data.source: ...names 'import:spy:f'",
    ),
    (
        "file called the command line",
        lambda place: (SPY(place), write("the command line", "model: {arch: import:spy:f}")(place)),
        ["train", "--config=the command line"],
        "names 'import:spy:f'",
    ),
    (
        "run of a teacher",
        lambda place: (SPY(place), put("run/model.json", arch="import:spy:f")(place)),
        TEACHER,
        "teacher: ...run/model.json names 'import:spy:f'",
    ),
    (
        "run to evaluate",
        None,
        ["evaluate", "{p}/run"],
        "model.arch: ...run/config.yaml names 'import:tests.support.models:teacher'...add --allow_import",
    ),
    (
        "model of a run to evaluate",
        lambda place: (
            SPY(place),
            put("run/model.json", arch="import:spy:f")(place),
            write("run/config.yaml", "data: {source: digits}")(place),
        ),
        ["evaluate", "{p}/run"],
        "evaluate: ...run/model.json names 'import:spy:f'",
    ),
    ("data of a run to evaluate", make.library_run, ["evaluate", "{p}/run"], "run/config.yaml names 'import:spy:f'"),
    ("run to measure", None, ["bench", "{p}/run"], "run/model.json names 'import:tests.support.models:teacher'"),
    (
        "chain",
        lambda place: (
            BOTH("model: {arch: import:spy:f}")(place),
            write("chain.yaml", f"runs: [{place}/bad.yaml]\nlaunch: {ROOT}/launch/cpu2.yaml\nreport_dir: r")(place),
        ),
        ["reproduce", "--config={p}/chain.yaml"],
        "bad.yaml: model.arch: ...names 'import:spy:f'",
    ),
]
