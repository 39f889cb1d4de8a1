"""What an answer has to look like, over HTTP: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.validation import check_text, json_text
from engine.request import Grammar, RequestRejected

Schema = dict[str, Any] | bool
NonEmpty = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Fields in the types that they say. Unknown ones are passed over, where the whole body does not refuse them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class RequestBody(Strict):
    """A whole body: all of its strings are text."""

    @model_validator(mode="before")
    @classmethod
    def _before(cls, data: object) -> object:
        check_text(data, "the body")
        return cls._prepare(data)

    @classmethod
    def _prepare(cls, data: object) -> object:
        """What is done with the body's fields before they are validated. Raises RequestRejected."""
        return data


class JsonSchema(Strict):
    # `name`, `description` and `strict` change nothing here: a schema is always kept to.
    schema_: Schema = Field(alias="schema")


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise RequestRejected("response_format needs a json_schema", field="response_format")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "json_object":
            return Grammar("json_object", "")
        if self.type == "json_schema":
            assert self.json_schema is not None
            return Grammar("json_schema", json_text(self.json_schema.schema_))
        return None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs` (which took the place of its `guided_…` fields): exactly one of these."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    json_: NonEmpty | Schema | None = Field(None, alias="json")  # a JSON Schema, or its text
    json_object: Literal[True] | None = None
    regex: NonEmpty | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar_: NonEmpty | None = Field(None, alias="grammar")  # Lark

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(value is not None for value in self._asked().values()) != 1:
            raise RequestRejected(
                f"structured_outputs must have exactly one of {', '.join(self._asked())}", field="structured_outputs"
            )
        return self

    def _asked(self) -> Mapping[str, object]:
        return {
            "json": self.json_,
            "json_object": self.json_object,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar_,
        }

    def grammar(self) -> Grammar:
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json_text(self.choice))
        if self.grammar_ is not None:
            return Grammar("lark", self.grammar_)
        if self.json_ is not None:
            return Grammar("json_schema", self.json_ if isinstance(self.json_, str) else json_text(self.json_))
        return Grammar("json_object", "")
