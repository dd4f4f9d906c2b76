"""Runs a script of cells that await, as a notebook would: one after the other, on one loop.

python examples/run_cells.py examples/notebook_cells.py
"""

import ast
import asyncio
import inspect
import re
import sys
from pathlib import Path


async def run_cells(name: str, script: str) -> None:
    """Run the cells of a script, which begin with `# %%`; they share their names and the loop."""
    names: dict[str, object] = {"__name__": "__main__"}
    cells = re.split(r"^(?=# %%)", script, flags=re.MULTILINE)
    for number, cell in enumerate(cells):
        where = f"{name}, cell {number}"
        code = compile(cell, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        pending = eval(code, names)
        if inspect.iscoroutine(pending):  # it has an await
            await pending


if __name__ == "__main__":
    path = Path(sys.argv[1])
    asyncio.run(run_cells(path.name, path.read_text()))
