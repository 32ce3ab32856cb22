"""Classes of teacher and data: compared by name, and selected by a class map in live outputs, caches and evaluations."""

import numpy as np
import pytest
import torch
from timm.utils.misc import natural_key

import kd_accel as kd
from kd_accel.errors import UserError
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.teacher.classes import class_notices, natural_order, resolve_class_map
from kd_accel.teacher.teacher import LiveTeacher, Teacher, raw_targets
from kd_accel.types import Batch
from tests.support.models import SmallNet

ABC = ("a", "b", "c")
STATISTICS = {"mean": [0.5] * 3, "std": [0.2] * 3}


def images(count=5):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network(num_classes=4):
    torch.manual_seed(3)
    return SmallNet(num_classes, width=8, norm=True).eval()


@pytest.mark.parametrize(
    ("class_map", "names", "expected"),
    [
        (None, "abc", None),
        ("auto", "abc", None),
        ("auto", "cab", (2, 0, 1)),
        ("auto", "ca", (2, 0)),
        ([1, 0, 2], "xyz", (1, 0, 2)),
        (["c", 0], "xy", (2, 0)),
        ({"x": "b"}, "xca", (1, 2, 0)),
        ({"x": 1, "y": "a"}, "xy", (1, 0)),
        ({}, "cab", (2, 0, 1)),
    ],
)
def test_a_class_map_selects_the_logits_of_a_teacher_with_names(class_map, names, expected):
    assert resolve_class_map(class_map, ABC, list(names)) == expected


def test_a_list_of_indices_selects_the_logits_of_a_teacher_without_names():
    assert resolve_class_map([5, 0], None, ["x", "y"]) == (5, 0)
    assert resolve_class_map({"y": 0, "x": 7}, None, ["x", "y"]) == (7, 0)
    assert resolve_class_map(None, None, ["x", "y"]) is None


@pytest.mark.parametrize(
    ("class_map", "names", "message"),
    [
        (
            None,
            "acb",
            "null, but class 1 is 'b' for the teacher and 'c' in the data, the same classes in another order; set it to auto",
        ),
        (None, "ab", "null, but the teacher has 3 classes, and the data 2, without 'c'; set it to auto"),
        (
            None,
            "abd",
            "the teacher lacks 1 by name ('d'; it has 'a', 'b', 'c'); use a teacher that was trained on these classes",
        ),
        (None, "abcd", "the teacher has 3 classes, and the data 4, of which the teacher lacks 1 by name ('d'"),
        ("auto", "abd", "the teacher has no class 'd' (it has 'a', 'b', 'c'); set it to {DATA CLASS: TEACHER CLASS}"),
        ([0, 1], "abc", "lists 2 classes, but the data has 3"),
        ([0, 1, 3], "abc", "index 3 is not one of the teacher's 3 classes; use an index from 0 to 2"),
        ([0, 1, -1], "abc", "index -1 is not one of the teacher's 3 classes"),
        ([0, 1, 1], "abc", "the teacher's class 1 ('b') stands for several classes of the data"),
        ({"c": "b"}, "abc", "the teacher's class 1 ('b') stands for several classes of the data"),
        ({"d": 0}, "abc", "the data has no class 'd'"),
        ({"a": "bb"}, "abc", "the teacher has no class 'bb'"),
    ],
)
def test_classes_that_do_not_match_are_refused(class_map, names, message):
    with pytest.raises(UserError) as caught:
        resolve_class_map(class_map, ABC, list(names))
    assert str(caught.value).startswith("class_map: ") and message in str(caught.value)


def test_names_are_refused_for_a_teacher_without_names_or_with_a_name_twice():
    with pytest.raises(UserError, match="'x' is a class name, but the teacher has no class names; give the index"):
        resolve_class_map("auto", None, ["x", "y"])
    with pytest.raises(UserError, match=r"several classes named 'crane'; give the index of the class that is meant, as in "):
        resolve_class_map("auto", ["crane", "crane", "x"], ["crane", "x"])
    assert resolve_class_map({"crane": 1}, ["crane", "crane", "x"], ["crane", "x"]) == (1, 2)


def test_classes_that_look_alike_are_escaped():
    with pytest.raises(UserError, match=r"lacks 1 by name \('\\u0430'"):
        resolve_class_map(None, ABC, ["\N{CYRILLIC SMALL LETTER A}", "b", "c"])


@pytest.mark.parametrize("names", [[str(n) for n in range(12)], ["img12", "img9", "Zebra", "ape"], ["1.10", "1.9", "a", "1"]])
def test_natural_order_is_that_of_timm(names):
    assert natural_order(names) == sorted(names, key=natural_key)


def test_the_other_order_of_timm_is_named_where_both_sides_have_names():
    folders = sorted(str(number) for number in range(11))
    with pytest.raises(
        UserError, match=r"class 2 is '2' for the teacher \(numbers by value, as timm sorts folders\) and '10' in"
    ):
        resolve_class_map(None, natural_order(folders), folders)
    assert resolve_class_map("auto", natural_order(folders), folders) == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)


def test_the_other_order_of_timm_is_noticed_for_a_teacher_without_names():
    folders = sorted(str(number) for number in range(11))
    (notice,) = class_notices(None, None, folders, has_map=False)
    assert "class 2 of the data is '10'" in notice and "but '2' for a teacher that timm has trained" in notice
    assert notice.endswith("set teacher.class_map to [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9] for such a teacher")
    for names, teacher_names, has_map in ((["a", "b"], None, False), (folders, folders, False), (folders, None, True)):
        assert class_notices(None, teacher_names, names, has_map=has_map) == []
    assert class_notices(None, None, natural_order(folders), has_map=False) == []


