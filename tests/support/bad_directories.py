"""Invalid run directories, checkpoints, caches and datasets: cases of test_bad_inputs.py.

A case is a tuple: name, function that prepares the directory (None = unchanged), command, expected message. `{p}` in a command
is the directory of the case, and `...` in a message is any text.
"""

from tests.support import bad_files as make
from tests.support.bad_files import change, checkpoint_file, cut, link, put, state, table, write
from tests.support.caches import flags_of
from tests.support.launching import SMALL

TEACHER = ["train", *SMALL, "--run_dir={p}/new", "--teacher.run={p}/run"]
RESUME = ["train", *SMALL, "--run_dir={p}/paused"]
CACHED = ["train", *SMALL, "--run_dir={p}/new", *flags_of("{p}/run", "{p}/cache")]
BUILD, VERIFY, INFO = (["cache", action, *SMALL, *flags_of("{p}/run", "{p}/cache")] for action in ("build", "verify", "info"))
DATA = ["train", "--data.source=parquet:{p}/data", "--data.image_column=img", "--run_dir={p}/new", "--tracking.wandb=disabled"]
FOLDER = ["train", "--data.source=imagefolder:{p}/folder", "--run_dir={p}/new", "--tracking.wandb=disabled"]
SHARD = "cache/train/view-0001/layer1-00000-of-00001.safetensors"
STATE = "is damaged ({} wrong or missing)"

RUNS = [
    ("missing card", make.remove("run/model.json"), TEACHER, "no finished run"),
    ("card that is not JSON", write("run/model.json", "{"), TEACHER, "is damaged (not valid JSON)"),
    ("card nested deeply", write("run/model.json", make.nested(100_000)), TEACHER, "is damaged (nested too deeply)"),
    (
        "card nested beyond the limit",
        put("run/model.json", arch_args={"x": [[[]]] * 2, "y": eval("[" * 70 + "]" * 70)}),
        TEACHER,
        "too deeply",
    ),
    ("card of 4 GiB", make.sparse("run/model.json", 2**32), TEACHER, "is damaged (larger than 64.0 MiB)"),
    ("card that is a pipe", make.pipe("run/model.json"), TEACHER, "is damaged (not a regular file)"),
    ("card with a boolean image size", put("run/model.json", image_size=True), TEACHER, "image_size wrong or missing"),
    ("card with a huge image size", put("run/model.json", image_size=10**9), TEACHER, "image_size wrong or missing"),
    ("card with an infinite mean", put("run/model.json", mean=[1e999] * 3), TEACHER, "mean wrong or missing"),
    (
        "card that names a pickle",
        put("run/model.json", arch="timm/resnet18", arch_args={"checkpoint_path": "/tmp/x.pth"}),
        TEACHER,
        "checkpoint_path would load weights",
    ),
    (
        "card of a network of terabytes",
        put("run/model.json", **{**make.SMALL_CARD, "arch_args": {"width_per_group": 10**9}}),
        TEACHER,
        "does not accept",
    ),
    ("truncated weights", cut("run/model.safetensors"), TEACHER, "is damaged or not a safetensors file"),
    ("missing weights", make.remove("run/model.safetensors"), ["bench", "{p}/run"], "model.safetensors not found"),
    ("missing config of a run to evaluate", make.remove("run/config.yaml"), ["evaluate", "{p}/run"], "config.yaml: is missing"),
    ("config with code", write("run/config.yaml", "name: !!python/name:os.system"), ["evaluate", "{p}/run"], "constructor"),
    ("summary that is a list", write("run/summary.json", "[]"), ["report", "{p}/run", "--out={p}/new"], "not a JSON object"),
    (
        "summary with an unknown role",
        put("run/summary.json", role="king"),
        ["report", "{p}/run", "--out={p}/new"],
        "summary.json: is damaged (",
    ),
    ("infinite count", put("run/summary.json", parameters=1e999), ["report", "{p}/run", "--out={p}/new"], "json: is damaged ("),
    (
        "metrics without numbers",
        write("run/metrics.jsonl", '{"step": "x", "epoch": 0, "split": "train", "loss": 1}\n'),
        ["report", "{p}/run", "--out={p}/new"],
        "without step, epoch",
    ),
    (
        "empty bench file",
        write("b.json", "{}"),
        ["report", "{p}/run", "--out={p}/new", "--bench={p}/b.json"],
        "is not a file of",
    ),
    (
        "finished run without data",
        put("run/summary.json", data=[]),
        [
            "train",
            *SMALL,
            "--run_dir={p}/run",
            "--role=teacher",
            "--model.arch=import:tests.support.models:teacher",
            "--train.log_every_steps=4",
        ],
        "is damaged (no data)",
    ),
]

