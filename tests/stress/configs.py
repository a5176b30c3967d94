"""Configurations of every kind: refused in one line that names the file, or read as intended.

Each is read by the loader and by `polyseg config show`. An accepted file must round-trip through
the printed YAML; for most kinds it is known whether they must be accepted.
"""

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from polyseg.config import Config, build_config, load_config, settings_of, template
from polyseg.system.yaml import parse_yaml
from tests.children import answer_of, faults_in_child, faults_of_reading, refusal_of
from tests.hostile import DAMAGE, Random

SCHEMA = Config.model_json_schema()
KEYS = [str(setting["key"]) for setting in settings_of()]


class Trial(NamedTuple):
    """Content of a file, and the expected result."""

    content: bytes
    accepted: bool | None = None
    """Whether the file must be accepted; None if either is right."""
    values: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Expected settings if it is accepted."""


def check(count: int, seed: int) -> list[str]:
    """Read `count` configurations; return the faults of each."""
    generator = random.Random(f"configs {seed}")
    failures: list[str] = []
    accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            make = KINDS[k % len(KINDS)]
            path = Path(folder) / f"{k}.yaml"
            trial = make(generator)
            _written(path, trial, generator)
            faults = faults_in_child(lambda path=path, trial=trial: _faults(path, trial))
            accepted += "accepted" in faults
            name = f"configs, seed {seed}, file {k} ({make.__name__})"
            failures += [f"{name}: {one}" for one in faults if one != "accepted"]
    refused = count - accepted
    print(
        f"configs: {count} files of seed {seed}, {accepted} accepted, {refused} refused, "
        f"{len(failures)} failures",
        flush=True,
    )
    return failures


def _written(path: Path, trial: Trial, generator: Random) -> None:
    if trial.content != b"no file":
        path.write_bytes(trial.content)
        return
    kind = generator.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == 2 else "/dev/zero")


def _faults(path: Path, trial: Trial) -> list[str]:
    """Return the faults, and the word "accepted" if the file was accepted."""
    accepted = []

    def loaded(path: Path) -> Config:
        return load_config(path)

    def shown(path: Path) -> Config:
        answer = answer_of("config", "show", path)
        if answer.code != 0:
            raise refusal_of(answer)
        return build_config(parse_yaml(answer.out, "shown"), "shown")

    def good(config: Config) -> bool:
        accepted.append(config)
        same = build_config(parse_yaml(config.to_yaml(), "again"), "again") == config
        values = _flat(config.model_dump())
        meant = all(_alike(values[key], value) for key, value in trial.values.items())
        return same and meant and trial.accepted is not False

    found = [fault for read in (loaded, shown) for fault in faults_of_reading(path, read, good)]
    if trial.accepted and not accepted:
        found.append("was refused")
    if len(accepted) == 1 or accepted[1:] != accepted[:-1]:
        found.append("is taken differently by the loader and the command")
    return [*found, "accepted"] if accepted else found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat[prefix + name] = value
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _alike(value: Any, drawn: Any) -> bool:
    """Return whether a setting equals the drawn value; a list becomes a tuple."""
    if isinstance(drawn, list):
        return len(value) == len(drawn) and all(map(_alike, value, drawn))
    return bool(value == drawn) and isinstance(value, bool) == isinstance(drawn, bool)


# Values drawn from the JSON Schema, which pydantic writes independently of the loader.


def _schema_of(key: str) -> dict[str, Any]:
    schema = SCHEMA
    for name in key.split("."):
        schema = schema["properties"][name]
        if "$ref" in schema:
            schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _drawn(schema: dict[str, Any], generator: Random) -> Any:
    """Return a value within the bounds of a schema."""
    if "anyOf" in schema:
        return _drawn(generator.choice(schema["anyOf"]), generator)
    if "const" in schema or "enum" in schema:
        return generator.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems") or [schema["items"]] * generator.randint(1, 3)
        return [_drawn(item, generator) for item in items]
    if kind == "object":
        return {f"name{i}": generator.randint(1, 9) for i in range(generator.randint(0, 2))}
    if kind in ("integer", "number"):
        low, high = _bounds(schema)
        if kind == "integer":
            return generator.randint(int(low), int(min(high, 2**31)))
        return generator.choice([low, high, generator.uniform(low, high)])
    words = [
        "a",
        "no",
        "ß ü",
        "017",
        "1e-3",
        "a: b # c",
        "'",
        '"',
        "~",
        "",
        "*",
        "&a",
        "日本",
        "\\",
    ]
    return {"boolean": generator.random() < 0.5, "null": None}.get(kind, generator.choice(words))


def _bounds(schema: dict[str, Any]) -> tuple[float, float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1e6))
    return low, schema.get("maximum", schema.get("exclusiveMaximum", low + 1e6))


def _numbers(*kinds: str) -> list[str]:
    return [key for key in KEYS if _schema_of(key).get("type") in (kinds or ("integer", "number"))]


def _yaml(values: dict[str, Any]) -> bytes:
    """Return a file of these settings, written by PyYAML."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return yaml.safe_dump(tree, allow_unicode=True).encode()


