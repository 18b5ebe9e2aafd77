"""The dataset on disk: shards, their index, the ``.nv-meta`` folder, and raw samples by position.

``files`` is the one place that touches the file system. ``tars`` walks a shard once, and ``index``
keeps what it found. ``metadata`` and ``fields`` read and write what is said of a dataset,
``prepare`` makes all that, and ``source`` opens it. ``jsonl`` does the same for files of JSON
lines, ``joined`` for several datasets by key; ``media`` keeps the sizes and lengths of media.
"""
