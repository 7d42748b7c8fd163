"""Who is told of verdicts: the audit log, Python's logging, and the user's own function."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sdguard.guarded.audit_log import append_records, record_of
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport

#: the package's own, by whose name it is found.
logger = logging.getLogger("sdguard")


def tell(config: GuardConfig, reports: Sequence[GuardReport], delivered: bool = True) -> None:
    """Tell of the images of a call, whose verdicts are final; ``delivered`` says whether they go to the caller unless withheld.

    Each image has a record in the audit log, and each that is not clean one in Python's log, whose attribute ``sdguard`` is the same
    record. ``config.on_verdict`` is called with every report; what it raises is logged and stops nothing.

    Raises:
        CannotWrite: the audit log cannot be written, of which everybody else is told even so.
    """
    records = [record_of(report, delivered, config.log_prompts) for report in reports]
    try:
        append_records(config, records)
    finally:
        for report, record in zip(reports, records, strict=True):
            if report.verdict != "clean":
                verdict = "not judged" if report.error and report.verdict == "flagged" else report.verdict
                about = (verdict, record["id"], report.row, record["reason"])
                logger.warning("sdguard: %s: image %s, row %d of its call: %s", *about, extra={"sdguard": record})
            if config.on_verdict:
                try:
                    config.on_verdict(report)
                except Exception:
                    logger.exception("sdguard: on_verdict failed; image %s is what it was", record["id"])


def tell_of_failure(config: GuardConfig, reports: Sequence[GuardReport]) -> None:
    """Tell of the images of a call that an error has ended, whose own it is to be raised: that the log cannot be written is logged too."""
    try:
        tell(config, reports, delivered=False)
    except OSError as error:
        logger.error("sdguard: %s", error)
