"""`python -m kaisa` is the command `kaisa`."""

from kaisa.cli import main

main()
