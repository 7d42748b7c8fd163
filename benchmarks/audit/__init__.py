"""The training side: what the papers behind `sdguard.audit` claim, tried on small models where all of it can be measured.

``python -m benchmarks audit NAME``. Each goes on where it was stopped and writes ``results/audit/NAME.parquet``, ``NAME.json`` and
``NAME.png``; under ``accelerate launch -m benchmarks audit NAME`` processes share what takes long.
"""

import typer

from benchmarks.audit import agreement, density, gap, lid, neighbours, score

CLAIMS = {"score": score, "gap": gap, "density": density, "lid": lid, "agreement": agreement, "neighbours": neighbours}
#: what of each result stands in the documentation.
TABLES = {name: claim.brief for name, claim in CLAIMS.items()}

app = typer.Typer(help="What the papers claim, measured on small models.")
for name, claim in CLAIMS.items():
    app.command(name)(claim.main)
