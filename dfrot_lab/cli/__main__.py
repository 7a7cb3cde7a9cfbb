"""`python -m dfrot_lab.cli`, where `dfrot-lab` is not on the path."""

from dfrot_lab.cli import app

app()
