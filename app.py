"""The demo: ``python app.py``, with the options of ``sdguard demo``."""

import sys

from sdguard.cli.main import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
