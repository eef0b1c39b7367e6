import datetime as dt
import enum
import uuid
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, field_validator

from autoflow_worker.errors import PayloadError
from autoflow_worker.tasks import payload as payloads
from autoflow_worker.tasks.payload import has_field, payload_adapter


class Colour(enum.Enum):
    RED = "red"


class Item(BaseModel):
    price: float


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: str
    items: list[Item] = []
    colour: Colour = Colour.RED

    @field_validator("email")
    @classmethod
    def has_an_at(cls, value: str) -> str:
        if "@" not in value:
            raise ValueError("needs an @")
        return value


def fault(kind: Any, data: object) -> str:
    with pytest.raises(PayloadError) as caught:
        payloads.parse(payloads.payload_adapter(kind), data)
    return str(caught.value)


def test_the_message_names_each_field_and_what_is_wrong() -> None:
    message = fault(Order, {"items": [{"price": 1}, {"price": "dear"}], "colour": "blue", "x": 1})
    assert message.startswith("payload does not validate: ")
    assert "email: Field required" in message
    assert "items.1.price: Input should be a valid number" in message
    assert "colour: Input should be 'red'" in message
    assert "x: Extra inputs are not permitted" in message
    assert fault(Order, {"email": "x"}).endswith("email: needs an @")


def test_the_message_does_not_show_the_values() -> None:
    data = {"email": "user:S3cr3t", "items": [{"price": "S3cr3t"}], "colour": "S3cr3t"}
    assert "S3cr3t" not in fault(Order, data)


def test_the_message_is_short_whatever_the_payload() -> None:
    many = {"items": [{"price": "x"}] * 1000}
    assert fault(Order, many).endswith(f"and {1001 - payloads.MAX_FAULTS} more")
    huge = {"items": [{"price": "x"}] * 10_000}
    assert fault(Order, huge) == "payload does not validate: 10001 faults in Order"
    odd = {"k" * 10_000_000: 1, "\x1b[31m\n": 2, "\ud800": 3}
    message = fault(Order, odd)
    assert len(message) < payloads.MAX_MESSAGE_LENGTH + 200
    assert message.isprintable()


def test_strict_models_read_json() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)

        when: dt.datetime
        id: uuid.UUID
        colour: Colour
        pair: tuple[int, int]

    data = {
        "when": "2026-01-02T03:04:05Z",
        "id": "12345678-1234-5678-1234-567812345678",
        "colour": "red",
        "pair": [1, 2],
    }
    parsed = payloads.parse(payloads.payload_adapter(Strict), data)
    assert parsed.pair == (1, 2)
    assert parsed.when.tzinfo is not None
    assert "pair" in fault(Strict, data | {"pair": ["1", 2]})


@pytest.mark.parametrize("kind", [Any, Order])
@pytest.mark.parametrize(
    ("data", "name"),
    [([], "an array"), ("x", "a string"), (None, "null"), (True, "a boolean"), (1.5, "a number")],
)
def test_only_objects_are_payloads(kind: Any, data: object, name: str) -> None:
    message = fault(kind, data)
    assert message == f"payload does not validate: a JSON object is needed, not {name}"


def _broken(value: object) -> object:
    raise RuntimeError("S3cr3t")


def test_a_validator_that_raises_anything_else() -> None:
    message = fault(dict[str, Annotated[int, BeforeValidator(_broken)]], {"a": 1})
    assert message == "payload does not validate: its validation raised RuntimeError"


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_validator_that_ends_the_process(raised: BaseException) -> None:
    def validator(value: object) -> object:
        raise raised

    adapter = TypeAdapter(Annotated[object, BeforeValidator(validator)])
    with pytest.raises(PayloadError, match=f"its validation raised {type(raised).__name__}"):
        payloads.parse(adapter, {})


def test_data_that_json_can_not_carry_keeps_the_first_fault() -> None:
    assert "a: " in fault(dict[str, bool], {"a": 10**400})
    assert "a: " in fault(dict[str, int], {"a": "\ud800"})


def test_integers_beyond_64_bits_are_json_too() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)

        when: dt.datetime
        huge: int

    data = {"when": "2026-01-02T03:04:05Z", "huge": 2**70}
    assert payloads.parse(payloads.payload_adapter(Strict), data).huge == 2**70


def test_what_needs_no_validation() -> None:
    for kind in (Any, object, dict, dict[str, Any], dict[str, object]):
        assert payloads.payload_adapter(kind) is None
    adapter = TypeAdapter(Annotated[dict[str, int], Field(max_length=1)])
    assert payloads.payload_adapter(adapter) is adapter


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["email", "items", "colour", "x"]), _json))
def test_any_object_parses_or_is_refused(data: dict[str, Any]) -> None:
    parsed: object
    try:
        parsed = payloads.parse(payloads.payload_adapter(Order), data)
    except PayloadError as error:
        parsed = error
    if isinstance(parsed, PayloadError):
        assert len(str(parsed)) < payloads.MAX_MESSAGE_LENGTH + 200
    else:
        assert isinstance(parsed, Order)


class Named(BaseModel):
    correlationId: str  # noqa: N815 - the field's name in a job


class Aliased(BaseModel):
    of: str = Field(alias="correlationId")


class Nested(BaseModel):
    inner: Named


class Loop(BaseModel):
    loops: "list[Loop]" = []


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Named, True),
        (Aliased, True),
        (Named | Nested, True),
        (Nested, False),
        (Loop, False),
        (dict[str, int], False),
        (Any, False),
    ],
)
def test_whether_a_type_names_a_field(annotation: Any, expected: bool) -> None:
    assert has_field(payload_adapter(annotation), "correlationId") is expected
