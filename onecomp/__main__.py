"""``python -m onecomp``."""

from onecomp.cli import main

main()
