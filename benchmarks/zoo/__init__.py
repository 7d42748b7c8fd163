"""A zoo of small models that memorize on purpose, of other makes than the embedded one, and one that does not: recipes and weights.

``python -m benchmarks zoo data``, ``zoo train NAME`` and ``zoo label NAME`` make a model of `benchmarks.zoo.recipes` from nothing; what
they make lies in ``models/NAME``, in the form `benchmarks.models` reads.
"""
