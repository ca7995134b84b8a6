"""``python -m medray`` is the command line."""

from medray.cli.main import main

main()
