"""Hiding of installed packages from an interpreter that has this directory on its PYTHONPATH.

The finder of the import system is replaced, so that imports, `find_spec` and metadata of a hidden package fail exactly as those
of an absent package. KD_TEST_HIDDEN lists the packages, separated by commas. Each attempt to import one of them is written to
the file KD_TEST_HIDDEN_RECORD, as a line (package, importing module).
"""

import os
import re
import sys
from importlib.machinery import PathFinder

_HIDDEN = frozenset(os.environ.get("KD_TEST_HIDDEN", "").split(","))
_DISTRIBUTIONS = {{"sklearn": "scikit-learn"}.get(name, name) for name in _HIDDEN}


class _HidingFinder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        package = fullname.partition(".")[0]
        if package not in _HIDDEN:
            return super().find_spec(fullname, path, target)
        _record(package)
        return None

    @classmethod
    def find_distributions(cls, *arguments, **keywords):
        for distribution in super().find_distributions(*arguments, **keywords):
            name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
            if name not in _DISTRIBUTIONS:
                yield distribution


def _record(package):
    frame = sys._getframe(2)
    while (importer := frame.f_globals.get("__name__", "")).partition(".")[0] in ("importlib", "_frozen_importlib"):
        if importer == "importlib.util":
            return  # importlib.util.find_spec tests whether a package is installed, and does not import it
        frame = frame.f_back
    with open(os.environ["KD_TEST_HIDDEN_RECORD"], "a") as file:
        file.write(f"{package} {importer}\n")


sys.meta_path[sys.meta_path.index(PathFinder)] = _HidingFinder
