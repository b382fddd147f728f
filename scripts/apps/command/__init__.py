"""The verbs of the console command and of the container image, and what only they bring: ``doctor`` and ``label``."""
