"""``python -m longqlora``: the command line where the command ``longqlora`` is not installed."""

from longqlora.cli import main

main()