def _line(key: str, value: str) -> bytes:
    """Return a file of one setting with its value written verbatim."""
    sections = key.split(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(sections)]
    return ("\n".join(lines) + f" {value}\n").encode()


# Kinds.


def within_bounds(generator: Random) -> Trial:
    keys = generator.sample(KEYS, generator.randint(1, 6))
    values = {key: _drawn(_schema_of(key), generator) for key in keys}
    return Trial(_yaml(values), None, values)


def all_defaults(generator: Random) -> Trial:
    """Return the template, or some of its lines."""
    text = template()
    if generator.random() < 0.5:
        lines = text.splitlines()
        text = "\n".join(line for line in lines if not line.strip().startswith("#"))
    return Trial(text.encode(), True)


def one_number(generator: Random) -> Trial:
    key = generator.choice(_numbers())
    value = _drawn(_schema_of(key), generator)
    return Trial(_yaml({key: value}), None, {key: value})


def beyond_bounds(generator: Random) -> Trial:
    key = generator.choice([key for key in _numbers() if "maximum" in _schema_of(key)])
    schema = _schema_of(key)
    low, high = _bounds(schema)
    beyond = generator.choice([high + 1, high * 1e6 + 1, low - 1, -1e30])
    value = int(beyond) if schema["type"] == "integer" and abs(beyond) < 1e9 else beyond
    return Trial(_yaml({key: value}), False)


def huge_number(generator: Random) -> Trial:
    value = generator.choice(
        [
            "1e400",
            "-1e999",
            ".inf",
            "-.Inf",
            ".nan",
            ".NaN",
            "9" * 400,
            "9" * 6000,
            "0x" + "f" * 99,
            "1" + ":59" * 900,
            "1e" + "9" * 400,
            "-" + "9" * 30,
        ]
    )
    return Trial(_line(generator.choice(_numbers()), value), False)


def number_that_is_none(generator: Random) -> Trial:
    value = generator.choice(
        [
            "true",
            "False",
            "yes",
            "on",
            "1_0",
            "0o17",
            "017",
            "0x1f",
            "0b11",
            "1:30",
            "2026-01-01",
            "2026-01-01 10:00:00",
            "'3'",
            '"1"',
            "[1]",
            "{a: 1}",
            "1,5",
            "½",
            "१२",
            "1 2",
            "+-1",
            "1.2.3",
            "0.5e",
            "nan",
            "inf",
            "Infinity",
            "1e3x",
            "--1",
            "!!int 1",
            "null",
            "~",
            "",
        ]
    )
    return Trial(_line(generator.choice(_numbers()), value), False)


def truth_that_is_none(generator: Random) -> Trial:
    value = generator.choice(["yes", "no", "on", "off", "1", "0", "y", "'true'", "tRue", "[true]"])
    return Trial(_line(generator.choice(_numbers("boolean")), value), False)


def misspelt_key(generator: Random) -> Trial:
    key = generator.choice(KEYS)
    at = generator.randrange(len(key))
    wrong = generator.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key.upper(),
            f"{key}.more",
            f"more.{key}",
            f" {key}",
            f"{key}\u200b",
            key.replace("e", "е"),
        ]
    )
    wrong = wrong if wrong not in (key, "") else "another"
    return Trial(_yaml({wrong: 1}), None if wrong in KEYS else False)


def key_that_is_no_text(generator: Random) -> Trial:
    key = generator.choice(["1", "1.5", "true", "null", "[a]", "{a: 1}", "? [a, b]\n", "~", "''"])
    return Trial(f"{key}: {{a: 1}}\n".encode(), False)


def doubled_key(generator: Random) -> Trial:
    key = generator.choice(KEYS)
    line = _line(key, "1").decode()
    if generator.random() < 0.5:
        return Trial((line * 2).encode(), False)
    *_, last = line.rstrip("\n").split("\n")
    return Trial(f"{line}{last}\n".encode(), False)


def tagged(generator: Random) -> Trial:
    tag = generator.choice(
        [
            "!!python/object/apply:os.system ['true']",
            "!!python/name:os.system",
            "!!binary gIE=",
            "!!python/object/new:type [a]",
            "!!timestamp 2026-01-01",
            "!!set {a}",
            "!!float 1",
            "!!int '10'",
            "!own 1",
            "!<tag:yaml.org,2002:str> a",
            "!!omap [a: 1]",
            "!!bool 'true'",
        ]
    )
    return Trial(_line(generator.choice(KEYS), tag), False)


