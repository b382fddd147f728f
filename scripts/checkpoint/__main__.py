"""``python -m scripts.checkpoint``."""

from scripts.checkpoint import compact, convert, download, export
from scripts.runtime.commandline import main

main({"convert": convert, "export": export, "compact": compact, "download": download})
