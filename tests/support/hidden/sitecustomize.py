"""Packages hidden from an interpreter that has this directory on its PYTHONPATH: import, `find_spec` and metadata find none.

KD_TEST_HIDDEN names them; each attempt to import one is a line (package, importing module) of the file KD_TEST_HIDDEN_RECORD.
The finder of the import system is replaced, so a hidden package fails exactly as an absent one does.
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
        found = super().find_distributions(*arguments, **keywords)
        return (one for one in found if re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower() not in _DISTRIBUTIONS)


def _record(package):
    frame = sys._getframe(2)
    while (importer := frame.f_globals.get("__name__", "")).partition(".")[0] in ("importlib", "_frozen_importlib"):
        if importer == "importlib.util":
            return  # a question whether the package is there, not an import of it
        frame = frame.f_back
    with open(os.environ["KD_TEST_HIDDEN_RECORD"], "a") as file:
        file.write(f"{package} {importer}\n")


sys.meta_path[sys.meta_path.index(PathFinder)] = _HidingFinder
