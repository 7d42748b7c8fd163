"""The audit log: a JSON line for each image judged, whatever its verdict, which is on disk before any image of its call is delivered.

``audit_record.schema.json`` beside this file is its JSON schema. A prompt stands there as its SHA-256, without a salt: the same prompt has
the same hash on every machine and on every day, so that whoever asks what became of a prompt can be answered, and a salt that the log's
readers need for that would guard nothing. It hides a prompt from who cannot guess it, and from nobody else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdguard.files.appending import append_lines, put_aside
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport

#: what a record's reason goes on with where its call came to no end.
ENDED = "An error ended its call, of which nothing was delivered."
#: what each line begins with.
BEGINNING = b'{"id": "'
#: fields of a report that its record has as they are.
FIELDS = (
    "id", "time", "version", "model", "profile", "false_positive_rate", "seed", "row", "verdict", "score", "threshold", "p_value",
    "extra_evaluations",
)  # fmt: skip


def schema() -> dict[str, Any]:
    """The JSON schema of a record."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("audit_record.schema.json").read_text(encoding="utf-8"))
    return found


def prompt_digest(prompt: str) -> str:
    """The SHA-256 of a prompt's UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def record_of(report: GuardReport, delivered: bool, with_prompt: bool) -> dict[str, Any]:
    """What the audit log has of an image, in values that JSON can hold.

    ``delivered`` says whether its call came to an end; a withheld image is delivered to nobody even so. Nothing of the prompt is in it
    but its hash, unless ``with_prompt``.
    """
    reason = report.reason if with_prompt else report.reason_without_texts
    return {
        **{name: getattr(report, name) for name in FIELDS},
        "delivered": delivered and report.verdict != "withheld",
        "reason": reason if delivered else f"{reason} {ENDED}",
        "prompt_sha256": None if report.prompt is None else prompt_digest(report.prompt),
        **({"prompt": report.prompt} if with_prompt else {}),
    }


def append_records(config: GuardConfig, records: Iterable[dict[str, Any]]) -> None:
    """Append records to the audit log of a config, if it has one; without any it is only seen that some could be. Raises `CannotWrite`."""
    if config.audit_log:
        append_lines(Path(config.audit_log), map(json.dumps, records), beginning=BEGINNING, largest=config.audit_log_bytes)


def audit_files(path: Path) -> list[Path]:
    """The files of an audit log, the oldest first: those put aside, and the one that is written to."""
    return [*put_aside(path).values(), *([path] if path.exists() else [])]
