"""Tests of class indices from labels: each kind of column, both rules for integers, and labels that are refused."""

import time
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from kd_accel.data.labels import UNLABELED, LabelEncoding, LabelSource
from kd_accel.errors import UserError

TRAIN, TEST = LabelSource("data.label_column", "train"), LabelSource("data.label_column", "test")


def fit(values, **options):
    return LabelEncoding.fit(values, source=TRAIN, **options)


def encoded(values, **options):
    """Return class names and class indices of the training split."""
    encoding = fit(values, **options)
    return encoding.label_names, encoding.encode(values, source=TRAIN).tolist()


def columns(values):
    """Return the same labels as a list, a NumPy array, and Arrow columns of one chunk, several chunks, and a dictionary."""
    parts = [pa.array(values[:1]), pa.array(values[1:][::-1])]
    return [
        (values, values),
        (values, np.array(values)),
        (values, np.array(values, dtype=object)),
        (values, pa.array(values)),
        (values, pa.array(values).dictionary_encode()),
        (values[:1] + values[1:][::-1], pa.chunked_array(parts)),
        (values[:1] + values[1:][::-1], pa.chunked_array(parts).dictionary_encode()),
    ]


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize(
    ("values", "rule", "names"),
    [
        ([3, 1, 1, 4], "keep", ("0", "1", "2", "3", "4")),
        ([900, 0, 100, 0], "remap", ("0", "100", "900")),
        (["ox", "ant", "ox", "bee"], "keep", ("ant", "bee", "ox")),
        ([True, False, True, True], "keep", ("False", "True")),
    ],
    ids=["keep", "remap", "strings", "booleans"],
)
def test_labels_of_every_column_become_class_indices(values, rule, names, position):
    expected, column = columns(values)[position]
    found = encoded(column, rule=rule)
    assert found == (names, [names.index(str(label)) for label in expected])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64"])
def test_integers_of_every_width_are_labels(dtype):
    for column in (
        np.array([1, 0, 2], dtype=dtype),
        pa.array([1, 0, 2], type=getattr(pa, dtype)()),
        list(np.arange(3, dtype=dtype)),
    ):
        assert encoded(column)[0] == ("0", "1", "2")


def test_remapped_identifiers_may_be_large():
    assert encoded([2**40, 7, 2**40], rule="remap") == (("7", str(2**40)), [1, 0, 1])


@pytest.mark.parametrize("values", [[0, 1, 1], np.array([0, 1, 1]), [False, True, True], ["ox", "ant", "ant"]], ids=str)
def test_names_of_the_source_give_the_order_of_the_classes(values):
    assert encoded(values, names=["ox", "ant", "bee"]) == (("ox", "ant", "bee"), [0, 1, 1])


@pytest.mark.parametrize(
    "values",
    [
        [None, 1, -1, 0],
        np.array([-1, 1, -1, 0]),
        pa.array([None, 1, -1, 0]),
        ["b", "c", None, "b"],
        pa.array(["b", "c", None, "b"]),
        pa.array(["b", "c", None, "b"]).dictionary_encode(),
        [True, None, None, False],
        pa.array([True, None, None, False]),
    ],
    ids=str,
)
def test_null_and_minus_one_are_samples_without_a_label(values):
    names, labels = encoded(values)
    plain = values.to_pylist() if isinstance(values, pa.Array) else list(values)
    assert len(names) == 2
    assert [label == UNLABELED for label in labels] == [value is None or value is not True and value == -1 for value in plain]


def test_another_split_is_encoded_by_the_classes_of_the_training_split():
    encoding = fit(["ox", "ant", "bee"])
    assert encoding.encode(pa.array(["bee", None, "ant"]), source=TEST).tolist() == [1, UNLABELED, 0]
    assert encoding.encode(pa.nulls(2), source=TEST).tolist() == [UNLABELED, UNLABELED]
    assert fit([5, 9], rule="remap").encode([9, 5, -1], source=TEST).tolist() == [1, 0, UNLABELED]