CHECKPOINTS = [
    ("state that is not JSON", make.state_text("{"), RESUME, "holds no intact checkpoint"),
    ("state nested deeply", make.state_text(make.nested(100_000)), RESUME, "holds no intact checkpoint"),
    ("state of a later version", state(lambda s: s.update(version=9)), RESUME, "is of version 9 of the checkpoint format"),
    ("state that is a list", state(lambda s: s.update(state=[])), RESUME, "holds no intact checkpoint"),
    (
        "file outside the checkpoint",
        state(lambda s: s["files"].update({"../../config.yaml": {"bytes": 1, "xxh3_128": ""}})),
        RESUME,
        "no intact",
    ),
    ("state without position", state(lambda s: s["state"].pop("position")), RESUME, STATE.format("position")),
    ("position that is text", state(lambda s: s["state"]["position"].update(step="5")), RESUME, STATE.format("position")),
    ("negative step", state(lambda s: s["state"]["position"].update(step=-5)), RESUME, STATE.format("position")),
    ("infinite time", state(lambda s: s["state"]["position"].update(elapsed_s=1e999)), RESUME, STATE.format("position")),
    ("config that is text", state(lambda s: s["state"].update(config="x")), RESUME, STATE.format("config")),
    ("state without ranks", state(lambda s: s["state"].update(ranks=[])), RESUME, STATE.format("ranks")),
    (
        "state of another teacher",
        state(lambda s: s["state"].update(teacher_fingerprint="0")),
        RESUME,
        "was trained with the teacher 0",
    ),
    (
        "state without random generators",
        state(lambda s: s["state"]["ranks"][0].update(random={})),
        RESUME,
        "does not fit the training",
    ),
    (
        "negative size of the metrics",
        state(lambda s: s["state"].update(metrics_bytes=-1)),
        RESUME,
        STATE.format("metrics_bytes"),
    ),
    ("truncated metrics", cut("paused/metrics.jsonl", 5), RESUME, "is shorter than the checkpoint has recorded"),
    (
        "file that is not tensors",
        checkpoint_file("module.safetensors", b"not tensors"),
        RESUME,
        "is not a valid safetensors file",
    ),
    (
        "tensors of another model",
        checkpoint_file("module.safetensors", lambda t: t.pop(min(t))),
        RESUME,
        "does not fit the training",
    ),
    (
        "optimizer of another model",
        checkpoint_file("optimizer.safetensors", lambda t: t.update({"99.x": t[min(t)].clone()})),
        RESUME,
        "does not fit",
    ),
    (
        "metrics that are a symbolic link",
        link("paused/metrics.jsonl", "elsewhere.jsonl"),
        RESUME,
        "metrics.jsonl is a symbolic link",
    ),
    ("checkpoints that are a symbolic link", link("paused/checkpoints", "elsewhere"), RESUME, "checkpoints is a symbolic link"),
]

CACHES = [
    ("spec that is not JSON", write("cache/spec.json", "{"), CACHED, "is damaged (not valid JSON)"),
    ("spec of many samples", make.cache_spec(lambda c: c["samples"].update(train=10**12)), INFO, "spec.json: is damaged"),
    ("spec of many files", make.cache_spec(lambda c: c.update(views=10**6)), INFO, "spec.json: is damaged"),
    ("spec of no samples per shard", make.cache_spec(lambda c: c.update(samples_per_shard=0)), INFO, "spec.json: is damaged"),
    ("spec of infinite samples", make.cache_spec(lambda c: c.update(batch_samples=1e999)), INFO, "spec.json: is damaged"),
    (
        "spec of terabytes",
        make.cache_spec(lambda c: c["tensors"]["layer1"].update(shape=[2**30, 2**30])),
        INFO,
        "spec.json: is damaged",
    ),
    (
        "spec of an unknown type",
        make.cache_spec(lambda c: c["tensors"]["layer1"].update(dtype="q4")),
        INFO,
        "spec.json: is damaged",
    ),
    ("spec without logits", make.cache_spec(lambda c: c["tensors"].pop("logits")), INFO, "spec.json: is damaged"),
    (
        "spec with half of a surrogate pair",
        make.cache_spec(lambda c: c["fingerprint_fields"].update(teacher="\ud800")),
        INFO,
        "spec.json: is damaged",
    ),
    (
        "spec without a teacher",
        lambda directory: (
            make.cache_spec(lambda c: c["fingerprint_fields"].pop("teacher"))(directory),
            make.remove("cache/manifest.json")(directory),
        ),
        INFO,
        "is damaged (no teacher)",
    ),
    (
        "spec of other shapes",
        make.cache_spec(lambda c: c["tensors"]["layer1"].update(shape=[8, 4, 4])),
        CACHED,
        "damaged files",
    ),
    (
        "spec of a later version",
        put("cache/spec.json", version=9),
        BUILD,
        "has version 9, but this version of kd_accel reads version 2",
    ),
    ("spec of version 1", put("cache/spec.json", version=1), BUILD, "belongs to a cache of version 1"),
    ("spec without version", put("cache/spec.json", version=None), INFO, "is damaged (version None)"),
    (
        "spec of version 1 under its old name",
        lambda directory: (directory / "cache/spec.json").rename(directory / "cache/plan.json"),
        BUILD,
        "plan.json: belongs to a cache of version 1",
    ),
    (
        "spec of an unknown target",
        make.cache_spec(lambda c: c["tensors"]["layer1"].update(target={"name": "wavelets"})),
        VERIFY,
        "wavelets in the cache, pca now (target of layer1)",
    ),
    (
        "spec of raw logits with a target",
        make.cache_spec(lambda c: c["tensors"]["logits"].update(target={"name": "identity"})),
        INFO,
        "spec.json: is damaged",
    ),
    (
        "manifest with a path outside the cache",
        change("cache/manifest.json", lambda c: c["files"].update({"../x": "0"})),
        BUILD,
        "lists '../x', a path outside the cache",
    ),
    ("manifest of another cache", put("cache/manifest.json", fingerprint="0" * 32), CACHED, "belongs to another cache"),
    ("manifest with a number as checksum", put("cache/manifest.json", files={"a": 1}), VERIFY, "is damaged"),
    ("missing shard", make.remove(SHARD), CACHED, "is missing"),
    ("shard that is a pipe", make.pipe(SHARD), CACHED, "is not a regular file"),
    ("truncated shard", cut(SHARD), CACHED, "bytes instead of"),
    ("samples with huge indices", make.far_samples, CACHED, "samples.safetensors: does not match spec.json"),
    ("samples that are not tensors", write("cache/samples.safetensors", b"x" * 99), CACHED, "samples.safetensors: is damaged"),
    (
        "empty targets",
        write("cache/targets.safetensors", (2).to_bytes(8, "little") + b"{}"),
        CACHED,
        "the tensors of layer1 do not match spec.json",
    ),
    (
        "lock that is a symbolic link",
        link("cache/.lock", "elsewhere"),
        BUILD,
        "cannot write to ...cache (Too many levels of symbolic links)",
    ),
]

