"""python evaluate.py --workdir=runs/digits: the same as python -m sdpoint_jax evaluate."""

from sdpoint_jax.cli.main import main

if __name__ == "__main__":
    main(command="evaluate")
