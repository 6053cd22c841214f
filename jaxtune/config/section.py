"""What sections of the configuration are made of: a strict base class, numbers with bounds, the mark of traced ones."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined

from jaxtune.files import user_path
from jaxtune.remote_paths import local_path


class Role:
    """A mark on a key, or on a section and so on all of its keys: what depends on its value, and when it may change.

    What depends on it is said of every key by the innermost of ``Compiled``, ``Traced``, ``LoopOnly``, ``Shared`` and
    ``HostOnly``; the other marks are said beside these. Whoever needs the keys of a role asks
    :mod:`jaxtune.config.roles`.
    """


class Compiled(Role):
    """Training steps are compiled for its value."""


class LoopOnly(Role):
    """What runs around the compiled step reads it: it decides results, and no program."""


class Shared(Role):
    """It decides programs, and is one for all of a process, which are not told apart by it."""


class HostOnly(Role):
    """It says where a run lies, what is shown and kept of it or which trials there are: it decides no training."""


class Free(Role):
    """It may be another one each time that a run or a study goes on."""


class Relocatable(Role):
    """It says where a run lies, which is another place where it was moved: two runs that differ in it are alike."""


class PerTrial(Role):
    """The trials of a study can differ in it."""


class BesideAdapter(Role):
    """Of a rule: it is not settled by the adapter that training starts from."""


class Recorded(Role):
    """Of a search: it decides the trials, and the journal's first record has it as it stands."""


@dataclasses.dataclass(frozen=True)
class Amendable(Role):
    """Of a search: it may change after the start, as what is scored already stays comparable.

    Attributes:
      option: of ``jaxtune study extend``, where it is not given as ``key=value``.
    """

    option: str | None = None


@dataclasses.dataclass(frozen=True)
class Traced(Role):
    """Marks a number that the compiled training step takes as an argument, so that changing it does not recompile.

    Attributes:
      capacity: the number also bounds an array's shape (a rank). Programs are compiled for the largest value in use and
        smaller ones are reached by a mask.
    """

    capacity: bool = False


@dataclasses.dataclass(frozen=True)
class Later(Role):
    """Of a key that came after programs had names: where it says what held before it, it is no part of their names.

    Attributes:
      before: the value that stands for how it was without the key.
    """

    before: Any


@dataclasses.dataclass(frozen=True)
class Sections:
    """Marks a type whose values are each of one of several sections, which are known by name and not by the type.

    Attributes:
      of: gives the sections.
    """

    of: Callable[[], Sequence[type[BaseModel]]]


Value = TypeVar("Value")
Given = TypeVar("Given")

if TYPE_CHECKING:

    class Parsed(Generic[Value, Given]):
        """A field that is a ``Value`` and is also made from a ``Given``, as YAML has it.

        Type checkers know fields that are descriptors: what ``Section(field=…)`` takes and what ``section.field`` is.
        pydantic sees the ``Value`` alone.
        """

        @typing.overload
        def __get__(self, instance: None, owner: type) -> Any: ...
        @typing.overload
        def __get__(self, instance: object, owner: type) -> Value: ...
        def __get__(self, instance: object | None, owner: type) -> Any: ...
        def __set__(self, instance: object, value: Value | Given) -> None: ...

else:

    class Parsed:
        """A field that is of the first type and is also made from the second."""

        def __class_getitem__(cls, types: tuple[Any, Any]) -> Any:
            return types[0]


def parsed(description: str, **options: Any) -> Any:
    """``Field`` for a :class:`Parsed` one with a default, whose type is not that of the descriptor."""
    return Field(description=description, **options)


def default_text(field: FieldInfo) -> str:
    """A field's default as YAML has it: ``required``, empty where it is unset, ``see below`` for a section or list."""
    if field.is_required():
        return "required"
    if field.default is None:
        return ""
    if field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return "see below"
    text = str(field.default).lower() if isinstance(field.default, bool) else repr(field.default)
    return text.replace("'", "")


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, numbers are finite and instances are immutable."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Says in the docstring, for ``help`` and notebooks, what the schema says of every key."""
        super().__pydantic_init_subclass__(**options)
        lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:"]
        for name, field in cls.model_fields.items():
            default = default_text(field).replace("see below", "its own defaults")
            note = "" if not default else " Required." if default == "required" else f" Default: {default}."
            lines.append(f"  {name}: {field.description}{note}")
        cls.__doc__ = "\n".join(lines)

    @classmethod
    def choices(cls) -> list[type[Section]]:
        """The sections that can stand where this one is asked for: itself, if they are not told apart by a name."""
        return [cls]

    @model_validator(mode="before")
    @classmethod
    def _no_switch_as_number(cls, values: Any) -> Any:
        """``true`` is no number, though Python counts with it."""
        given = values if isinstance(values, dict) else {}
        wrong = [
            InitErrorDetails(type=PydanticCustomError("number", "Input should be a number"), loc=(name,), input=value)
            for name, value in given.items()
            if isinstance(value, bool)
            and name in cls.model_fields
            and _takes_numbers(cls.model_fields[name].annotation)
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values


def located(location: tuple[str, ...], value: Any, message: str) -> ValidationError:
    """The error of a key below the section whose validator raises it, so that its line or override is named."""
    error = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        ".".join(location), [InitErrorDetails(type=error, loc=location, input=value)]
    )


def _takes_numbers(annotation: Any) -> bool:
    """Whether numbers, and no switch, are among the alternatives of a type."""
    parts = typing.get_args(annotation) or (annotation,)
    return bool not in parts and any(
        part in (int, float) or (typing.get_origin(part) is Annotated and _takes_numbers(part)) for part in parts
    )


# Steps and rows are counted in 32-bit integers on the device, and seeds are 32-bit words.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
UserPath = Annotated[str, AfterValidator(user_path)]
"""A path on the machine of whoever gave it: ``~`` is expanded when it is read, once and for all."""
LocalPath = Annotated[str, AfterValidator(local_path)]
"""A path or a name, kept as it stands; of what is nowhere on this machine, only names without ``://`` are known."""
