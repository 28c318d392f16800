"""What a source file uses of CuPy, found in its syntax tree: names, attributes, arguments of calls.

Values are followed from the module `cupy` through assignments, attributes and calls, by what
cupy_names.py says that each of them gives. Nothing of type `Any` may be used without being told
here what it is, so that no use of CuPy escapes.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from cupy_names import NAMES

OTHER = ""  # not CuPy's
ARRAY = "cupy.ndarray"
# What names that are annotated `Any`, or not at all, stand for; OTHER: nothing of CuPy.
MEANING = {
    "cupy": "cupy",
    "stream": "cupy.cuda.Stream",
    "event": "cupy.cuda.Event",
    "copy": "_Copy",
    "node": OTHER,
    "args": OTHER,
    "memory": OTHER,
    "self": "self",
}
RESULTS = {
    "_cupy": "cupy",
    "_event": "cupy.cuda.Event",
    "_copy_stream": "cupy.cuda.Stream",
    "_module": "cupy.RawModule",
}


@dataclass
class Use:
    """One use: the name, and the arguments if it is a call."""

    name: str
    line: int
    call: bool = False
    positional: int = 0
    keywords: tuple[str, ...] = ()


@dataclass
class Uses(ast.NodeVisitor):
    """Collects the uses of one file."""

    found: list[Use] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    classes: dict[str, dict[str, str]] = field(default_factory=dict)
    current: str = ""

    def visit_Import(self, node):
        for name in node.names:
            if name.name.partition(".")[0] == "cupy":
                self.scopes[-1][name.asname or "cupy"] = name.name if name.asname else "cupy"

    def visit_ImportFrom(self, node):
        if (node.module or "").partition(".")[0] == "cupy":
            self.unexplained.append(f"line {node.lineno}: from {node.module} import")

    def visit_ClassDef(self, node):
        self.current = node.name
        self.classes.setdefault(node.name, {})
        makers = [item for item in node.body if getattr(item, "name", "") == "__init__"]
        for item in makers + [item for item in node.body if item not in makers]:
            self.visit(item)
        self.current = ""

    def visit_FunctionDef(self, node):
        scope = {}
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        for argument in every:
            scope[argument.arg] = self.meaning(argument.arg, argument.annotation)
        if self.text(node.returns) == "Any" and node.name not in RESULTS:
            self.unexplained.append(f"line {node.lineno}: the result of {node.name}")
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()

    def meaning(self, name, annotation):
        text = self.text(annotation)
        if text in ("Array", "Sequence[Array]"):
            return ARRAY if text == "Array" else "[]" + ARRAY
        if text not in ("", "Any"):
            return OTHER
        if name not in MEANING:
            self.unexplained.append(f"line {getattr(annotation, 'lineno', 0)}: {name}: {text}")
        return MEANING.get(name, OTHER)

    @staticmethod
    def text(node):
        return ast.unparse(node) if node is not None else ""

    # ---- statements that bind names

    def visit_Assign(self, node):
        for target in node.targets:
            self.bind(target, node.value)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.bind(node.target, node.value)

    def bind(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.bind(one, other)
            return
        kind = self.kind(value)
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute) and self.kind(target.value) == "self":
            self.classes[self.current].setdefault(target.attr, kind)
        elif isinstance(target, ast.Subscript) and self.kind(target.value) == ARRAY:
            self.use(f"{ARRAY}.__setitem__", target, True, 2)
        else:
            self.kind(target)

    def generators(self, node):
        for part in node.generators:
            kind = self.kind(part.iter)
            for name in ast.walk(part.target):
                if isinstance(name, ast.Name):
                    known = kind[2:] if kind.startswith("[]") else MEANING.get(name.id, OTHER)
                    self.scopes[-1][name.id] = known
            for condition in part.ifs:
                self.kind(condition)

    # ---- expressions

    def visit(self, node):
        if isinstance(node, ast.expr):
            return self.kind(node)
        return super().visit(node)

    def kind(self, node):
        """What an expression is: a name of CuPy's, "self", a class of the file, or OTHER."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), OTHER)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, self.kind(node.value))
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
            self.generators(node)
        children = ast.iter_child_nodes(node)
        kinds = [self.kind(child) for child in children if isinstance(child, ast.expr)]
        if isinstance(node, ast.BoolOp | ast.IfExp):
            return next((kind for kind in kinds if kind), OTHER)
        return OTHER

    def attribute(self, node, base):
        if base == "self":
            return self.classes[self.current].get(node.attr, OTHER)
        if base in self.classes:
            return self.classes[base].get(node.attr, OTHER)
        if not base:
            return OTHER
        name = f"{base}.{node.attr}"
        self.use(name, node)
        listed = NAMES.get(name)
        if listed is None:
            return OTHER
        return listed.gives if listed.kind in ("module", "attribute") else name

    def call(self, node):
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        for value in values:
            self.kind(value.value if isinstance(value, ast.Starred) else value)
        function = self.kind(node.func)
        own = node.func.attr if isinstance(node.func, ast.Attribute) else self.text(node.func)
        if own in RESULTS and not function:
            return RESULTS[own]
        if function == "cupy.RawKernel":
            function = "cupy.RawKernel.__call__"
            self.use(function, node)
        if function not in NAMES:
            return OTHER
        keywords = tuple(keyword.arg or "**" for keyword in node.keywords)
        self.use(function, node, True, len(node.args), keywords)
        return NAMES[function].gives

    def use(self, name, node, call=False, positional=0, keywords=()):
        self.found.append(Use(name, node.lineno, call, positional, keywords))


def uses_of(text: str) -> Uses:
    """The uses of CuPy in a source text, and what could not be followed."""
    first, tree = Uses(), ast.parse(text)
    first.visit(tree)
    uses = Uses(classes=first.classes)  # known from the start: a class may stand below its use
    uses.visit(tree)
    return uses
