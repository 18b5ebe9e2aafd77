"""The dataset on disk: shards, their index, the ``.nv-meta`` folder, and raw samples by position.

``files`` is the one place that touches the file system; ``index`` finds what is where in a tar;
``metadata`` and ``fields`` read and write what is said about a dataset; ``prepare`` makes all
that; ``source`` opens it.
"""