def test_selected_logits_are_listed():
    names = [f"class {number}" for number in range(7)]
    (notice,) = class_notices(range(7, 0, -1), range(1000), names, has_map=True)
    assert notice.startswith(
        "teacher.class_map: 7 of 1000 logits of the teacher are used, by class of the data: 'class 0' = 7, "
    )
    assert notice.endswith("'class 4' = 3, ...")


def test_live_outputs_are_the_selected_logits_and_the_features_are_unchanged():
    plain = Teacher(network(), **STATISTICS)
    mapped = Teacher(network(), **STATISTICS, class_map=[3, 0])
    expected = plain(images()).logits[:, [3, 0]]
    assert torch.equal(mapped(images()).logits, expected)
    batch = Batch(images(), torch.zeros(5, dtype=torch.int64), torch.arange(5), 0)
    live = LiveTeacher(
        *mapped.on_device(torch.device("cpu"), layers=["layer1"], image_size=32), targets=raw_targets(["layer1"])
    )
    torch.testing.assert_close(live(batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(live(batch).features["layer1"], plain(images(), layers=["layer1"]).features["layer1"])
    live.close()
    assert mapped.network.state_dict().keys() == network().state_dict().keys()


@pytest.mark.slow
def test_a_compiled_teacher_selects_the_same_logits():
    mapped = Teacher(network(), **STATISTICS, class_map=[3, 0])
    copy, normalize = mapped.on_device(torch.device("cpu"), image_size=32)
    live = LiveTeacher(copy, normalize)
    compile_with_hooks(copy)
    batch = Batch(images(), torch.zeros(5, dtype=torch.int64), torch.arange(5), 0)
    torch.testing.assert_close(live(batch).logits, mapped(images()).logits, atol=1e-4, rtol=1e-4)


def test_the_selected_logits_are_part_of_the_fingerprint():
    fields = [
        Teacher(network(), **STATISTICS, class_names=tuple("abcd"), class_map=class_map).for_classes(names).fingerprint_fields()
        for class_map, names in ((None, "abcd"), ("auto", "abcd"), ("auto", "dcba"), ([3, 2, 1, 0], "dcba"), ("auto", "dc"))
    ]
    assert "class_map" not in fields[0] and fields[0] == fields[1]
    assert fields[2] == fields[3] == {**fields[0], "class_map": [3, 2, 1, 0]}
    assert fields[4]["class_map"] == [3, 2]


def test_a_class_map_of_the_python_api_is_checked():
    with pytest.raises(ValueError, match=r"class_map: 'autto' must be 'auto', a list, a mapping or None"):
        Teacher(network(), **STATISTICS, class_map="autto")
    with pytest.raises(ValueError, match=r"class_map: \[\] must name at least one class"):
        Teacher(network(), **STATISTICS, class_map=[])
    assert Teacher(network(), **STATISTICS, class_map=np.array([3, 0])).fingerprint_fields()["class_map"] == [3, 0]
    with pytest.raises(ValueError, match="class_map: index -1 is not one of the teacher's classes; use an index from 0 upward"):
        Teacher(network(), **STATISTICS, class_map=[0, -1])
    with pytest.raises(ValueError, match=r"class_map: index 4 is not found in the network's logits, which are \[5, 4\]"):
        Teacher(network(), **STATISTICS, class_map=[0, 4])(images())
    by_name = Teacher(network(), **STATISTICS, class_names=tuple("abcd"), class_map="auto")
    with pytest.raises(
        ValueError, match=r"auto depends on the classes of the data; use teacher.for_classes\(data.class_names\)"
    ):
        by_name(images())
    assert torch.equal(by_name.for_classes("da")(images()).logits, Teacher(network(), **STATISTICS)(images()).logits[:, [3, 0]])
    with pytest.raises(ValueError, match="teacher.class_map: the teacher has no class 'e'"):
        by_name.for_classes("de")


def test_a_cache_of_the_python_api_holds_the_selected_logits(tmp_path):
    pixels = images(12).permute(0, 2, 3, 1).numpy()
    pairs = [(image, number % 2) for number, image in enumerate(pixels)]
    test = [(255 - image, label) for image, label in pairs]
    data = kd.ImageDataset(pairs, class_names=["d", "b"], image_size=32, val_fraction=0.0, test=test)
    views = kd.ViewDataset(data, kd.transforms.Identity(32), num_views=1)
    teacher = Teacher(network(), **STATISTICS, class_names=tuple("abcd"), class_map="auto")
    cache = kd.TeacherCache.build(tmp_path / "cache", teacher, views, dtype="float32", batch_size=4)
    logits = cache.read(np.arange(12), 0).logits
    assert logits.shape == (12, 2)
    torch.testing.assert_close(logits, teacher.for_classes("db")(images(12)).logits, atol=1e-4, rtol=1e-4)
    kd.TeacherCache.open(tmp_path / "cache", teacher)
    other = Teacher(network(), **STATISTICS, class_map=[1, 3])
    with pytest.raises(UserError, match=r"teacher.class_map: class 0 is 3 in the cache, 1 now \(index of the teacher's logit"):
        kd.TeacherCache.open(tmp_path / "cache", other)
    with pytest.raises(ValueError, match=r"teacher.class_map: null, but the teacher has 4 classes, and the data 2"):
        kd.TeacherCache.build(tmp_path / "new", Teacher(network(), **STATISTICS, class_names=tuple("abcd")), views)
