"""Mistakes in the settings of several teachers: each is named by field, with value, rule and remedy."""

import pytest

from kd_accel.config.ensemble_rules import of_teacher
from kd_accel.config.fields import as_one_teacher
from kd_accel.config.schema import RunConfig
from kd_accel.config.validation import problems

TWO = {"a": {"run": "one"}, "b": {"run": "two"}}
FEATURE = {"loss": "mse", "layers": ["layer1"]}


def found(**settings):
    return problems(RunConfig.model_validate(settings))


def with_b(**settings):
    return {"a": {"run": "one"}, "b": {"run": "two", **settings}}


def cached(name, directory):
    return {"run": name, "outputs": "cached", "cache": {"dir": directory}}


def test_two_teachers_have_no_problem():
    assert found(teachers=TWO) == []
    assert found(teachers=TWO, distill={"features": {"x": {**FEATURE, "teacher": "b"}}}) == []
    assert found(teachers=with_b(weight={"start": 0.0, "kind": "linear", "end": 1.0})) == []
    assert found(teachers={"a": cached("one", "x"), "b": cached("two", "y")}, data={"views": 2}) == []
    assert found(teachers=None) == []
    falling, rising = ({"kind": "linear", "start": start, "end": 1 - start} for start in (1.0, 0.0))
    assert found(teachers={"a": {"run": "one", "weight": falling}, "b": {"run": "two", "weight": rising}}) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"teachers": TWO, "teacher": {"run": "x"}}, "teacher: set either teacher, or teachers"),
        ({"teachers": {"a": {"run": "one"}}}, "teachers: a is the only one; write its settings under teacher, or add another"),
        ({"teachers": {"a": {"run": "one"}, "b/c": {"run": "two"}}}, "teachers: the name 'b/c' must have letters"),
        ({"teachers": with_b(weight=-1.0)}, "teachers.b.weight: -1.0 must be at least 0"),
        ({"teachers": with_b(weight=0.0)}, "teachers.b.weight: 0, so that the teacher has no effect; remove it with"),
        (
            {"teachers": {name: {"run": name, "weight": {"start": 0.0, "kind": "linear", "end": 1.0}} for name in "ab"}},
            "teachers: the weight of one of them must be above 0 at every step",
        ),
        ({"teachers": with_b(arch="timm/x")}, "teachers.b: set either teachers.b.run (a run directory) or teachers.b.arch"),
        ({"teachers": with_b(mean=[0.5] * 3)}, "teachers.b.mean: has no effect (teachers.b.run determines it); leave it out"),
        (
            {"teachers": with_b(outputs="cached"), "data": {"views": 2}},
            "teachers.b.cache.dir: missing; with teachers.b.outputs cached set the",
        ),
        (
            {"teachers": with_b(outputs="mixed", cache={"dir": "x"}), "data": {"views": 2}},
            "teachers.b.outputs: mixed differs from cached only in",
        ),
        (
            {"teachers": {"a": cached("one", "x"), "b": cached("two", "x")}, "data": {"views": 2}},
            "teachers.b.cache.dir: x is that of teachers.a too, but a cache holds the outputs of one teacher",
        ),
        (
            {"teachers": TWO, "distill": {"features": {"x": FEATURE}}},
            "distill.features.x.teacher: missing; name the teacher whose layers are compared (a, b)",
        ),
        (
            {"teachers": TWO, "distill": {"features": {"x": {**FEATURE, "teacher": "c"}}}},
            "distill.features.x.teacher: 'c' is not the name of a teacher (a, b)",
        ),
        (
            {"teacher": {"run": "x"}, "distill": {"features": {"x": {**FEATURE, "teacher": "a"}}}},
            "distill.features.x.teacher: has no effect (without teachers); leave it out",
        ),
        (
            {"teacher": {"run": "x"}, "distill": {"ensemble": {"mean": "logits"}}},
            "distill.ensemble.mean: has no effect (without teachers); leave it out",
        ),
        (
            {"teachers": TWO, "distill": {"logits": {"loss": "kl", "args": {"divergence": "mse"}}}},
            "distill.ensemble.mean: probabilities have no logits, which divergence mse compares; set it to logits",
        ),
        (
            {
                "teachers": TWO,
                "data": {"source": "parquet:x", "label_column": None},
                "distill": {"ensemble": {"confidence": True}, "label_weight": 0.0},
            },
            "distill.ensemble.confidence: has no effect with data.label_column null, because it needs labels; leave it out",
        ),
        ({"teachers": TWO, "role": "teacher"}, "role: teacher has no effect if a teacher is set"),
    ],
)
def test_a_mistake_is_named(settings, expected):
    (problem,) = found(**settings)
    assert problem.startswith(expected)


def test_without_a_logit_loss_weights_and_teachers_without_features_have_no_effect():
    distill = {"logits": None, "label_weight": 1.0, "features": {"x": {**FEATURE, "teacher": "a"}}}
    assert found(teachers=with_b(weight=2.0), distill={**distill, "ensemble": {"confidence": True}}) == [
        "teachers.b.weight: has no effect (with distill.logits null); leave it out",
        "teachers.b: has no effect, because distill.logits is null and no feature loss compares its layers; remove it with "
        "teachers.b: null",
        "distill.ensemble.confidence: has no effect (with distill.logits null); leave it out",
    ]


def test_only_the_first_teacher_decides_the_classes_of_data_without_labels():
    data, distill = {"source": "parquet:x", "label_column": None}, {"label_weight": 0.0}
    teachers = {name: {"run": name, "class_map": ["x", "y"]} for name in "ab"}
    assert found(teachers=teachers, data=data, distill=distill) == [
        "teachers.a.class_map: has no effect (with data.label_column null the classes are the teacher's); leave it out"
    ]


def test_layers_auto_need_the_network_of_the_teacher_that_is_named():
    stored = {"outputs": "cached", "cache": {"dir": "x"}}
    distill = {"features": {name: {**FEATURE, "layers": "auto", "teacher": name} for name in "ab"}}
    (problem,) = found(teachers={"a": {"run": "one"}, "b": stored}, distill=distill, data={"views": 2})
    assert problem.startswith("distill.features.b.layers: auto needs the teacher's network")


def test_messages_name_the_teacher():
    text = "teacher.run: no run in x; set teacher.arch, data.views or teacher to null (my-teacher.run, own.teacher.run)"
    assert of_teacher(text, "a") == text.replace("teacher.run: no", "teachers.a.run: no").replace(
        "set teacher.arch", "set teachers.a.arch"
    )
    assert of_teacher(text, "") == text
    flags = "name it (--teacher.run DIR), or evaluate without (--teacher null); caches/teacher: holds runs/teacher.old"
    assert of_teacher(flags, "a") == flags.replace("--teacher.run", "--teachers.a.run").replace(
        "--teacher null", "--teachers null"
    )


def test_names_of_settings_are_those_of_a_single_teacher():
    names = ["teachers.a.run", "teachers.b.cache.dir", "teachers", "teacher.run", "data.source"]
    assert [as_one_teacher(name) for name in names] == ["teacher.run", "teacher.cache.dir", *names[2:]]
