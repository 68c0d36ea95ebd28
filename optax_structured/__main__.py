"""`python -m optax_structured`: the same as the command `optax-structured`."""

from optax_structured.cli import app

if __name__ == "__main__":
    app(prog_name="optax-structured")
