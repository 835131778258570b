# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What runs in the confined process of `sandbox.py`: a program, or one side of calls between a function and its tests.

On standard input, as JSON: the request of [`prepare`]. The process says `READY` on its channel of results before any of
the program runs. That the program came to its end is told by a token. Until then the token is held by an iterator that no
Python object leads to (no frame, variable, or module), and what would look for it otherwise is refused: see
[`refuse_introspection`]. Whatever the program replaces, `os.write` for example, is in that iterator already.
"""

import builtins
import importlib
import json
import operator
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial


READY = b"R"
LARGEST_MESSAGE = 1 << 24  # bytes
ENDS_OF_ITERATION = (StopIteration, StopAsyncIteration)
ENDED = "the process of the function has ended"


def refuse_introspection():
    """Refuses, for good, what reads other objects' memory or steers code that is not the program's own."""

    # All constants are part of the code, which cannot be reached: the program can change names but no decision.
    def veto(event, arguments):
        if event.startswith(
            ("gc.get_", "ctypes.", "sys.monitoring.", "sys._current_", "cpython.PyInterpreterState_New")
        ) or event in ("sys.settrace", "sys.setprofile", "sys.addaudithook", "sys.remote_exec"):
            raise PermissionError(f"{event} is not available in the sandbox")

    sys.addaudithook(veto)


def steps(program: str, token: str | None, result: int, namespace: dict, after: Callable | None) -> Iterator[Callable]:
    """The program and what follows its end. No frame holds them while the program runs."""
    run = partial(exec, compile(program, "<generated>", "exec"), namespace)
    if token is None:
        return iter((run, after))
    return iter((run, partial(os.write, result, bytes.fromhex(token)), partial(os._exit, 0)))


def pack(value: object) -> object:
    """A value in JSON: plain ones as they are, all others as `[kind, content]`; iterators are read to their end.

    Raises:
        TypeError: for a value that is not made of Python's own kinds of data.
    """
    if isinstance(value, int) and not -LARGE < value < LARGE:
        return ["int", hex(value)]  # Python does not print arbitrarily long decimals
    if value is None or isinstance(value, bool | int | float | str):
        plain = next(kind for kind in (type(None), bool, int, float, str) if isinstance(value, kind))
        return value if value is None else plain(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [pack(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, list(value)]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if type(value).__name__ in NUMBERS:
        return [type(value).__name__, str(value)]
    if isinstance(value, Iterator):
        return ["iterator", [pack(item) for item in value]]
    raise TypeError(f"a function under test must take and return plain data, got {type(value).__name__}")


LARGE = 1 << 63
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}
COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
FLAT = {"complex": lambda parts: complex(*parts), "bytes": bytes, "bytearray": bytearray}
FLAT |= {"range": lambda parts: range(*parts), "int": lambda text: int(text, 16)}


def unpack(value: object) -> object:
    """The inverse of [`pack`]; makes data only, whatever it is given."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind in NUMBERS:
        return getattr(importlib.import_module(NUMBERS[kind]), kind)(content)
    if kind in COLLECTIONS:
        return COLLECTIONS[kind]([unpack(item) for item in content])
    return FLAT[kind](content)


class Channel:
    """Messages to and from the other process, one line of JSON each."""

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing, self.rest = reading, writing, b""

    def send(self, message: object):
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.writing, data) :]

    def receive(self) -> object:
        """
        Raises:
            EOFError: if the other side has ended, or sends without an end.
        """
        parts, size = [self.rest], len(self.rest)
        while b"\n" not in parts[-1]:
            part = os.read(self.reading, 1 << 16)
            size += len(part)
            if not part or size > LARGEST_MESSAGE:
                raise EOFError(ENDED if not part else f"an answer is larger than {LARGEST_MESSAGE} bytes")
            parts.append(part)
        line, self.rest = b"".join(parts).split(b"\n", maxsplit=1)
        return json.loads(line)


def remote_function(channel: Channel) -> Callable:
    """The tests' side: a function that is called in the other process. Its errors are raised here as built-in ones."""

    def function(*args, **kwargs):
        channel.send([pack(args), pack(kwargs)])
        error, value = channel.receive()
        if error is None:
            return unpack(value)
        kind = vars(builtins).get(str(error))
        # One that ends iterations would end a loop over calls, and with it what the tests ask.
        is_error = isinstance(kind, type) and issubclass(kind, Exception) and kind not in ENDS_OF_ITERATION
        raise (kind if is_error else RuntimeError)(str(value))

    return function


def serve(channel: Channel, namespace: dict, name: str):
    """The function's side: calls it as often as the tests ask for it."""
    while True:
        try:
            args, kwargs = (unpack(part) for part in channel.receive())
        except EOFError:  # the tests are through
            return
        try:
            answer = [None, pack(namespace[name](*args, **kwargs))]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        channel.send(answer)


def prepare() -> Iterator[Callable]:
    """Reads the request and makes the steps of carrying it out.

    The request: `program`; `result`, the channel for results; `token`, null on the function's side of calls; and for
    calls `name` of the function, `channel` (a number to read from, one to write to), and on the tests' side `setup`,
    source that defines what the tests need besides the function.
    """
    with open(0, "rb", closefd=False) as file:
        request = json.load(file)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # takes the number that has become free
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    namespace, after = vars(main_module), None
    refuse_introspection()
    os.write(request["result"], READY)
    if "channel" in request:
        channel = Channel(*request["channel"])
        if request["token"] is None:
            after = partial(serve, channel, namespace, request["name"])
        else:
            exec(compile(request["setup"], "<setup>", "exec"), namespace)
            namespace[request["name"]] = remote_function(channel)
    return steps(request["program"], request["token"], request["result"], namespace, after)


def main():
    try:
        deque(map(operator.call, prepare()), maxlen=0)
    except SystemExit:
        raise RuntimeError("the program left before its end") from None


if __name__ == "__main__":
    main()