@pytest.mark.parametrize(
    ("train", "options", "test", "message"),
    [
        (
            ["ant", "bee"],
            {},
            ["ant", "cow"],
            "data.label_column: the label of sample 1 of the test split is 'cow', which no sample of the train split has; fix",
        ),
        # "caf\xe9" as one letter, and as an e with a combining accent.
        (
            ["caf\xe9", "tea"],
            {},
            ["cafe\u0301"],
            r"0 of the test split is 'cafe\u0301', which no sample of the train split has ('caf\xe9' looks alike but differs)",
        ),
        ([5, 9], {"rule": "remap"}, [9, 9, 7], "sample 2 of the test split is 7, which no sample of the train split has"),
        ([0, 2], {}, [0, 3], "sample 1 of the test split is 3, but labels must be integers, at least 0 and below 3"),
        ([0, 2], {}, [-2], "sample 0 of the test split is -2, but labels must be integers, at least 0"),
        ([0, 1], {"names": "ab"}, [2], "sample 0 of the test split is 2, but labels must be integers, at least 0 and below 2"),
        (["a"], {"names": "ab"}, ["b", "c"], "sample 1 of the test split is 'c', which is not one of the class names"),
        ([True, True], {}, [True, False], "sample 1 of the test split is False, which no sample of the train split has"),
        (
            [0, 1],
            {},
            ["cat"],
            "the labels of the train split are integers, those of the test split are strings ('cat'); both must be of the same",
        ),
    ],
)
def test_a_label_that_the_training_split_lacks_is_refused_by_name(train, options, test, message):
    encoding = fit(train, **options)
    with pytest.raises(UserError) as raised:
        encoding.encode(test, source=TEST)
    assert message in str(raised.value)
    assert str(raised.value).isascii() and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 1], [1]], "are lists (multi-label) (sample 0: [0, 1]), but each sample must have one label"),
        (pa.array([[0, 1], [1]]), "are lists (multi-label), but each sample must have one label"),
        (np.zeros((2, 3), dtype=np.int64), "are lists (multi-label), but"),
        ([0, (1, 2)], "are lists (multi-label) (sample 1: (1, 2)), but"),
        ([1.0, 2.0], "are floating-point numbers (sample 0: 1.0), but"),
        (np.array([1.5]), "are floating-point numbers (sample 0: 1.5), but"),
        (pa.array([1.0, None]), "are floating-point numbers, but each sample must have one label, an integer, a string or a"),
        (pa.array([Decimal("1.5")]), "are floating-point numbers"),
        ([{"id": 3}], "are dicts (sample 0: {'id': 3}), but"),
        (pa.array([{"id": 3}]), "are dicts, but"),
        (pa.array([b"cat"]), "are of type binary, but"),
        ([b"cat"], "are of type bytes (sample 0: b'cat'), but"),
        (np.array([1j]), "are of type complex128, but"),
        ([object], "are of type type (sample 0: <class 'object'>), but"),
        (["cat", None, 3, "dog"], "are of several types (sample 0: 'cat', sample 2: 3), but"),
        ([0, True], "are of several types (sample 0: 0, sample 1: True), but"),
        ([None, None], "no sample of the train split has a label"),
        ([-1, -1], "no sample of the train split has a label"),
        (pa.nulls(3), "no sample of the train split has a label"),
        ([0, -2], "sample 1 of the train split is -2, but labels must be integers, at least 0"),
        (
            [0, 2_000_000],
            "sample 1 of the train split is 2000000, but labels must be integers, at least 0 and below 1000000; fix the label "
            "or remove the sample, or set data.labels to remap if it is an identifier",
        ),
        (["ant", ""], "sample 1 of the train split is an empty string, but labels must be strings, not empty; use null"),
    ],
)
def test_columns_without_one_class_per_sample_are_refused(values, message):
    with pytest.raises(UserError) as raised:
        fit(values)
    assert str(raised.value).startswith("data.label_column: ") and message in str(raised.value)


@pytest.mark.parametrize(
    ("values", "names", "because"),
    [
        (["ant", "bee"], None, "the labels are strings"),
        ([True, False], None, "the labels are booleans"),
        ([0, 1], ["ant", "bee"], "the source defines the class names"),
    ],
)
def test_remap_without_effect_is_refused(values, names, because):
    with pytest.raises(UserError, match=f"^data.labels: remap has no effect, because {because}; leave it out$"):
        fit(values, names=names, rule="remap")


def notices(values, **options):
    encoding = fit(values, **options)
    assert encoding.notices(encoding.encode(values, source=TEST), source=TEST) == ()
    return list(encoding.notices(encoding.encode(values, source=TRAIN), source=TRAIN))


def test_classes_without_training_samples_are_named():
    remedy = "; set data.labels to remap if only the labels that occur are classes"
    assert notices([1, 2, 4]) == [f"data.labels: 2 of 5 classes have no training sample: '0', '3'{remedy}"]
    assert notices(range(0, 1000, 100)) == [
        f"data.labels: 891 of 901 classes have no training sample: '1', '2', '3', '4', '5' and 886 more{remedy}"
    ]
    assert notices([0, 2], names=["a", "b", "c"]) == ["data.label_column: 1 of 3 classes have no training sample: 'b'"]
    assert notices([1, 2, 4], rule="remap") == notices(["a", "b"]) == []


def test_class_names_that_look_alike_are_named():
    rule = "look alike but differ; fix the labels if they are one class"
    assert notices(["caf\xe9", "cafe\u0301", "tea", "tea "]) == [
        rf"data.label_column: the class names 'cafe\u0301', 'caf\xe9' {rule}",
        f"data.label_column: the class names 'tea', 'tea ' {rule}",
    ]


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["list of strings", "strings", "integers"])
def test_the_labels_of_imagenet_are_encoded_within_two_seconds(kind):
    numbers = np.random.default_rng(0).integers(0, 1000, 1_281_167)
    names = [f"n{number:08d}" for number in range(1000)]
    column = {
        "list of strings": lambda: [names[number] for number in numbers],
        "strings": lambda: pa.DictionaryArray.from_arrays(pa.array(numbers), names).dictionary_decode(),
        "integers": lambda: pa.array(numbers),
    }[kind]()
    start = time.perf_counter()
    encoding = fit(column)
    labels = encoding.encode(column, source=TRAIN)
    assert time.perf_counter() - start < 2
    assert np.array_equal(labels, numbers)
