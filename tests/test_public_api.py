"""The public names and signatures, so that every change of them is seen.

After a change that is meant: `python tests/test_public_api.py`, and tell it in the changelog.
"""

import inspect
import pathlib
import re

import optax_structured as oxs
from optax_structured import contrib

SNAPSHOT = pathlib.Path(__file__).with_name("public_api.txt")


def describe(name, thing):
    if inspect.ismodule(thing):
        return [f"{name}: module of {', '.join(sorted(thing.__all__))}"]
    if not callable(thing):
        return [f"{name}: {type(thing).__name__}"]
    lines = [f"{name}{_signature(thing)}"]
    if inspect.isclass(thing):
        for method, value in sorted(vars(thing).items()):
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if inspect.isfunction(value) and not method.startswith("_"):
                lines.append(f"  .{method}{_signature(value)}")
    return lines


def _signature(thing):
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return ""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    shown = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", shown)


def namespaces():
    """The rooms by name; those of contrib are imported by who wants them."""
    rooms = {name: thing for name, thing in vars(oxs).items() if name in oxs.__all__}
    found = {name: thing for name, thing in rooms.items() if inspect.ismodule(thing)}
    return found | {f"contrib.{room}": getattr(contrib, room) for room in contrib.__all__}


def current():
    things = {name: getattr(oxs, name) for name in sorted(oxs.__all__)}
    for room, inside in sorted(namespaces().items()):
        own = [n for n in sorted(inside.__all__) if getattr(inside, n) is not things.get(n)]
        things |= {f"{room}.{n}": getattr(inside, n) for n in own}
    return "\n".join(line for name, x in things.items() for line in describe(name, x)) + "\n"


def test_public_api_is_the_snapshot():
    assert current() == SNAPSHOT.read_text(), "see the docstring of this file"


def test_all_is_complete():
    """What the package imports for its users is in `__all__`, and nothing else is."""
    modules = {name for name, value in vars(oxs).items() if inspect.ismodule(value)}
    names = {name for name in vars(oxs) if not name.startswith("_")} - modules
    assert names == {n for n in oxs.__all__ if n not in modules and not n.startswith("_")}


if __name__ == "__main__":
    SNAPSHOT.write_text(current())
