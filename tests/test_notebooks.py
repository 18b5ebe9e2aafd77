"""The notebooks run from top to bottom and show what they promise.

``python tests/test_notebooks.py`` runs them and writes their outputs into the files;
``python tests/test_notebooks.py 04_resume`` does it with that one.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PNG, HTML = "image/png", "text/html"
KEPT = (PNG, HTML, "text/plain")


def run(path: Path, folder: str | Path) -> Any:
    """The notebook with the outputs of a run in an empty folder, with this checkout's library."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = os.path.join(folder, "cache")
    client.execute(env={**os.environ, "PYTHONPATH": paths, "ENERGON_FN_CACHE": cache})
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> Iterator[Image.Image]:
    for output in cell.outputs:
        if PNG in output.get("data", {}):
            yield Image.open(io.BytesIO(base64.b64decode(output.data[PNG])))


def texts(cell: Any) -> list[str]:
    """What the cell's outputs say, without warnings, and sizes of JPEGs (Pillow decides them)."""
    said = [
        output.get("text") or output.get("data", {})["text/plain"]
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]
    return [re.sub(r"\(\d+ bytes( not processed)?\)", "(n bytes)", text) for text in said]


def tables(cell: Any) -> list[str]:
    """Tables and drawings, which have times in them."""
    return [output.data[HTML] for output in cell.outputs if HTML in output.get("data", {})]


def promises_picture(cell: Any) -> bool:
    return bool(re.search(r"sheet|Image\.fromarray|show\(", cell.source.splitlines()[-1]))


def tidy(notebook: Any) -> None:
    """Make the file small: pictures as PNG alone, in 256 colours."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.clear()
        for output in cell.get("outputs", ()):
            for kind in set(output.get("data", {})).difference(KEPT):
                del output.data[kind]
        for output, picture in zip(
            [o for o in cell.get("outputs", ()) if PNG in o.get("data", {})],
            list(pictures(cell)) if cell.cell_type == "code" else (),
            strict=True,
        ):
            file = io.BytesIO()
            picture.convert("RGB").quantize(256, kmeans=3).save(file, "PNG", optimize=True)
            output.data[PNG] = base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_the_outputs_that_it_is_kept_with(
    path: Path, tmp_path: Path
) -> None:
    kept = code_cells(nbformat.read(path, as_version=4))
    fresh = code_cells(run(path, tmp_path))  # raises what a cell raises
    assert sum(map(promises_picture, fresh)) >= 3
    for cell, old in zip(fresh, kept, strict=True):
        assert len(tables(cell)) == len(tables(old)), cell.source
        if not tables(cell):
            again = f"run {Path(__file__).name} as a script"
            assert texts(cell) == texts(old), f"{again}\n{cell.source}"
        shown, shown_before = list(pictures(cell)), list(pictures(old))
        assert shown or not promises_picture(cell), cell.source
        assert [picture.size for picture in shown] == [picture.size for picture in shown_before]
        for picture in [*shown, *shown_before]:
            assert picture.convert("RGB").getcolors(maxcolors=3) is None, "not much to see"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_fit_to_be_kept(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 600_000
    for cell in code_cells(notebook):
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs
        for text in [cell.source, *texts(cell), *tables(cell)]:
            assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|var|private)/|\\Users\\", text)
            assert not re.search(r"\bat 0x[0-9a-f]+", text)  # an object's address


def test_the_notebooks_lead_to_one_another() -> None:
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\(([^):]+)\)", prose)
        assert links, f"{path.name} stands alone"
        for link in links:
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def named(names: list[str]) -> list[Path]:
    """The notebooks of these names, with or without ``.ipynb``; all if there are none."""
    known = {path.stem: path for path in NOTEBOOKS}
    wanted = {Path(name).stem for name in names} or {*known}
    if unknown := sorted(wanted - {*known}):
        raise SystemExit(f"there is no notebook {', '.join(unknown)}, but {', '.join(known)}")
    return [path for stem, path in known.items() if stem in wanted]


def test_the_script_takes_names() -> None:
    assert named([]) == NOTEBOOKS
    first, second, *_ = NOTEBOOKS
    assert named([second.stem, f"notebooks/{first.name}"]) == [first, second]
    with pytest.raises(SystemExit, match="no notebook 99_none, but 01_"):
        named([first.stem, "99_none"])


def main() -> None:
    for path in named(sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, folder)
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
