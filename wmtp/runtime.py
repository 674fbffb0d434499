"""The inside of a sample: loads the program, then answers the judge's requests until it is killed."""

import atexit
import gc
import io
import operator
import os
import random
import socket
import sys
import threading
import types
import weakref

from wmtp import codec

MODULE = "solution"


class Inside:
    """One program, its module and the objects that the judge knows by number."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.module = types.ModuleType("__main__")
        self.objects: list[object] = []
        self.streams = [weakref.ref(sys.stdout), weakref.ref(sys.stdout.buffer)]

    def refer(self, value: object) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def decode(self, form: object) -> object:
        return codec.decode(form, self.objects.__getitem__)

    def load(self, request: dict) -> None:
        """Runs the program as a module; only a program that reads stdin sees itself as the main one."""
        standalone = request["standalone"]
        self.module.__dict__.update({"__name__": "__main__" if standalone else MODULE, "__builtins__": __builtins__})
        if not standalone:
            sys.modules[MODULE] = self.module
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), self.module.__dict__)

    def run(self, request: dict) -> None:
        """Statements after the program, in its module; the nonce in the answer says that all of them ran."""
        exec(compile(request["source"], "test.py", "exec", dont_inherit=True), self.module.__dict__)

    def resolve(self, request: dict) -> object:
        value = self.module.__dict__[request["name"]]
        return ["m", value.__name__] if isinstance(value, types.ModuleType) else codec.encode(value, self.refer)

    def apply(self, request: dict) -> object:
        """One operation on values of this side; the result crosses as a value where it can and as a number where not."""
        arguments = [self.decode(form) for form in request["arguments"]]
        keywords = {name: self.decode(form) for name, form in request["keywords"].items()}
        return codec.encode(OPERATIONS[request["operation"]](*arguments, **keywords), self.refer)


def _call(function, /, *arguments, **keywords) -> object:
    return function(*arguments, **keywords)


OPERATIONS = {
    "call": _call,
    "list": list,
    "str": str,
    "len": len,
    "bool": bool,
    "item": operator.getitem,
    "attribute": getattr,
    "assign": setattr,
}


def send(channel: socket.socket, message: object) -> None:
    body = codec.dumps(message)
    channel.sendall(codec.LENGTH.pack(len(body)) + body)


def _exactly(requests: io.BufferedReader, size: int) -> bytes:
    body = requests.read(size)
    if len(body) < size:
        os._exit(0)  # the judge has gone
    return body


def receive(requests: io.BufferedReader) -> dict:
    return codec.loads(_exactly(requests, codec.LENGTH.unpack(_exactly(requests, codec.LENGTH.size))[0]))


def _add_exits(builtins: types.ModuleType) -> None:
    """`-S` leaves these out and contest programs call them."""
    builtins.exit = builtins.quit = sys.exit


def describe(error: BaseException) -> dict:
    """An exception as data; the text may itself be hostile, hence only exact strings of bounded length."""
    try:
        text = str(error)[:200]
    except BaseException:  # a program's own __str__ may raise anything
        text = ""
    return {"raised": type(error).__name__, "text": text if type(text) is str else ""}


def finish(streams: list[weakref.ref]) -> None:
    """What an interpreter does at its end, without the cost of tearing it down: threads, atexit, unwritten text of every open file.

    `streams`: those older than the sample, which the collector no longer lists; where the program let go of one, it is written already.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    files = [thing for thing in (*gc.get_objects(), *(stream() for stream in streams)) if isinstance(thing, io.IOBase)]
    files.sort(key=lambda file: (type(file) is io.TextIOWrapper) + 2 * (type(file) is io.BufferedWriter))
    for file in [getattr(sys, "stdout", None), *files]:
        if file is not None and not _ended(file):
            file.flush()


def _ended(file: io.IOBase) -> bool:
    try:
        return getattr(file, "closed", False)
    except ValueError:  # a text stream whose buffer was taken from it
        return True


def _standalone(inside: Inside, request: dict) -> None:
    """A program that reads stdin: runs it to its end and leaves with its exit status."""
    sys.set_int_max_str_digits(0)
    status = 0
    try:
        inside.load(request)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:  # whatever ends an untrusted program is its result
        send(inside.channel, describe(error))
        os._exit(1)
    try:
        finish(inside.streams)
    except BaseException as error:
        send(inside.channel, describe(error))
        os._exit(1)
    os._exit(status & 0xFF)


def answer(inside: Inside, request: dict) -> object:
    match request["op"]:
        case "load":
            inside.load(request)
            return {"value": None}
        case "run":
            inside.run(request)
            return {"value": request["nonce"]}
        case "resolve":
            return {"value": inside.resolve(request)} if request["name"] in inside.module.__dict__ else {"missing": True}
        case "apply":
            return {"value": inside.apply(request)}
    raise codec.CodecError(f"unknown request {request['op']!r}")


def serve(channel: socket.socket) -> None:
    import builtins

    _add_exits(builtins)
    random.seed(0)
    inside = Inside(channel)
    sys.modules["__main__"] = inside.module
    requests = open(channel.fileno(), "rb", closefd=False)  # noqa: SIM115
    send(channel, {"ready": True})
    while True:
        request = receive(requests)
        if request["op"] == "load" and request["standalone"]:
            _standalone(inside, request)
        try:
            reply = answer(inside, request)
        except BaseException as error:  # whatever an untrusted program raises, SystemExit too, is its answer
            reply = describe(error)
        try:
            send(channel, reply)
        except (ValueError, MemoryError) as error:
            send(channel, describe(error))
