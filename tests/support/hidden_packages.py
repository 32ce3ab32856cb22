"""Environment of child processes without optional packages and git, as on many GPU machines."""

import os
import shutil
from pathlib import Path

from tests.support.launching import ROOT, environment

HIDDEN = ("wandb", "datasets", "matplotlib", "sklearn", "timm")


def hidden_environment(directory, **changes):
    """Return the environment variables of a child process without the hidden packages.

    The process must be started with `subprocess`: a process forked from the warm interpreter has already imported the packages.

    Args:
        directory: Directory for the child's PATH and the record of its imports, created by the first call.
        **changes: Further environment variables.
    """
    programs = directory / "bin"
    if not programs.exists():
        programs.mkdir(parents=True)
        _link_all_but_git(programs)
    return environment(
        PATH=str(programs),
        PYTHONPATH=os.pathsep.join(map(str, (ROOT / "tests/support/hidden", ROOT))),
        KD_TEST_HIDDEN=",".join(HIDDEN),
        KD_TEST_HIDDEN_RECORD=str(directory / "imports"),
        **changes,
    )


def imports_of_hidden(directory):
    """Return the hidden packages that child processes have tried to import, as a set of (package, importing module)."""
    record = directory / "imports"
    return {tuple(line.split()) for line in record.read_text().splitlines()} if record.exists() else set()


def _link_all_but_git(programs):
    """Fill a directory with links to all programs on PATH except git."""
    for directory in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in directory.iterdir() if directory.is_dir() else ():
            link = programs / program.name
            if program.name != "git" and not os.path.lexists(link):
                link.symlink_to(program.absolute())
    assert shutil.which("git", path=str(programs)) is None
