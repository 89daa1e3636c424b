"""YAML and overrides in, settings out: what is accepted, and that nothing but ConfigurationError ever gets out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from edgecompress.errors import ConfigurationError
from edgecompress.settings.configuration import ClosedFraction, Fraction, FrozenSettings, apply_overrides, validate
from edgecompress.settings.recipe import Recipe
from edgecompress.settings.spelling import did_you_mean, nearest
from edgecompress.settings.target import Target
from edgecompress.settings.yaml_files import parse_yaml, read_yaml_mapping

FILE = {
    "name": "mine",
    "seed": 0,
    "data": {"name": "digits"},
    "model": {"name": "resnet8"},
    "stages": [
        {"id": "dense", "kind": "train", "epochs": 2},
        {"id": "pruned", "kind": "prune", "channel_ratio": 0.4, "teacher": {"stage": "dense"}},
        {"id": "int8", "kind": "quantize"},
    ],
}


class Inner(FrozenSettings):
    kind: Literal["inner"] = "inner"
    share: Fraction = 0.5
    whole: ClosedFraction = 1.0


class Outer(FrozenSettings):
    items: tuple[Inner, ...] = Field(default=(), min_length=1)
    name: str = "x"


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-2.5e+2", -250.0),
        ("1_000", 1000),
        ("0.5", 0.5),
        (".5", 0.5),
        ("", None),
        ("1e", "1e"),
        ("e3", "e3"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_values_parse_as_people_write_them(text: str, value: object) -> None:
    assert parse_yaml(text, source="x") == value
    assert type(parse_yaml(text, source="x")) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: a", "line 1: the key 1 is not text"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: the key 'c' stands twice"),
        ("? [a]\n: 1", "line 1: the key ['a'] is not text"),
        ("<<: {a: 1}", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document"),
        ("a: \t- b: [", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!map x", "line 1: expected a mapping"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("\x00", "not valid YAML"),
        ("[" * 1_000, "nested too deeply"),
        ("a: [" + "1," * 20_001 + "]", "the file holds over 20000 nodes"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_yaml(text, source="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: not valid YAML: ")
    assert message in str(caught.value)


def test_tags_that_make_python_objects_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"):
        with pytest.raises(ConfigurationError, match="could not determine a constructor"):
            parse_yaml(f"!!python/{tag} ['touch {marker}']", source="x")
    assert not marker.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nope.yaml: cannot be read: No such file or directory$"):
        read_yaml_mapping(tmp_path / "nope.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigurationError, match="larger than 1000000 bytes"):
        read_yaml_mapping(tmp_path / "large.yaml")
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfname: x\r\nseed: 1\r\n")
    assert read_yaml_mapping(tmp_path / "mark.yaml") == {"name": "x", "seed": 1}


# ---- overrides


def test_overrides_reach_into_lists_by_id_and_index() -> None:
    before = copy.deepcopy(FILE)
    changed = apply_overrides(
        FILE, ["stages.pruned.channel_ratio=0.3", "stages.-1.effort=fast", "stages.0.epochs=7", "gates.max_samples=10"]
    )
    assert changed["stages"][1] == before["stages"][1] | {"channel_ratio": 0.3}  # type: ignore[index]
    assert changed["stages"][2]["effort"] == "fast"
    assert changed["stages"][0]["epochs"] == 7
    assert changed["gates"] == {"max_samples": 10}
    assert before == FILE, "the document given is not changed"


def test_later_overrides_win_and_values_are_yaml() -> None:
    changed = apply_overrides(FILE, ["seed=1", "seed=2", "model.arguments={width: 8}", "data.root=", "description=a=b"])
    assert changed["seed"] == 2
    assert changed["model"]["arguments"] == {"width": 8}
    assert changed["data"]["root"] is None
    assert changed["description"] == "a=b"


def test_an_id_goes_before_an_index() -> None:
    document = {"stages": [{"id": "1"}, {"id": "0"}]}
    assert apply_overrides(document, ["stages.0.epochs=3"])["stages"] == [{"id": "1"}, {"id": "0", "epochs": 3}]


def test_whole_elements_can_be_replaced() -> None:
    changed = apply_overrides(FILE, ["stages.int8={id: last, kind: quantize}"])
    assert changed["stages"][2] == {"id": "last", "kind": "quantize"}


@pytest.mark.parametrize("index", ["3", "-4", "--1", "\N{SUPERSCRIPT TWO}", "9" * 5_000])
def test_indices_that_are_none(index: str) -> None:
    with pytest.raises(ConfigurationError, match="the list has no element"):
        apply_overrides(FILE, [f"stages.{index}=x"])


# ---- validation


def test_settings_are_frozen_and_finite() -> None:
    inner = validate(Inner, {}, source="x")
    with pytest.raises(ValueError, match="frozen"):
        inner.share = 0.1  # type: ignore[misc]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="share"):
            validate(Inner, {"share": value}, source="x")


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("share", 40, "; did you mean 0.4?"),
        ("share", 1, ""),
        ("share", 0, ""),
        ("share", -40, ""),
        ("share", 100, ""),
        ("whole", 2, "; did you mean 0.02?"),
        ("whole", 100, "; did you mean 1?"),
        ("whole", 101, ""),
    ],
)
def test_percentages_get_a_hint(key: str, value: float, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Inner, {key: value}, source="x")
    kind = "between 0 and 1" if key == "share" else "from 0 to 1"
    assert str(caught.value) == f"x: {key}: {value} is not a fraction {kind}{hint}"


def test_a_fault_inside_a_list_does_not_make_the_list_too_short() -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Outer, {"items": [{"share": 40}]}, source="x")
    assert str(caught.value) == "x: items.0.share: 40 is not a fraction between 0 and 1; did you mean 0.4?"
    with pytest.raises(ConfigurationError, match="items: Tuple should have at least 1 item"):
        validate(Outer, {"items": []}, source="x")
    with pytest.raises(ConfigurationError) as caught:
        validate(Outer, {"items": [], "nam": 1}, source="x")
    assert len(str(caught.value).splitlines()) == 2


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Recipe, FILE | {"seed": "x" * 10_000, "precision": "y" * 10_000}, source="x")
    assert len(str(caught.value)) < 400


def test_nearest_spelling() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == "epochs"
    assert nearest("zzz", ["epochs", "seed"]) is None
    assert did_you_mean("epoch", ["seed", "epochs"]) == "; did you mean 'epochs'?"
    assert did_you_mean("zzz", ["seed", "epochs"]) == "; known: epochs, seed"
    assert did_you_mean("zzz", []) == ""


# ---- properties: whatever is given, either a result or a ConfigurationError


def refusal(action: Callable[[], object]) -> str:
    """The message of the ConfigurationError that `action` raised, or nothing; any other exception fails the test."""
    try:
        action()
    except ConfigurationError as error:
        return str(error)
    return ""


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    message = refusal(lambda: parse_yaml(text, source="x"))
    assert message == "" or message.startswith("x: not valid YAML: ")


SAFE_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is built in
_YAML_TAGS = (
    "int",
    "float",
    "bool",
    "null",
    "str",
    "map",
    "seq",
    "set",
    "omap",
    "pairs",
    "binary",
    "timestamp",
    "python/name:os",
)
_YAML_WORDS = st.sampled_from(
    [
        "a",
        "b: ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "\n",
        "  ",
        "&x ",
        "*x",
        "<<: ",
        "? ",
        ": ",
        "'",
        '"',
        "|\n",
        "#",
        "---\n",
    ]
    + [
        "0x",
        "0b",
        "1:2",
        "1e3",
        ".inf",
        "~",
        "2001-01-01",
        "=",
        "!",
        "%",
        "\t",
        "\x85",
        *(f"!!{tag} " for tag in _YAML_TAGS),
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(_YAML_WORDS, max_size=12).map("".join))
def test_any_mixture_of_yaml_parses_or_is_refused(text: str) -> None:
    message = refusal(lambda: parse_yaml(text, source="x"))
    assert message == "" or message.startswith("x: not valid YAML: ")
    if message == "" and "1e3" not in text:  # stricter than PyYAML, not different
        assert parse_yaml(text, source="x") == yaml.load(text, Loader=SAFE_LOADER)


_KEYS = st.sampled_from(
    ["name", "seed", "data", "stages", "dense", "pruned", "int8", "teacher", "epochs", "0", "-1", "9", ""]
)
_OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(
        lambda keys, separator, value: ".".join(keys) + separator + value,
        st.lists(_KEYS, max_size=4),
        st.sampled_from(["=", "=", "=", "", ".="]),
        st.sampled_from(["1", "0.5", "[1]", "{a: 1}", "", "x", "*x", "[1", "~", "{id: []}", "{kind: {}}"]),
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(_OVERRIDES, max_size=4))
def test_any_overrides_give_a_recipe_or_are_refused(overrides: list[str]) -> None:
    before = copy.deepcopy(FILE)
    message = refusal(lambda: validate(Recipe, apply_overrides(FILE, overrides), source="x"))
    assert message.startswith(("x: ", "--set ")) or message == ""
    assert before == FILE


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates())
_NAMES = [
    *Recipe.model_fields,
    *Target.model_fields,
    "id",
    "kind",
    "teacher",
    "stage",
    "epochs",
    "channel_ratio",
    "other",
]
_WORDS = st.sampled_from(["train", "prune", "distill", "quantize", "dense", "digits", "x86_64", *_NAMES])
_DOCUMENTS = st.recursive(
    _SCALARS | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(_NAMES), _DOCUMENTS, max_size=6), st.sampled_from([Recipe, Target]), st.booleans()
)
def test_any_document_is_valid_or_every_fault_has_a_place(
    document: dict[str, Any], model: type[FrozenSettings], complete: bool
) -> None:
    if complete:
        document = FILE | {"description": ""} | document
    message = refusal(lambda: validate(model, document, source="x"))
    assert all(line.startswith("x: ") for line in message.splitlines())
