"""nanoGPT's meta.pkl, read without the power of pickle: nothing in it can import, call or build."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError

MAX_BYTES = 1 << 22  # the largest vocabulary of uint16 ids takes about 1.2 MB
# What dicts of str and int need (lists, None and bools may lie beside them). No opcode here
# imports or calls, and none makes a hashable that nests, so hashing cannot recurse either.
PLAIN = """
    PROTO FRAME MARK STOP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS NONE NEWTRUE NEWFALSE INT BININT BININT1
    BININT2 LONG LONG1 LONG4 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
""".split()  # noqa: SIM905


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def _load(data: bytes) -> Any:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in PLAIN:
            raise ValueError(f"opcode {opcode.name} is not of plain values")
        if opcode.name.endswith("PUT") and (argument or 0) > len(data):  # would fill memory
            raise ValueError(f"memo {argument} of {len(data)} bytes")
    return _NoGlobals(io.BytesIO(data)).load()


def symbols_of(path: Path) -> list[str]:
    """Return the symbols of a meta.pkl in the order of their ids; UserError for any other file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are more than {MAX_BYTES}")
        meta = _load(path.read_bytes())
        itos, stoi = meta["itos"], meta["stoi"]
        if not (type(itos) is type(stoi) is dict and meta["vocab_size"] == len(itos) == len(stoi)):
            raise ValueError("vocab_size, itos and stoi differ in size")
        if not itos:
            raise ValueError("no symbols")
        symbols = [itos[i] for i in range(len(itos))]
        for i, symbol in enumerate(symbols):
            if type(symbol) is not str or type(stoi[symbol]) is not int or stoi[symbol] != i:
                raise ValueError(f"itos and stoi differ at id {i}")
        "".join(symbols).encode()
        return symbols
    except Exception as error:  # pickle's own list of what a bad file raises is open-ended
        reason = f"{type(error).__name__}: {error!s:.80}".splitlines()[0]
        raise UserError(
            f"{path} is not nanoGPT's meta.pkl ({reason}): prepare the data set again"
        ) from error
