"""Fixture of the config tests: a file with given settings."""

import pytest
import yaml


@pytest.fixture
def config_file(tmp_path):
    def write(settings, name="run.yaml"):
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return str(path)

    return write
