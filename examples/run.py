"""Executes the notebooks of this folder in one process and writes their outputs into them: python examples/run.py

It needs no Jupyter. Run it where `exports/` lies, which the first cell of each notebook says how to make.
"""

import ast
import base64
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def run(notebook: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The notebook with new outputs, and the names that its cells defined. What fails is raised."""
    import matplotlib

    matplotlib.use("agg")
    content, names = json.loads(notebook.read_text()), {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in content["cells"] if cell["cell_type"] == "code"), start=1):
        cell |= {"execution_count": number, "outputs": outputs("".join(cell["source"]), number, names)}
    return content, names


def outputs(source: str, number: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one cell; what it printed, the value of its last line and the figures that it drew."""
    from matplotlib import pyplot as plt
    from PIL import Image

    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    found: list[dict[str, Any]] = []
    if text := printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        text = {"text/plain": repr(value).splitlines(keepends=True)}
        found.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": text})
    for figure in map(plt.figure, plt.get_fignums()):
        figure.savefig(drawn := io.BytesIO(), bbox_inches="tight", dpi=72)
        Image.open(drawn).convert("RGB").quantize(64).save(small := io.BytesIO(), "png", optimize=True)
        png = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": ["<a figure>"]}
        found.append({"output_type": "display_data", "metadata": {}, "data": png})
        plt.close(figure)
    return found


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for path in [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.ipynb")):
        path.write_text(json.dumps(run(path)[0], indent=1, ensure_ascii=False) + "\n")
        print(f"Wrote the outputs of {path.name}")