SETS = [
    (
        "missing split",
        lambda directory: (directory / "data/train-00000-of-00001.parquet").unlink(),
        DATA,
        "has no split 'train'",
    ),
    ("file that is not Parquet", write("data/train-00000-of-00001.parquet", b"PAR1"), DATA, "cannot read parquet:"),
    ("missing column", None, [*DATA, "--data.label_column=fine"], "has no column 'fine'"),
    ("missing label", table(labels=[0, None, 2, 3, 0, 1, 2, 3]), DATA, "training samples have no label"),
    ("missing test label", table("test", labels=[0, -1, 2, 3, 0, 1, 2, 3]), DATA, "samples of the test split have no label"),
    ("text labels in one split", table(labels=list("abcdabcd")), DATA, "the labels of the train split are strings, those of"),
    ("several labels", table(labels=[[0, 1]] * 8), DATA, "the labels of the train split are lists (multi-label), but"),
    ("fractional labels", table(labels=[0.5] * 8), DATA, "the labels of the train split are floating-point numbers, but"),
    ("negative label", table(labels=[0, 1, -2, 3, 0, 1, 2, 3]), DATA, "the label of sample 2 of the train split is -2"),
    ("huge label", table(labels=[0, 1, 2**40, 3, 0, 1, 2, 3]), DATA, f"the label of sample 2 of the train split is {2**40}"),
    (
        "label that is not in the training split",
        table("test", labels=[0, 1, 9, 3, 0, 1, 2, 3]),
        DATA,
        "the label of sample 2 of the test split is 9",
    ),
    (
        "decompression bomb",
        table(images=[make.bomb()] * 8),
        DATA,
        "sample 0 of the train split cannot be decoded ...decompression bomb",
    ),
    ("smaller decompression bomb", table(images=[make.bomb(13_378)] * 8), DATA, "exceeds limit of 178956970 pixels"),
    ("EPS image, which is a program", table(images=[make.EPS] * 8), DATA, "not an image file of a supported format"),
    (
        "truncated image",
        table(images=[make.encoded(make.color(1))[:50]] * 8),
        DATA,
        "sample 0 of the train split cannot be decoded",
    ),
    ("image path of a system file", make.cells([{"path": "/etc/passwd"}] * 8), DATA, "its path is outside the dataset"),
    ("image path in a parent directory", make.cells([{"path": "../x"}] * 8), DATA, "its path is outside the dataset"),
    ("image without bytes and path", make.cells([{}] * 8), DATA, "sample 0 of the train split cannot be decoded"),
    (
        "images that are numbers",
        None,
        ["--data.image_column=label" if "image_column" in f else f for f in DATA],
        "does not contain images",
    ),
    ("splits with different classes", make.named(train=["a", "b"], test=["b", "a"]), DATA, "classes of the test split differ"),
    ("image folder without classes", make.folder("train/1.png", "test/1.png"), FOLDER, "has no class folders with images"),
    (
        "image folders with different classes",
        make.folder("train/cat/1.png", "test/dog/1.png"),
        FOLDER,
        "the classes differ from those of the training split",
    ),
    (
        "text file with the name of an image",
        make.folder("train/cat/1.png", "test/cat/1.png", texts=["train/cat/2.png"]),
        FOLDER,
        "sample 1 of the train split, ...supported format",
    ),
    ("image folder without test split", make.folder("train/cat/1.png"), FOLDER, "has no split 'test'"),
]
