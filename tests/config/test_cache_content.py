"""Configs for which a cache is built, so that several trainings can read theirs."""

from kd_accel.config.cache_content import configs_to_build
from kd_accel.config.parsing import build_config
from kd_accel.config.schema import RunConfig

CACHED = {"data": {"views": 2}, "teacher": {"run": "runs/teacher", "outputs": "cached", "cache": {"dir": "cache"}}}


def config(**overrides):
    return build_config(RunConfig, CACHED, {name.replace("__", "."): value for name, value in overrides.items()}, losses={})


def test_settings_of_the_training_need_no_other_cache():
    trainings = [
        config(),
        config(seed=1, name="b"),
        config(distill__temperature=2.0, distill__alpha=0.9),
        config(optim__lr=0.01, train__epochs=2),
    ]
    assert configs_to_build(trainings) == trainings[:1]
    weights = [config(distill__features={"mse": {"weight": weight}}) for weight in (0.1, 0.2)]
    assert configs_to_build(weights) == weights[:1]


def test_the_config_with_more_layers_comes_first_and_serves_the_others():
    plain, features = config(), config(distill__features={"mse": {}, "at": {}})
    assert configs_to_build([plain, features, config(distill__features={"at": {"weight": 0.5}})]) == [features]
    other = config(distill__features={"mse": {"layers": ["layer4"]}})
    assert configs_to_build([plain, other, features]) == [features, other]


def test_what_changes_the_outputs_needs_a_build():
    for change in (
        {"data__view_seed": 1},
        {"teacher__image_size": 64},
        {"train__precision": "bf16"},
        {"model__arch": "timm/x"},
    ):
        assert len(configs_to_build([config(), config(**change)])) == 2


def test_nothing_is_built_without_a_teacher_that_can_run():
    alone = config(teacher__run=None)
    live = config(teacher__outputs="live")
    assert configs_to_build([alone, live, config(teacher=None)]) == []
