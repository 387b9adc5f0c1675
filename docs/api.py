"""Render docs/api.md from the code: `python docs/api.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent

PAGE = Path(__file__).with_name("api.md")
PACKAGE = PAGE.parent.parent / "fastreg"
NAME = re.compile(r"^### `(fastreg[\w.]*)\.(\w+)`\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
PARTS = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Examples):\n", re.MULTILINE)  # of a docstring
WIDTH = 120
TITLES = {"Args": "Arguments", "Raises": "Errors", "Warns": "Warnings"}
Definition = ast.ClassDef | ast.FunctionDef


def definition(module: str, name: str) -> Definition:
    """Find the last definition of a name, which overloads precede, in the sources of a module or of the package."""
    file = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    files = [file] if file.exists() else sorted(PACKAGE.rglob("*.py"))
    adapters = {"fastai.py", "fastai1.py", "lightning.py", "transformers.py"}
    for file in [file for file in files if len(files) == 1 or file.name not in adapters]:
        nodes = ast.parse(file.read_text()).body
        found = [node for node in nodes if isinstance(node, Definition) and node.name == name]
        if found:
            return found[-1]
    raise ValueError(f"{module} has no {name}")


def parameter(node: ast.arg, default: ast.expr | None) -> str:
    """Render a parameter, its annotation and its default."""
    annotation = f": {ast.unparse(node.annotation)}" if node.annotation else ""
    equals = " = " if annotation else "="
    return f"{node.arg}{annotation}{equals + ast.unparse(default) if default else ''}".replace("'", '"')


def signature(function: ast.FunctionDef, indent: str) -> str:
    """Render a function's `def`, over several lines if need be."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(plain) - len(args.defaults)), *args.defaults]
    parts = [parameter(node, default) for node, default in zip(plain, defaults, strict=True)]
    parts += [f"*{parameter(args.vararg, None)}"] if args.vararg else ["*"] * bool(args.kwonlyargs)
    parts += [parameter(node, default) for node, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    parts += [f"**{parameter(args.kwarg, None)}"] if args.kwarg else []
    end = f") -> {ast.unparse(function.returns)}:" if function.returns else "):"
    line = f"{indent}def {function.name}({', '.join(parts)}{end}"
    if len(f"{line} ...") <= WIDTH:  # a body may follow in the same line
        return line
    lines = [f"{indent}    {part}," for part in parts]  # as ruff, which also formats the code of pages, breaks it
    return "\n".join([f"{indent}def {function.name}(", *lines, f"{indent}{end}"])


def first_line(node: Definition, indent: str) -> list[str]:
    summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    quoted = f'"""{summary}"""'
    return [f"{indent}{quoted}"] if summary else []


def stub(node: Definition, members: list[str]) -> str:
    """Render a function, or a class with its fields, its constructor and the named methods."""
    if isinstance(node, ast.FunctionDef):
        return "\n".join([signature(node, ""), *first_line(node, " " * 4)])
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"class {node.name}({bases}):" if bases else f"class {node.name}:", *first_line(node, " " * 4)]
    lines += [""] * ("NamedTuple" in bases)
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and "NamedTuple" in bases:
            lines += [f"    {ast.unparse(inner)}"]
        elif isinstance(inner, ast.FunctionDef) and inner.name in ("__init__", *members):
            lines += ["", signature(inner, " " * 4), *first_line(inner, " " * 8)]
            lines[-1] += "" if lines[-1].endswith('"""') else " ..."
    return "\n".join(lines)


def listed(text: str) -> str:
    """Render the items of a part of a docstring, `name: text`, as a list."""
    items = [re.sub(r"\n +", "\n  ", item.strip()) for item in re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]]
    return "\n".join([re.sub(r"^([\w.*, ]+):", r"- `\1`:", item) for item in items])


def description(node: Definition) -> str:
    """Render the docstring of a function or a class behind its first paragraph."""
    intro, *parts = PARTS.split(ast.get_docstring(node) or "")
    paragraphs = intro.strip().split("\n\n")[1:]
    for title, part in zip(parts[::2], parts[1::2], strict=True):
        text = dedent(part).strip()
        if title == "Examples":
            paragraphs += [f"```pycon\n{x}\n```" if x.startswith(">>>") else x for x in text.split("\n\n")]
        elif title == "Returns":
            paragraphs += ["Returns: " + re.sub(r"\n +", "\n", text)]
        else:
            paragraphs += [f"{TITLES.get(title, title)}:", listed(text)]
    return "\n\n".join(paragraphs)


def render(page: str) -> str:
    """Return the page with each section rendered anew.

    A method that is added to the block of its class by its `def` gets its signature and its docstring.
    """

    def section(match: re.Match[str]) -> str:
        module, name, old = match.groups()
        node = definition(module, name)
        members = re.findall(r"^ {4}def ((?!__)\w+)", old, re.MULTILINE)
        described = {"": description(node)} | {
            f"**`{inner.name}`**\n\n": description(inner)
            for inner in node.body
            if isinstance(inner, ast.FunctionDef) and inner.name in members
        }
        code = f"```py\n{stub(node, members)}\n```"  # `python` marks the snippets that tests run
        return "\n\n".join([match[0].split("\n")[0], code, *[x + y for x, y in described.items() if y]]) + "\n\n"

    return NAME.sub(section, page).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
