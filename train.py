"""python train.py --config=configs/digits.py --workdir=runs/digits: the same as python -m sdpoint_jax train."""

from sdpoint_jax.cli.main import main

if __name__ == "__main__":
    main(command="train")
