"""Make keys unique that occur in several shards: put every file into a folder named as its shard.

``0001.jpg`` in ``part/shard_3.tar`` becomes ``part/shard_3.tar/0001.jpg``, as `energon prepare
--fix-duplicates` of the published megatron-energon 7 does (found by preparing datasets). That one
writes into the shard; here each is written anew beside itself and renamed, so that whoever is
interrupted has whole shards, and what a link points to stays as it is.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from typing import Any

from toolz import dissoc

from energon_fn.disk import files
from energon_fn.errors import DatasetError


def put_in_folder(path: str | os.PathLike[str], folder: str) -> None:
    """Write a ``.tar``, ``.tar.gz`` or ``.tgz`` again with every name in a folder of this name.

    Contents, order, times and modes stay. Raises :class:`DatasetError` for a shard that cannot be
    read or replaced, and for sparse files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     with tarfile.open(f"{where}/a.tar", "w") as tar:
    ...         tar.addfile(tarfile.TarInfo("0001.jpg"))
    ...     put_in_folder(f"{where}/a.tar", "a.tar")
    ...     tarfile.open(f"{where}/a.tar").getnames()
    ['a.tar/0001.jpg']
    """
    packed = os.fspath(path).endswith(files.GZIP_SUFFIXES)
    try:
        with files.replacing(path) as temporary, files.open_stream(path) as stream:
            source: Any = tarfile.TarFile(fileobj=stream)
            target: Any
            with tarfile.open(
                temporary,
                "w:gz" if packed else "w",
                format=tarfile.PAX_FORMAT,
                pax_headers=source.pax_headers,
            ) as target:
                while (member := source.next()) is not None:
                    source.members.clear()  # tarfile would keep every header of the shard
                    _copy(source, member, folder, target)
                    target.members.clear()
            shutil.copymode(path, temporary)
    except tarfile.TarError as error:
        raise DatasetError(f"{os.fspath(path)}: {error}. Copy or write the shard again.") from error


def _copy(
    source: tarfile.TarFile, member: tarfile.TarInfo, folder: str, target: tarfile.TarFile
) -> None:
    if member.issparse():
        raise tarfile.TarError(f"{member.name} is a sparse file, which is not written again")
    content = source.extractfile(member) if member.isreg() else None
    member.name = f"{folder}/{member.name}"
    if member.islnk():  # such a link names another file of the tar
        member.linkname = f"{folder}/{member.linkname}"
    # These would go before the names.
    member.pax_headers = dissoc(member.pax_headers, "path", "linkpath")
    target.addfile(member, content)
