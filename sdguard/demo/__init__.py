"""The demo: a page on which memorization is seen, caught and understood. ``python app.py``, ``sdguard demo``; needs the extra ``demo``.

``comparison.py``, ``why_run.py``, ``scan_run.py`` and ``landscape.py`` compute and know no page; ``elements.py``, ``charts.py``,
``signal_views.py`` and ``geometry_charts.py`` draw; one file a tab; ``app.py`` puts them together.
"""
