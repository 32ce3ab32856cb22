"""Training and evaluation over any number of processes: the only package that knows that there is more than one."""
