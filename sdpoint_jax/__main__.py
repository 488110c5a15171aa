"""python -m sdpoint_jax COMMAND"""

# PYTHON_ARGCOMPLETE_OK
from sdpoint_jax.cli.main import main

if __name__ == "__main__":
    main()
