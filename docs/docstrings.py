"""Griffe extension: what the reference reads in our docstrings that Griffe does not by itself."""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension, Object


class Docstrings(Extension):
    def on_attribute_instance(self, *, attr: Attribute, node: Any, **kwargs: Any) -> None:
        """The help that a dataclass field carries for the command line describes it here too."""
        for part in ast.walk(node) if isinstance(node, ast.AnnAssign) and not attr.docstring else ():
            match part:
                case ast.Dict(keys=[ast.Constant("help")], values=[ast.Constant(str(text))]):
                    attr.docstring = Docstring(text, parent=attr)

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """`Example:` is a section of code, as `Examples:` is."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
