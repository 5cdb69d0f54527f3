"""`python -m prefopt.cli`: the `prefopt` command."""

from prefopt.cli import main

main()
