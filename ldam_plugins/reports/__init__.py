"""What a person looks at after a run: tables by class, plots, a page."""

from typing import TYPE_CHECKING

from ldam_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from ldam_plugins.reports.audit_report import audit_text, write_audit
    from ldam_plugins.reports.class_table import per_class_table
    from ldam_plugins.reports.mistakes import write_mistakes
    from ldam_plugins.reports.rebalance_report import write_rebalance_report
    from ldam_plugins.reports.run_report import write_report

__all__ = [
    "audit_text",
    "per_class_table",
    "write_audit",
    "write_mistakes",
    "write_rebalance_report",
    "write_report",
]

__getattr__, __dir__ = lazy_names(  # importing jinja2 and matplotlib takes a second
    __name__,
    {
        "audit_text": "ldam_plugins.reports.audit_report",
        "write_audit": "ldam_plugins.reports.audit_report",
        "per_class_table": "ldam_plugins.reports.class_table",
        "write_mistakes": "ldam_plugins.reports.mistakes",
        "write_rebalance_report": "ldam_plugins.reports.rebalance_report",
        "write_report": "ldam_plugins.reports.run_report",
    },
)
