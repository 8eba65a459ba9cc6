"""`python -m patternsearch` is the command line."""

from .cli import main

main()