def anchored(generator: Random) -> Trial:
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    texts = [bomb, "a: &a\n  b: *a\n", "loss: &x {name: dice}\ndata: *x\n", "data: *nothing\n"]
    texts += ["loss:\n  <<: {name: dice}\n", "x: &x {name: dice}\nloss:\n  <<: *x\n"]
    return Trial(generator.choice(texts).encode(), False)


def nested(generator: Random) -> Trial:
    depth = generator.choice([31, 500, 5000, 24_000])
    text = generator.choice(
        ["[" * depth + "]" * depth, "{a: " * (depth // 3), "- " * depth, "[" * depth]
    )
    return Trial(_line("network.kwargs", f"{{a: {text}}}"), False)


def control_character(generator: Random) -> Trial:
    key = generator.choice(
        ["data.path", "data.cache", "output.path", "control.replay", "data.images"]
    )
    sign = generator.choice(["\0", "\x01", "\x1b", "\x7f", "\x9b", "\x08", "\ud800", "\n", "\r"])
    if generator.random() < 0.5:
        return Trial(_line(key, f'"a{ascii(sign)[1:-1]}b"'), False)
    if sign in "\n\r":
        return Trial(_line(key, f"|\n    a{sign}    b\n"), False)
    return Trial(f"data:\n  path: a{sign}b\n".encode("utf-8", "surrogatepass"), False)


def other_encoding(generator: Random) -> Trial:
    text = "loss:\n  name: dice\ndata:\n  path: ß\n"
    encoding = generator.choice(["utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig"])
    values = {"loss.name": "dice", "data.path": "ß"}
    return Trial(text.encode(encoding), encoding == "utf-8-sig", values)


def long_text(generator: Random) -> Trial:
    length = generator.choice([300, 5000, 40_000, 60_000, 3_000_000])
    key = generator.choice(["data.path", "data.cache", "loss.name", "data.group", "network.name"])
    fits = length < 50_000 and key not in ("loss.name", "data.group")
    return Trial(_line(key, generator.choice("ax") * length), fits if length != 300 else None)


def other_root(generator: Random) -> Trial:
    empty = ["", "\n\n", "# nothing\n", "---\n", "null\n", "{}\n", "~", "\ufeff"]
    wrong = [
        "[]",
        "0",
        "false",
        "''",
        "words",
        "- a\n- b\n",
        "--- 1\n--- 2\n",
        "a\n---\nb",
        "@",
        "`",
    ]
    if generator.random() < 0.5:
        return Trial(generator.choice(empty).encode(), True)
    return Trial(generator.choice(wrong).encode(), False)


def damaged(generator: Random) -> Trial:
    content = _yaml({key: _drawn(_schema_of(key), generator) for key in generator.sample(KEYS, 9)})
    if generator.random() < 0.3:
        content = template().encode()
    return Trial(generator.choice(DAMAGE)(generator, content))


def noise(generator: Random) -> Trial:
    signs = generator.choice(["[]{},:-?&*!|>'\"%@` \n\tab1", "\t \n:-", "data:loss.name \n-"])
    return Trial("".join(generator.choices(signs, k=generator.randint(1, 300))).encode())


def bytes_of_noise(generator: Random) -> Trial:
    return Trial(generator.randbytes(generator.randint(1, 300)))


def no_file(_: Random) -> Trial:
    return Trial(b"no file", False)


def absurd_network(generator: Random) -> Trial:
    value = generator.choice(
        [
            "{channels: [1000000]}",
            "{channels: [4, 8], strides: [99999]}",
            "{a: 1e300}",
            "{channels: [" + "4, " * 17 + "]}",
            "{a: .nan}",
            "{a: {b: [[[1e9]]]}}",
            "{a: {1: 2}}",
        ]
    )
    return Trial(_line("network.kwargs", value), False)


def pattern(generator: Random) -> Trial:
    value = generator.choice(["'('", "'[z-a]'", "'(?P<a>'", "'*'", "'a{99999999999999999999}'"])
    return Trial(_line("data.group", value), False)


KINDS: list[Callable[[Random], Trial]] = [
    within_bounds,
    all_defaults,
    one_number,
    beyond_bounds,
    huge_number,
    number_that_is_none,
    truth_that_is_none,
    misspelt_key,
    key_that_is_no_text,
    doubled_key,
    tagged,
    anchored,
    nested,
    control_character,
    other_encoding,
    long_text,
    other_root,
    damaged,
    noise,
    bytes_of_noise,
    no_file,
    absurd_network,
    pattern,
]
