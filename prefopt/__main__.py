"""`python -m prefopt`: the `prefopt` command."""

from prefopt.cli import main

main()
