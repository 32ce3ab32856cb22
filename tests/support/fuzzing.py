"""Random mutations of valid inputs, and a fuzzing loop with limits of time and memory."""

import copy
import math
import random
import resource
import signal
import time
import typing
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kd_accel.config.fields import section_of

TIMEOUT_S = 20
MEMORY_BYTES = 2 * 2**30
BATCH = 50
MIN_EXAMPLES = 2 * BATCH
LONG = pytest.param(15.0, marks=pytest.mark.faults)
timed = pytest.mark.parametrize("seconds", [1.5, LONG])

ODD = [0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 1e999, -1e999, math.nan, 1e-320, 0.5, True, None]
ODD += ["", ".", "..", "/", "\0"]
ODD += [
    "\ud800",
    "null",
    "no",
    "1e3",
    "[",
    "{a: b}",
    "../x",
    "import:os:system",
    "digits",
    "x" * 3000,
    "9" * 5000,
    [],
    {},
    [[]],
]
ODD += [{"a": {"b": [1]}}, [1, [2, [3]]], {"": 1}, {"class_path": "os.system"}]
TOKENS = [
    b"&a ",
    b"*a",
    b"!!python/name:os.system ",
    b"!!bool ",
    b"!!binary ",
    b"<<: ",
    b"? ",
    b"[" * 40,
    b"{",
    b"}",
    b"\t",
    b"\0",
]
TOKENS += [b"\xff", b"- ", b": ", b"\n", b"%", b"|", b"'", b'"', b"1e999", b"9" * 30, b"---\n", b"\\ud800", b"\xf0\x9f\x98\x80"]

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(ODD))
junk = st.one_of(scalars, st.lists(scalars, max_size=4), st.dictionaries(st.text(max_size=6), scalars, max_size=3))


def paths(node, path=()):
    """Yield the paths to all values of a nested structure, including the empty path to the structure."""
    yield path
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, part in parts:
        yield from paths(part, (*path, key))


@st.composite
def mutated(draw, content):
    """Draw a copy of a structure in which one to three values are replaced, removed, renamed or copied to another path."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths(content))))
        if not path:
            return copy.deepcopy(draw(junk)) if draw(st.integers(0, 9)) == 0 else content
        *above, last = path
        parent = content
        for key in above:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "copy"]))
        if action == "remove":
            del parent[last]
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(st.one_of(st.text(max_size=6), st.sampled_from(["..", "../x", "\ud800"])))] = parent.pop(last)
        elif action == "copy":
            other = content
            for key in draw(st.sampled_from(list(paths(content)))):
                other = other[key]
            parent[last] = copy.deepcopy(other)
        else:
            # The values of ODD are shared by all examples, and a later mutation would change them.
            parent[last] = copy.deepcopy(draw(junk))
    return content


@st.composite
def mutated_bytes(draw, data):
    """Draw a copy of bytes with one to four mutations: a flipped bit, an insertion, a deletion or a repetition."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["flip", "token", "cut", "end", "repeat"]))
        if action == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "token":
            data[at:at] = draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=9)))
        elif action == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif action == "end":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 60))] * draw(st.integers(1, 9))
    return bytes(data)


@st.composite
def settings_of(draw, config_class, *, is_tame=None):
    """Draw settings of some fields of a config.

    Every second example is tame: few fields, with values of their type, so that the config may be valid.
    """
    is_tame = draw(st.booleans()) if is_tame is None else is_tame
    chosen = {}
    for name, field in config_class.model_fields.items():
        annotation = field.annotation
        if draw(st.integers(0, 9 if is_tame else 4)):
            continue
        section = section_of(annotation)
        if section and (is_tame or draw(st.integers(0, 5))):
            chosen[name] = draw(settings_of(section, is_tame=is_tame))
        else:
            chosen[name] = draw(values_of(annotation) if is_tame else st.one_of(values_of(annotation), junk))
    if not is_tame and draw(st.integers(0, 9)) == 0:
        chosen[draw(st.text(max_size=9))] = draw(junk)
    return chosen


def values_of(annotation):
    """Return a strategy for values of a type annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=4)
    if origin is dict:
        # "mse" is the name of a feature loss, so that its fields are drawn too.
        return st.dictionaries(st.one_of(st.just("mse"), st.text(max_size=6)), values_of(arguments[1]), max_size=3)
    if arguments:
        return st.one_of(*map(values_of, arguments))
    if section_of(annotation) is annotation:
        return settings_of(annotation)
    of_type = {int: st.integers(-3, 300), float: st.floats(-1, 2), bool: st.booleans(), str: st.text(max_size=9)}
    return of_type.get(annotation, st.none())


@contextmanager
def memory_limit():
    """Limit the process to MEMORY_BYTES of address space beyond its current size."""
    with open("/proc/self/statm") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fail_on_timeout(number, frame):
    raise AssertionError(f"took more than {TIMEOUT_S} seconds")


def fuzz(strategy, check, *, seconds, first_seed=0):
    """Run `check` on drawn examples for `seconds`, and on a slow machine longer, until MIN_EXAMPLES are checked.

    Returns:
        Number of examples whose check has finished.
    """
    count, ends_at = 0, time.monotonic() + seconds

    def check_with_timeout(example):
        nonlocal count
        # Ends the shrinking of a failing example, which has no time limit of its own.
        if time.monotonic() > ends_at + TIMEOUT_S:
            return
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
        try:
            check(example)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        count += 1

    options = settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    old = signal.signal(signal.SIGALRM, fail_on_timeout)
    try:
        with memory_limit():
            while (now := time.monotonic()) < ends_at or (count < MIN_EXAMPLES and now < ends_at + TIMEOUT_S):
                seed(first_seed + count)(options(given(strategy)(lambda example: check_with_timeout(example))))()
    finally:
        signal.signal(signal.SIGALRM, old)
    return count


def run(strategy, check, seconds):
    """Fuzz for `seconds`: the short variant has the same examples each time, the long variant draws a new seed."""
    first_seed = random.SystemRandom().randrange(2**31) if seconds > 2 else 0
    count = fuzz(strategy, check, seconds=seconds, first_seed=first_seed)
    print(f"{count} examples from seed {first_seed}")
    assert count >= 20
