"""Starts the application: ``python -m scripts.apps.deploy``, or as the entry point of the packaged folder."""

from scripts.apps.deploy.app import main

main()
