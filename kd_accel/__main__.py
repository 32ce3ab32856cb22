"""`python -m kd_accel`, which is also the `kd-accel` script and what `accelerate launch -m kd_accel` starts in each process."""

from kd_accel.cli import main

if __name__ == "__main__":
    main()
