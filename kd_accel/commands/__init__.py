"""Commands of `kd-accel`: one module each, a thin layer between the command line and the builders."""
