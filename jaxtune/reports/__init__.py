"""The report of a study: one HTML page."""

from __future__ import annotations

from jaxtune.reports.page import write_report
from jaxtune.reports.records import read_study

__all__ = ["read_study", "write_report"]
