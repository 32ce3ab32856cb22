"""What each command does: the only place where the parts are wired together. Reached from cli.py, which knows no torch."""
