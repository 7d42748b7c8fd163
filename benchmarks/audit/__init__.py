"""The training side: what the papers behind `sdguard.audit` claim, tried on small models where all of it can be measured.

``python -m benchmarks audit NAME``. Each goes on where it was stopped and writes ``results/audit/NAME.parquet``, ``NAME.json`` and
``NAME.png``; under ``accelerate launch -m benchmarks audit NAME`` processes share what takes long.
"""

import typer

from benchmarks.audit import agreement, density, gap, lid, neighbours, score

app = typer.Typer(help="What the papers claim, measured on small models.")
for module in (score, gap, density, lid, agreement, neighbours):
    app.command(module.__name__.rpartition(".")[2])(module.main)

#: what of each result stands in the README.
TABLES = {module.__name__.rpartition(".")[2]: module.readme for module in (score, gap, density, lid, agreement, neighbours)}
