from collections.abc import Callable
from typing import Any

def answer(
    again: int,
    handle: int,
    handler: Callable[..., Any],
    is_write: bool,
    offset: int,
    size: int,
    data: int,
    told: Callable[[], object] | None,
    failed: Callable[[BaseException, int | None], object],
    flags: bytearray,
    due: bool,
    /,
) -> tuple[Any] | tuple[Any, Any] | None: ...
