"""What a run did and what it cost in accuracy, as one HTML page made from its run directory."""

from onecomp.report.report import write_report as write_report
