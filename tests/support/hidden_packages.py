"""Environment of child processes in which optional packages and git are absent, as they can be on a GPU machine."""

import os
import shutil
from pathlib import Path

from tests.support.launching import ROOT, environment

HIDDEN = ("wandb", "datasets", "matplotlib", "sklearn", "timm")


def hidden_environment(directory, **changes):
    """Return the variables for a real child process (`subprocess`, never the warm interpreter, which has imported everything).

    directory: an empty one, for the child's PATH and the record of its imports. A first use fills it, later ones share it.
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
    """Return the set of (package, importing module) that the child processes of this directory have tried to import."""
    record = directory / "imports"
    return {tuple(line.split()) for line in record.read_text().splitlines()} if record.exists() else set()


def _link_all_but_git(programs):
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = programs / program.name
            if program.name != "git" and not os.path.lexists(link):
                link.symlink_to(program.absolute())
    assert shutil.which("git", path=str(programs)) is None
