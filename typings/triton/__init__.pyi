# Triton states the types of its functions for its own compiler: here they are all of any type.
from typing import Any

def __getattr__(name: str) -> Any: ...
