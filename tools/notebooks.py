"""Run notebooks and keep what their cells print and show.

    python -m tools.notebooks                                        # all of notebooks/
    python -m tools.notebooks --files notebooks/one_training_step.ipynb

For code cells of plain Python: a cell's prints, and its last line if that is a picture (PIL) or a
value. No kernel and nothing to install; Jupyter and Colab run the same files.
"""
import ast
import base64
import contextlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from runtime import cli
from runtime.cli import UserError


@dataclass
class Config:
    files: list[str] = field(default_factory=list)  # notebooks; default: all of notebooks/


def outputs(value):
    """What a cell's last line shows. Returns: list of nbformat outputs."""
    if value is None:
        return []
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if isinstance(value, Image.Image):
        png = io.BytesIO()
        # 96 colors: a third of the bytes, and a notebook is kept small
        value.convert("RGB").quantize(96).save(png, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["a picture"]}
    return [dict(output_type="display_data", data=data, metadata={})]


def run_cell(source, names):
    """Execute one cell in `names`.  Returns: list of nbformat outputs."""
    tree, printed, value = ast.parse(source), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    text = printed.getvalue().splitlines(keepends=True)
    return [dict(output_type="stream", name="stdout", text=text)] * bool(text) + outputs(value)


def run(notebook, change=lambda source: source):
    """Execute a notebook's code cells in order, in its content.  change: applied to each cell's
    source before it runs, and not kept.  Returns: the names that the cells have left."""
    names, count = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell.update(execution_count=count, outputs=run_cell(change("".join(cell["source"])), names))
    return names


def main(c):
    start = Path.cwd()
    for file in map(Path, c.files or sorted(map(str, Path("notebooks").glob("*.ipynb")))):
        try:
            notebook = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--files {file}: {error}; give a notebook that is there") from error
        os.chdir(file.parent)
        run(notebook)
        os.chdir(start)
        file.write_text(json.dumps(notebook, indent=1) + "\n")
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
