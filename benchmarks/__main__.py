"""``python -m benchmarks NAME``: every benchmark under one roof; ``accelerate launch -m benchmarks NAME`` shares what can be shared."""

import typer

try:
    from benchmarks import (
        audit,
        audit_log,
        cures,
        detection,
        development,
        examples,
        figures,
        first_use,
        fuzz,
        kills,
        leave_one_out,
        load,
        matrix,
        old_releases,
        overhead,
        packages,
        prompt_sets,
        report,
        reproduce,
        scan,
        settings,
        steering,
        upstream,
    )
    from benchmarks.running import print_no_verdicts
    from benchmarks.zoo import commands as zoo
except ModuleNotFoundError as error:
    raise SystemExit(f"The benchmarks need {error.name}, which the extra 'bench' brings: pip install -e '.[bench]' in a clone.") from None

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Measure the guard, and draw what was measured.")
app.command("detection")(detection.main)
app.command("steering")(steering.main)
app.command("cures")(cures.main)
app.command("development")(development.main)
app.command("leave-one-out")(leave_one_out.main)
app.command("first-use")(first_use.main)
app.command("settings")(settings.main)
app.command("fuzz")(fuzz.main)
app.command("kills")(kills.main)
app.command("audit-log")(audit_log.main)
app.command("load")(load.main)
app.command("scan")(scan.main)
app.command("overhead")(overhead.main)
app.command("matrix")(matrix.main)
app.command("old-releases")(old_releases.main)
app.command("upstream")(upstream.main)
app.command("packages")(packages.main)
app.command("prompt-sets")(prompt_sets.main)
app.add_typer(audit.app, name="audit")
app.add_typer(zoo.app, name="zoo")
app.command("reproduce")(reproduce.main)
app.command("report")(report.main)
app.command("figures")(figures.main)
app.command("examples")(examples.main)

if __name__ == "__main__":
    print_no_verdicts()
    app()
