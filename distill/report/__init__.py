"""Pages from finished folders: report, dossier, their figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dossier": ["build_dossier"],
        "report": ["build_report", "summary_table"],
    },
)
