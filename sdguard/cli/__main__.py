"""``python -m sdguard.cli``, as ``accelerate launch -m`` needs it."""

from sdguard.cli.main import app

app()
