"""Renders chat templates as transformers does, but with bounded time and memory.

A chat template is a Jinja program that comes with a model. Jinja's sandbox isolates it from the process, but does not
keep it from looping endlessly or filling the memory. So templates are compiled with a hook at every construct that
repeats or enlarges something: the hook charges the `Budget` of the rendering first.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from octavo.bounded_json import shortened
from octavo.data.template_limits import MAX_SOURCE_CHARACTERS, Budget, LimitError, size_of
from octavo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Jinja filters that are removed: their cost is unbounded, or they are for HTML pages.
_LEFT_OUT = ("filesizeformat", "forceescape", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_HINT = "Take the chat template of the model's publisher, or give the data as `prompt` and `completion`."
_STEP = "octavo_step"


class TemplateRefusalError(ValueError):
    """The template does not render this conversation; the message quotes the reason."""


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    now: datetime | None = None,
) -> str:
    """The text of tokenizer.apply_chat_template(.., tokenize=False) for the conversation, at the time `now`.

    Raises TemplateRefusalError for a conversation that the template rejects or cannot render, and ModelError for a
    template that is invalid Jinja or exceeds its budget of steps, characters and seconds.
    """
    try:
        source = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # several templates, none of which is named default
        raise ModelError(f"The model's chat templates cannot be used: {shortened(str(error))}") from error
    template = _compiled(source)
    conversation, tool_list = list(messages), list(tools) if tools is not None else None
    budget = Budget(len(conversation), size_of([conversation, tool_list], most=2**40))
    variables = {
        **tokenizer.special_tokens_map,
        "messages": conversation,
        "tools": tool_list,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": (now or datetime.now()).strftime,
    }
    _ENVIRONMENT.budget = budget
    try:
        return "".join(template.root_render_func(template.new_context(variables)))
    except LimitError as error:
        raise ModelError(f"The model's chat template is stopped: {error}.", hint=_HINT) from error
    except _RaisedError as error:
        raise TemplateRefusalError(f"the chat template refuses the conversation: {shortened(str(error))}") from error
    except Exception as error:  # a template can cause any exception of Python
        raise TemplateRefusalError(f"the chat template fails on the conversation ({_quoted(error)})") from error


class _RaisedError(TemplateError):
    """The template called raise_exception."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    if not isinstance(source, str) or len(source) > MAX_SOURCE_CHARACTERS:
        raise ModelError(f"The model's chat template is not text of at most {MAX_SOURCE_CHARACTERS:,} characters.")
    _ENVIRONMENT.budget = Budget()
    try:
        return _ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {shortened(str(error.message))}"
        raise ModelError(f"The model's chat template is not valid Jinja ({reason}).", hint=_HINT) from error
    except Exception as error:  # nesting too deep for Jinja or Python to compile
        raise ModelError(f"The model's chat template cannot be compiled ({_quoted(error)}).", hint=_HINT) from error


def _quoted(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}")


class _CountingCode(CodeGenerator):
    """Generates code in which concatenations and literals call the environment, to be counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concatenated(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _counted(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.budget.made(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)


class _Generation(Extension):
    """{% generation %} marks the model's output. Here it only renders its body, as a macro does."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace without contents in its repr: namespaces can contain each other, so that would not end."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with counting. All threads share it; each has its own budget."""

    code_generator_class = _CountingCode
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        self._local = threading.local()
        # optimized=False: no constant folding at compile time, before there is a budget.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False,
            finalize=_written,
        )  # fmt: skip
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters.update({name: self._counting(name, run) for name, run in self.filters.items()})
        self.filters["tojson"] = self._tojson
        self.filters["sum"] = self._counting("sum", _numbers_alone(self.filters["sum"]))
        self.filters[_STEP] = lambda n_characters: self.budget.step(n_characters)
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception

    @property
    def budget(self) -> Budget:
        budget: Budget = self._local.budget
        return budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            for node in tree.find_all(kind):
                body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
                step = nodes.Filter(nodes.Const(_fixed_characters(body)), _STEP, [], [], None, None)
                body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno, override=True))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = __self.budget
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int | float | list | tuple | dict):
            if name == "join" and args:  # count the texts of a generator while it yields them
                args = (list(args[0]), *args[1:])
            budget.check_call(name, owner, [*args, *kwargs.values()])
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def concatenated(self, context: Context, parts: tuple[Any, ...]) -> str:
        """The concatenated operands of `~`."""
        self.budget.charge(sum(len(part) if isinstance(part, str) else self.budget.size(part) for part in parts))
        joined: str = _markup_join(parts) if context.eval_ctx.autoescape else "".join(map(str, parts))
        return joined

    def _counting(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The filter `run`, checked before its call and charged for its result."""
        skipped = 1 if hasattr(run, "jinja_pass_arg") else 0  # the context or environment that Jinja passes first

        @wraps(run)  # keeps Jinja's mark for that argument
        def counting(*arguments: Any, **options: Any) -> Any:
            passed, operands = arguments[:skipped], list(arguments[skipped:])
            if operands and name == "join" and not isinstance(operands[0], str | list | tuple):
                operands[0] = list(operands[0])  # count the texts of a generator while it yields them
            if operands and not isinstance(operands[0], str) and name in _WRITING:
                self.budget.size(operands[0])
            self.budget.check_call(name, operands[0] if operands else None, [*operands[1:], *options.values()])
            return self.budget.made(run(*passed, *operands, **options))

        return counting

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """JSON without HTML escapes, as in transformers."""
        budget = self.budget
        budget.size(x)
        budget.check_call("tojson", None, [indent])
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return str(budget.made(encoder.encode(x)))
        return "".join(budget.made(piece) for piece in encoder.iterencode(x))


# Filters that convert their first argument to text.
_WRITING = {
    "capitalize", "center", "e", "escape", "format", "indent", "join", "lower", "replace", "safe", "string", "title",
    "trim", "truncate", "upper", "urlencode", "wordcount",
}  # fmt: skip


@pass_context
def _written(context: Context, value: Any) -> Any:
    """Charges the output of {{ .. }}."""
    budget = context.environment.budget  # type: ignore[attr-defined]
    budget.charge(len(value) if isinstance(value, str) else budget.size(value))
    return value


def _markup_join(parts: tuple[Any, ...]) -> str:
    from jinja2.runtime import markup_join

    return str(markup_join(parts))


def _fixed_characters(body: Sequence[nodes.Node]) -> int:
    """An upper bound of the fixed template text that one pass through `body` writes."""
    texts = [text for part in body for text in (part, *part.find_all(nodes.TemplateData))]
    return sum(len(text.data) for text in texts if isinstance(text, nodes.TemplateData))


def _raise_exception(message: object) -> None:
    raise _RaisedError(shortened(str(message)))


def _numbers_alone(run: Callable[..., Any]) -> Callable[..., Any]:
    """Restricts the filter `sum` to numbers: adding n lists copies each partial sum, n^2 items."""

    @wraps(run)
    def add(*arguments: Any, **options: Any) -> Any:
        if any(isinstance(value, list | tuple | str) for value in [*arguments[2:], *options.values()][-1:]):
            raise LimitError("it adds up other values than numbers")
        return run(*arguments, **options)

    return add


_ENVIRONMENT = _Environment()
