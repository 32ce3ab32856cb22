"""Entry point of `python -m kd_accel` and of each process of `accelerate launch -m kd_accel`."""

from kd_accel.cli import main

if __name__ == "__main__":
    main()
