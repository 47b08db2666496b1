"""Records of integers: named mutable fields for the state of compiled code.

numba passes a numpy record by reference and reads its fields as attributes, as Python does. A class
lists the fields:

    class Range:
        low: int
        high: int

    range = new_record(Range, high=255)    # an np.record of int64; low is 0

The class is for the reader and the type checker; a record is not an instance of it.
"""

from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def new_record(fields: type[T], **values: int) -> T:
    """Make an int64 record with the annotated fields of a class; fields without a value are 0."""
    dtype = np.dtype([(name, np.int64) for name in fields.__annotations__])
    record: Any = np.zeros(1, dtype).view(np.recarray)[0]
    for name, value in values.items():
        record[name] = value
    made: T = record
    return made
