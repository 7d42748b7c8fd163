"""The demo: a page on which memorization is seen, caught and understood. ``python app.py``, ``sdguard demo``; needs the extra ``demo``.

``runs.py`` and ``landscape.py`` compute and know no page; ``figures.py`` draws; one file a tab; ``app.py`` puts them together.
"""
