"""K-Means at any size: the same bits from one process or many, from memory or from shards, interrupted or not.

:class:`KMeans` is the estimator; :class:`FeatureSource` is the protocol of its input; ``usage`` shows how clusters are
used; ``python -m speechlm_ext.importers.kmeans_centroids`` imports centroids of other programs.
"""

from speechlm_ext.kmeans.estimator import KMeans
from speechlm_ext.kmeans.features.sources import FeatureSource, open_source

__all__ = ["FeatureSource", "KMeans", "open_source"]
