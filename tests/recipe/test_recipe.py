"""Recipes: what is read, where mistakes are said to be, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import Field, field_validator, model_validator

from compressor.data.sources import DemoSource
from compressor.errors import RecipeError
from compressor.method import Decision, Method, Options, Plan
from compressor.recipe.schema import Calibration, LoadedRecipe, PassSpec, Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

GOOD = """\
# comment
model: demo
calibration:
  data:
    - {demo: mix, samples: 4, length: 16}
passes:
  - prune: {keep: 6}
output: out
"""

SOURCE_KINDS = "a source says where it comes from with exactly one of the keys demo, text, jsonl, tokens, dataset, task"


class PruneOptions(Options):
    keep: int | float | None = Field(default=None, description="experts to keep, or a fraction of them")
    ratio: float | None = Field(default=None, gt=0, lt=1, description="fraction to remove")
    rounds: int = Field(default=1, ge=1, description="number of rounds")

    @field_validator("keep")
    @classmethod
    def _not_nothing(cls, keep: int | float | None) -> int | float | None:
        if keep == 0:
            raise ValueError("keep 0 leaves no expert; keep at least 2")
        return keep

    @model_validator(mode="after")
    def _one_of_two(self) -> PruneOptions:
        if self.keep is None and self.ratio is None:
            raise ValueError("give keep or ratio")
        return self


class SkipOptions(Options):
    scale: float = Field(default=1.0, description="scales the thresholds")
    seed_text: str = Field(default="", description="a text")


class PlainOptions(Options):
    """No options."""


class _FakeMethod(Method[Any]):
    version: ClassVar[str] = "1"

    def check(self, layers: Any) -> Plan:
        return Plan(layers)

    def statistic(self, layer: Any) -> None:
        return None

    def decide(self, layers: Any, statistics: Any) -> Decision:
        return {"layers": {}}

    def edit(self, layer: Any, decision: Decision) -> None:
        pass


class Prune(_FakeMethod):
    name = "prune"
    options_type = PruneOptions


class Skip(_FakeMethod):
    name = "dynamic_skipping"
    options_type = SkipOptions


class Plain(_FakeMethod):
    name = "plain"
    options_type = PlainOptions


METHODS: dict[str, type[Method[Any]]] = {"prune": Prune, "dynamic_skipping": Skip, "plain": Plain}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, **kwargs: Any) -> LoadedRecipe:
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", **{"methods": METHODS, **kwargs})


def mistakes(text: str | bytes, **kwargs: Any) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load(text, **kwargs)
    return str(error.value).split("\n")


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# What is right ---------------------------------------------------------------------------------------------


def test_reads_every_field() -> None:
    loaded = load(GOOD)
    recipe = loaded.recipe
    assert (recipe.model, recipe.dtype, recipe.device, recipe.seed) == ("demo", "auto", "cpu", 0)
    assert recipe.trust_remote_code is False
    assert recipe.evaluate is None
    assert recipe.calibration == Calibration(batch_size=8, data=(DemoSource(demo="mix", samples=4, length=16),))
    assert recipe.passes == (PassSpec(method="prune", options={"keep": 6}),)
    assert recipe.output == Path("out")
    [resolved] = loaded.passes
    assert isinstance(resolved.method, Prune)
    assert resolved.method.options == PruneOptions(keep=6)
    assert (resolved.index, resolved.spec) == (0, recipe.passes[0])
    assert resolved.path == ("passes", 0, "prune")


def test_passes_keep_their_order_and_may_repeat() -> None:
    loaded = load(
        changed("  - prune: {keep: 6}", "  - prune: {keep: 6}\n  - plain:\n  - plain: {}\n  - prune: {keep: 0.5}")
    )
    assert [p.spec.method for p in loaded.passes] == ["prune", "plain", "plain", "prune"]
    assert [p.index for p in loaded.passes] == [0, 1, 2, 3]
    assert loaded.passes[3].method.options.keep == 0.5
    assert loaded.passes[1].spec.options == {}


def test_without_methods_the_options_are_taken_as_they_are() -> None:
    loaded = load(changed("keep: 6", "anything: [1, {a: b}]"), methods=None)
    assert loaded.passes == ()
    assert loaded.recipe.passes[0].options == {"anything": [1, {"a": "b"}]}


def test_float_in_a_form_that_yaml_reads_as_text() -> None:
    loaded = load(changed("prune: {keep: 6}", "dynamic_skipping: {scale: 1e-3}"))
    assert loaded.passes[0].method.options.scale == 1e-3


def test_byte_order_mark_and_windows_line_ends() -> None:
    assert load(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()).recipe == load(GOOD).recipe


def test_anchors_are_copied_and_can_be_overridden_one_by_one() -> None:
    text = GOOD + "evaluate:\n  perplexity:\n    - &one {demo: code, samples: 2}\n" + "    - {demo: prose}\n"
    text = text.replace("- {demo: mix, samples: 4, length: 16}", "- &mix {demo: mix, samples: 4}\n    - *mix")
    loaded = load(text, overrides=["calibration.data.1.samples=9", "calibration.data.1.name=again"])
    assert [source.samples for source in loaded.recipe.calibration.data] == [4, 9]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3"])
def test_devices(device: str) -> None:
    assert load(GOOD + f"device: {device}\n").recipe.device == device


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_ours_is_valid(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.recipe.evaluate is not None
    assert loaded.recipe.output is not None


def test_quickstart() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml").recipe
    assert recipe.model == "demo"
    assert recipe.passes == (PassSpec(method="expert_pruning", options={"keep": {"mean": 6}}),)
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks == ("demo_code", "demo_prose")
    assert [source.title for source in recipe.evaluate.perplexity] == [
        "demo:code",
        "demo:prose",
        "demo:arithmetic",
    ]


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from compressor.recipe.schema import load_recipe; load_recipe(sys.argv[1]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, RECIPES / "quickstart.yaml"], check=True, cwd=RECIPES.parent)


def test_every_field_has_a_description() -> None:
    def undescribed(schema: dict[str, Any]) -> list[str]:
        models = [schema, *schema.get("$defs", {}).values()]
        return [
            f"{m['title']}.{name}"
            for m in models
            for name, info in m.get("properties", {}).items()
            if not info.get("description")
        ]

    assert undescribed(Recipe.model_json_schema()) == []


# From Python -----------------------------------------------------------------------------------------------


def test_mapping_and_recipe_give_the_same_as_the_file() -> None:
    from_file = load(GOOD)
    data = {
        "model": "demo",
        "calibration": {"data": (DemoSource(demo="mix", samples=4, length=16),)},
        "passes": [{"prune": {"keep": 6}}],
        "output": Path("out"),
    }
    from_mapping = load_recipe(data, methods=METHODS)
    from_recipe = load_recipe(from_file.recipe, methods=METHODS)
    from_parts = load_recipe(Recipe.model_validate(data), methods=METHODS)
    for other in (from_mapping, from_recipe, from_parts):
        assert other.recipe == from_file.recipe
        assert other.fingerprint == from_file.fingerprint
        assert other.to_yaml() == from_file.to_yaml()


def test_a_mapping_is_not_changed_by_overrides() -> None:
    data: dict[str, Any] = yaml.safe_load(GOOD)
    loaded = load_recipe(data, overrides=["passes.0.prune.keep=4"], methods=METHODS)
    assert loaded.recipe.passes[0].options == {"keep": 4}
    assert data == yaml.safe_load(GOOD)


def test_mistakes_in_a_mapping_in_its_order() -> None:
    data = {
        "model": 3,
        "calibration": {"data": [{"demo": "mix", "samples": 0}]},
        "passes": [{"prune": {}}],
        5: 6,
    }
    with pytest.raises(RecipeError) as error:
        load_recipe(data, methods=METHODS)  # type: ignore[arg-type]
    assert str(error.value).split("\n") == [
        "recipe model: found 3, expected a text",
        "recipe calibration.data[0].samples: found 0, expected a number of at least 1",
        "recipe passes[0].prune: give keep or ratio",
        f"recipe 5: unknown key. {TOP_KEYS}",
    ]


def test_other_types_and_endless_mappings() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: found an empty list, expected a path, a mapping or a Recipe$"):
        load_recipe([])  # type: ignore[arg-type]
    endless: dict[str, Any] = {}
    endless["model"] = endless
    with pytest.raises(RecipeError, match=r"^recipe: Circular reference detected$"):
        load_recipe(endless)


def test_what_is_no_plain_data_and_text_that_json_escapes() -> None:
    for value, found in ((float("nan"), "Out of range float values"), ({1, 2}, "found a value of type set, expected")):
        with pytest.raises(RecipeError, match=f"^recipe: {found}"):
            load_recipe({"model": value})
    pair = "👾 \x85\u2028\x7f"
    assert load_recipe({"model": pair, "passes": [{"prune": {"keep": 1e-300}}]}).recipe.model == pair
    assert load(changed("model: demo", 'model: "\\ud83d\\udc7e"')).recipe.model == "👾"


# Files that cannot be read ---------------------------------------------------------------------------------


def test_missing_file() -> None:
    with pytest.raises(RecipeError, match=r"^none.yaml: cannot be read, expected a recipe \(YAML\): No such file"):
        load_recipe("none.yaml")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_no_file_can_be_called(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^'.*': no file can have this name, expected that of a recipe \(YAML\)$"):
        load_recipe(name)


def test_folder() -> None:
    Path("runs").mkdir()
    with pytest.raises(RecipeError, match=r"^runs: cannot be read, expected a recipe \(YAML\): Is a directory"):
        load_recipe(Path("runs"))


def test_large_file() -> None:
    assert mistakes("#" * 300_000) == ["r.yaml: larger than 256 KiB, expected a recipe (YAML)"]


NEEDED = "a mapping with at least model, calibration and passes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"r.yaml: the file is empty, expected {NEEDED}"),
        ("# only a comment\n", f"r.yaml: the file is empty, expected {NEEDED}"),
        ("---\n", f"r.yaml: the file is empty, expected {NEEDED}"),
        ("\n- model: demo\n", f"r.yaml:2:1: found a list, expected {NEEDED}"),
        ("demo", f"r.yaml:1:1: found 'demo', expected {NEEDED}"),
        ("!recipe {model: demo}", "r.yaml:1:1: found the tag !recipe, expected a value without a tag"),
        ("model: demo\n---\nmodel: demo\n", "r.yaml:2:1: a second document begins, expected only one"),
        (
            "model: demo\nseed: [1\n",
            "r.yaml:3:1: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        (
            "calibration:\n\tbatch_size: 8\n",
            "r.yaml:2:1: not valid YAML: while scanning for the next token, found character "
            "'\\t' that cannot start "
            "any token; indent with spaces, not with tabs",
        ),
        (
            "model: a: b\n",
            "r.yaml:1:9: not valid YAML: mapping values are not allowed here; a text with a "
            "colon and a space in it "
            "needs quotes",
        ),
        (
            "model: *.safetensors\n",
            "r.yaml:1:9: not valid YAML: while scanning an alias, expected alphabetic or "
            "numeric character, but found "
            "'.'; a text that begins with * needs quotes",
        ),
        (
            "model: *demo\n",
            "r.yaml:1:8: not valid YAML: found undefined alias 'demo'; a text that begins with * needs quotes",
        ),
        ("model: demo\nseed: \a\n", "r.yaml:2:7: not valid YAML: found the control character U+0007"),
        (
            b"# ok\nmodel: \xc3\xa9\xff\n",
            "r.yaml:2:9: found the byte 0xff, which is not UTF-8; save the file as UTF-8",
        ),
        (
            GOOD.encode("utf-16"),
            "r.yaml:1:1: found the byte 0xff, which is not UTF-8; save the file as UTF-8",
        ),
        ("a: " + "[" * 5000, "r.yaml:1:1: nested too deeply"),
    ],
    ids=lambda value: None,
)
def test_unreadable(text: str | bytes, message: str) -> None:
    assert mistakes(text) == [message]


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    [message] = mistakes("\n".join(lines))
    assert message.endswith(": expands to more than 10,000 values; does an alias (*name) repeat other aliases?")


def test_recursive_alias() -> None:
    text = changed("{keep: 6}", "&all {keep: 6, more: *all}")
    assert mistakes(text) == ["r.yaml:7:12 passes[0].prune.more: an alias stands inside the value that it repeats"]


# One mistake -----------------------------------------------------------------------------------------------

TOP_KEYS = f"Known keys: {', '.join(Recipe.model_fields)}"

ONE_MISTAKE = [
    # missing and unknown keys
    (
        "model: demo\n",
        "",
        "r.yaml:2:1 model: missing, expected the model to compress: a hub id, a local folder, or demo",
    ),
    (
        "  data:\n    - {demo: mix, samples: 4, length: 16}\n",
        "  batch_size: 4\n",
        "r.yaml:4:3 calibration.data: no text to observe the model on; list at least one source, such as "
        "`data: [{demo: mix}]`",
    ),
    ("output:", "ouput:", f"r.yaml:8:1 ouput: unknown key; did you mean 'output'? {TOP_KEYS}"),
    ("output:", "zzz:", f"r.yaml:8:1 zzz: unknown key. {TOP_KEYS}"),
    (
        "  data:",
        "  size: 3\n  data:",
        "r.yaml:4:3 calibration.size: unknown key. Known keys: batch_size, data",
    ),
    (
        "samples: 4",
        "sample: 4",
        "r.yaml:5:19 calibration.data[0].sample: unknown key; did you mean 'samples'? "
        "Known keys: name, samples, length, special_tokens, demo, split",
    ),
    (
        "{keep: 6}",
        "{keep: 6, kep: 6}",
        "r.yaml:7:22 passes[0].prune.kep: unknown key; did you mean 'keep'? Known keys: keep, ratio, rounds",
    ),
    (
        "prune: {keep: 6}",
        "plain: {keep: 6}",
        "r.yaml:7:13 passes[0].plain.keep: unknown key. Nothing can be set here",
    ),
    # wrong values
    (
        "samples: 4",
        "samples: many",
        "r.yaml:5:28 calibration.data[0].samples: found 'many', expected a whole number",
    ),
    (
        "samples: 4",
        "samples: 1.5",
        "r.yaml:5:28 calibration.data[0].samples: found 1.5, expected a whole number",
    ),
    (
        "samples: 4",
        "samples: 0",
        "r.yaml:5:28 calibration.data[0].samples: found 0, expected a number of at least 1",
    ),
    (
        "samples: 4",
        "samples:",
        "r.yaml:5:27 calibration.data[0].samples: found nothing, expected a whole number",
    ),
    (
        "samples: 4",
        "samples: null",
        "r.yaml:5:28 calibration.data[0].samples: found null, expected a whole number",
    ),
    (
        "samples: 4",
        "samples: true",
        "r.yaml:5:28 calibration.data[0].samples: found true, expected a whole number",
    ),
    (
        "samples: 4",
        "samples: on",
        "r.yaml:5:28 calibration.data[0].samples: found on, which YAML reads as true, expected a whole number",
    ),
    (
        "demo: mix",
        "demo: poems",
        "r.yaml:5:14 calibration.data[0].demo: found 'poems', expected 'code', 'prose', 'arithmetic' or 'mix'",
    ),
    ("output: out", "seed: -1", "r.yaml:8:7 seed: found -1, expected a number of at least 0"),
    ("output: out", f"seed: {2**32}", f"r.yaml:8:7 seed: found {2**32}, expected a number less than {2**32}"),
    (
        "output: out",
        "dtype: fp16",
        "r.yaml:8:8 dtype: found 'fp16', expected 'auto', 'float32', 'bfloat16' or 'float16'",
    ),
    (
        "output: out",
        "device: gpu",
        "r.yaml:8:9 device: found 'gpu', expected auto, cpu, cuda, or one GPU by its number such as cuda:0",
    ),
    (
        "output: out",
        "trust_remote_code: perhaps",
        "r.yaml:8:20 trust_remote_code: found 'perhaps', expected true or false",
    ),
    ("output: out", "output: [a]", "r.yaml:8:9 output: found a list, expected a text"),
    ("model: demo", "model: ''", "r.yaml:2:8 model: found '', expected a text of at least 1 characters"),
    ("model: demo", "model:", "r.yaml:2:7 model: found nothing, expected a text"),
    (
        "output: out",
        "evaluate: yes",
        "r.yaml:8:11 evaluate: found yes, which YAML reads as true, expected a mapping",
    ),
    # lists and mappings
    (
        "    - {demo: mix, samples: 4, length: 16}",
        "    demo: mix",
        "r.yaml:5:5 calibration.data: found a mapping, expected a list (begin each entry with `- `)",
    ),
    (
        "\n    - {demo: mix, samples: 4, length: 16}",
        " []",
        "r.yaml:4:9 calibration.data: no text to observe the model on; list at least one source, such as "
        "`data: [{demo: mix}]`",
    ),
    (
        "\n  - prune: {keep: 6}",
        " []",
        "r.yaml:6:9 passes: found an empty list, expected a list of at least 1",
    ),
    (
        "  - prune: {keep: 6}",
        "  prune: {keep: 6}",
        "r.yaml:7:3 passes: found a mapping, expected a list (begin each entry with `- `)",
    ),
    (
        "output: out",
        "evaluate: {tasks: arc}",
        "r.yaml:8:19 evaluate.tasks: found 'arc', expected a list (begin each entry with `- `)",
    ),
    # sources
    (
        "{demo: mix, samples: 4, length: 16}",
        "{demo: code, text: x}",
        f"r.yaml:5:7 calibration.data[0]: found the keys demo and text; {SOURCE_KINDS}",
    ),
    ("demo: mix, ", "", f"r.yaml:5:7 calibration.data[0]: found a mapping; {SOURCE_KINDS}"),
    (
        "{demo: mix, samples: 4, length: 16}",
        "code",
        f"r.yaml:5:7 calibration.data[0]: found 'code'; {SOURCE_KINDS}",
    ),
    # passes
    (
        "prune: {keep: 6}",
        "prune",
        "r.yaml:7:5 passes[0]: found 'prune', expected a method with its options, such as `name: {}`",
    ),
    (
        "prune: {keep: 6}",
        "{}",
        "r.yaml:7:5 passes[0]: found an empty mapping, expected one method with its options; begin each pass with `- `",
    ),
    (
        "- prune: {keep: 6}",
        "- prune: {keep: 6}\n    plain: {}",
        "r.yaml:7:5 passes[0]: found 2 methods in one pass (prune and plain), expected "
        "one method with its options; "
        "begin each pass with `- `",
    ),
    (
        "prune: {keep: 6}",
        "{method: prune, options: {keep: 6}}",
        "r.yaml:7:5 passes[0]: found 2 methods in one pass (method and options), "
        "expected one method with its options; "
        "begin each pass with `- `",
    ),
    (
        "prune: {keep: 6}",
        "prune: 6",
        "r.yaml:7:5 passes[0]: found 6 as the options of prune, expected a mapping, such as {}",
    ),
    (
        "prune: {keep: 6}",
        "prun: {keep: 6}",
        "r.yaml:7:5 passes[0].prun: unknown method; did you mean 'prune'? Known methods: "
        "dynamic_skipping, plain, prune",
    ),
    # a method's options
    ("keep: 6", "keep: abc", "r.yaml:7:19 passes[0].prune.keep: found 'abc', expected a number"),
    (
        "keep: 6",
        "keep: yes",
        "r.yaml:7:19 passes[0].prune.keep: found yes, which YAML reads as true, expected a number",
    ),
    ("keep: 6", "keep: 0", "r.yaml:7:19 passes[0].prune.keep: keep 0 leaves no expert; keep at least 2"),
    ("keep: 6", "ratio: 1", "r.yaml:7:20 passes[0].prune.ratio: found 1, expected a number less than 1"),
    ("keep: 6", "rounds: 2", "r.yaml:7:12 passes[0].prune: give keep or ratio"),
    # what YAML reads differently
    (
        "model: demo",
        "model: no",
        'r.yaml:2:8 model: found no, which YAML reads as false; put it in quotes: "no"',
    ),
    (
        "output: out",
        "output: 2024",
        'r.yaml:8:9 output: found 2024, which YAML reads as a number; put it in quotes: "2024"',
    ),
    (
        "output: out",
        "output: 2024-01-31",
        'r.yaml:8:9 output: found 2024-01-31, which YAML reads as a date; put it in quotes: "2024-01-31"',
    ),
    (
        "keep: 6",
        "keep: 010",
        "r.yaml:7:19 passes[0].prune.keep: found 010, which YAML reads as 8; "
        'write 8, or "010" in quotes if a text is meant',
    ),
    (
        "model: demo",
        "model: 12:30",
        'r.yaml:2:8 model: found 12:30, which YAML reads as 750; write 750, or "12:30" in quotes if a text is meant',
    ),
    ("samples: 4", "samples: 4.0", "r.yaml:5:28 calibration.data[0].samples: found 4.0, expected a whole number"),
    ("samples: 4", "samples: '4'", "r.yaml:5:28 calibration.data[0].samples: found '4', expected a whole number"),
    ("model: demo", 'model: "\\ud800"', "r.yaml:2:8 model: found half of a UTF-16 pair"),
    # keys, tags
    ("output: out", "seed: 1\nseed: 2", "r.yaml:9:1 seed: given twice, first at r.yaml:8:1; keep one"),
    (
        "{keep: 6}",
        "{keep: 6, keep: 6}",
        "r.yaml:7:22 passes[0].prune.keep: given twice, first at r.yaml:7:13; keep one",
    ),
    (
        "output: out",
        "1: out",
        f"r.yaml:8:1 1: unknown key. {TOP_KEYS}",
    ),
    (
        "{keep: 6}",
        "{keep: 6, no: 1}",
        'r.yaml:7:22 passes[0].prune: found the key no, which YAML reads as bool; put it in quotes: "no"',
    ),
    ("output: out", "? [a]\n: out", "r.yaml:8:3: found a list as a key, expected a text"),
    ("output: out", "<<: {seed: 1}", "r.yaml:8:1: merge keys (<<) are not supported; write the keys out"),
    (
        "model: demo",
        "model: !env HOME",
        "r.yaml:2:8 model: found the tag !env, expected a value without a tag",
    ),
    (
        "model: demo",
        "model: !!python/object/apply:os.system [id]",
        "r.yaml:2:8 model: found the tag !!python/object/apply:os.system, expected a value without a tag",
    ),
    (
        "model: demo",
        "model: !!binary aGk=",
        "r.yaml:2:8 model: found the tag !!binary, expected a value without a tag",
    ),
    (
        "keep: 6",
        "keep: !!int six",
        "r.yaml:7:19 passes[0].prune.keep: found 'six', which is not a value of type int",
    ),
    # settings without effect, figures of the same name
    (
        "output: out",
        "evaluate: {limit: 5}",
        "r.yaml:8:11 evaluate: limit would have no effect without `tasks`; give tasks or leave it out",
    ),
    (
        "output: out",
        "evaluate: {perplexity: [{demo: code}, {demo: code, length: 64}]}",
        "r.yaml:8:24 evaluate.perplexity: two sources are called 'demo:code'; tell them apart with `name:`",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), ONE_MISTAKE, ids=[new or "missing" for _, new, _ in ONE_MISTAKE])
def test_one_mistake(old: str, new: str, message: str) -> None:
    assert mistakes(changed(old, new)) == [message]


def test_no_method_installed() -> None:
    assert mistakes(GOOD, methods={}) == ["r.yaml:7:5 passes[0].prune: unknown method. No method is installed"]


# Several mistakes ------------------------------------------------------------------------------------------


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = """\
modle: demo
seed: yes
passes:
  - prune: {keep: maybe, roundz: 3}
  - plain: {}
  - dynamic_skipping: {scale: off, seed_text: no}
  - skip: {}
calibration:
  batch_size: 0
  batch_size: 8
  data:
    - {demo: mix, length: 1}
    - {demo: code, jsonl: x}
evaluate:
  speed: !fast yes
  limit: 0x
"""
    assert mistakes(text) == [
        "r.yaml:1:1 model: missing, expected the model to compress: a hub id, a local folder, or demo",
        f"r.yaml:1:1 modle: unknown key; did you mean 'model'? {TOP_KEYS}",
        "r.yaml:2:7 seed: found yes, which YAML reads as true, expected a whole number",
        "r.yaml:4:19 passes[0].prune.keep: found 'maybe', expected a number",
        "r.yaml:4:26 passes[0].prune.roundz: unknown key; did you mean 'rounds'? Known keys: keep, ratio, rounds",
        "r.yaml:6:31 passes[2].dynamic_skipping.scale: found off, which YAML reads as false, expected a number",
        'r.yaml:6:47 passes[2].dynamic_skipping.seed_text: found no, which YAML reads as false; put it in quotes: "no"',
        "r.yaml:7:5 passes[3].skip: unknown method. Known methods: dynamic_skipping, plain, prune",
        "r.yaml:9:15 calibration.batch_size: found 0, expected a number of at least 1",
        "r.yaml:10:3 calibration.batch_size: given twice, first at r.yaml:9:3; keep one",
        "r.yaml:12:27 calibration.data[0].length: found 1, expected a number of at least 2",
        f"r.yaml:13:7 calibration.data[1]: found the keys demo and jsonl; {SOURCE_KINDS}",
        "r.yaml:15:10 evaluate.speed: found the tag !fast, expected a value without a tag",
        "r.yaml:16:10 evaluate.limit: found '0x', expected a whole number",
    ]


# --set, --model, --output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("passes.0.prune.keep=4", ("passes", 0, "prune", "keep"), 4),
        ("passes[0].prune.keep=4", ("passes", 0, "prune", "keep"), 4),
        ("passes.0.prune.rounds=2", ("passes", 0, "prune", "rounds"), 2),
        ("evaluate={tasks: [a]}", ("evaluate",), {"tasks": ["a"]}),
        ("model=a=b", ("model",), "a=b"),
        ("output=", ("output",), None),
        ("calibration.data.0={demo: code}", ("calibration", "data", 0), {"demo": "code"}),
    ],
)
def test_override(override: str, path: tuple[str | int, ...], expected: Any) -> None:
    loaded = load(GOOD, overrides=[override])
    assert loaded.document.at(path) == expected
    assert str(loaded.error(path, "wrong")).startswith(f"--set {override} ")


def test_overrides_apply_in_order_and_below_what_was_left_empty() -> None:
    text = changed("prune: {keep: 6}", "prune:") + "evaluate:\n"
    loaded = load(
        text,
        overrides=["passes.0.prune.keep=4", "evaluate.tasks=[a]", "evaluate.limit=50", "evaluate.limit=60"],
    )
    assert loaded.recipe.passes[0].options == {"keep": 4}
    assert loaded.recipe.evaluate is not None
    assert (loaded.recipe.evaluate.tasks, loaded.recipe.evaluate.limit) == (("a",), 60)


def test_an_override_can_mend_the_file() -> None:
    assert load(changed("keep: 6", "keep: six"), overrides=["passes.0.prune.keep=4"]).recipe.passes[0].options == {
        "keep": 4
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.7.x=1", "passes has 1 entry, counted from 0"),
        ("passes.first.x=1", "passes is a list, expected a number from 0 after it, found 'first'"),
        ("passes.-1={}", "passes is a list, expected a number from 0 after it, found '-1'"),
        (
            "passes.0.prun.keep=1",
            "passes[0] has no key 'prun'; did you mean 'prune'? Only the last key may be new",
        ),
        ("evaluate.limit=1", "the recipe has no key 'evaluate'. Only the last key may be new"),
        ("model.name=1", "model is 'demo', which has nothing inside to set"),
        ("seed", "expected PATH=VALUE, such as passes.0.expert_pruning.keep=4"),
        ("=1", "expected PATH=VALUE, such as passes.0.expert_pruning.keep=4"),
        ("a..b=1", "expected PATH=VALUE, such as passes.0.expert_pruning.keep=4"),
        (
            "seed=[",
            "not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_override_that_cannot_be_applied(override: str, message: str) -> None:
    assert mistakes(GOOD, overrides=[override]) == [f"--set {override}: {message}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "passes.0.prune.keep=no",
            " passes[0].prune.keep: found no, which YAML reads as false, expected a number",
        ),
        ("sed=1", f" sed: unknown key; did you mean 'seed'? {TOP_KEYS}"),
        ("seed=!x 1", " seed: found the tag !x, expected a value without a tag"),
        ("evaluate={speed: true, speed: true}", " evaluate.speed: given twice, first at {place}; keep one"),
    ],
)
def test_override_with_a_wrong_value(override: str, message: str) -> None:
    place = f"--set {override}"
    assert mistakes(GOOD, overrides=[override]) == [place + message.replace("{place}", place)]


def test_mistakes_of_the_file_come_before_those_of_overrides() -> None:
    found = mistakes(changed("length: 16", "length: 1"), overrides=["seed=x", "passes.7.x=1", "device=gpu"], model="")
    assert found == [
        "r.yaml:5:39 calibration.data[0].length: found 1, expected a number of at least 2",
        "--set seed=x seed: found 'x', expected a whole number",
        "--set passes.7.x=1: passes has 1 entry, counted from 0",
        "--set device=gpu device: found 'gpu', expected auto, cpu, cuda, or one GPU by its number such as cuda:0",
        "--model  model: found '', expected a text of at least 1 characters",
    ]


def test_model_and_output() -> None:
    loaded = load(GOOD.replace("model: demo\n", ""), model="other", output=Path("there"))
    assert (loaded.recipe.model, loaded.recipe.output) == ("other", Path("there"))
    assert str(loaded.error(["model"], "wrong")) == "--model other model: wrong"
    assert str(loaded.error(["output"], "wrong")) == "--output there output: wrong"


# After loading ---------------------------------------------------------------------------------------------


def test_later_errors_are_located() -> None:
    loaded = load(GOOD)
    error = loaded.error(("passes", 0, "prune", "keep"), "6 of 4 experts cannot be kept")
    assert isinstance(error, RecipeError)
    assert str(error) == "r.yaml:7:19 passes[0].prune.keep: 6 of 4 experts cannot be kept"
    assert str(loaded.error((*loaded.passes[0].path, "rounds"), "x")) == "r.yaml:7:12 passes[0].prune.rounds: x"
    assert str(loaded.error(("evaluate", "tasks", 3), "x")) == "r.yaml:2:1 evaluate.tasks[3]: x"
    assert str(load_recipe(loaded.recipe).error(("model",), "x")) == "recipe model: x"


def test_mistakes_of_all_passes() -> None:
    with pytest.raises(RecipeError) as error:
        load(changed("prune: {keep: 6}", "prune: {keep: 6}\n  - plain: {a: 1}\n  - other: {}"))
    assert str(error.value).split("\n") == [
        "r.yaml:8:13 passes[1].plain.a: unknown key. Nothing can be set here",
        "r.yaml:9:5 passes[2].other: unknown method. Known methods: dynamic_skipping, plain, prune",
    ]


def test_effective_recipe_loads_again_as_the_same() -> None:
    text = changed("{keep: 6}", "{ratio: 1e-5}") + (
        "evaluate: {tasks: ['no', '010'], task_path: tâches, perplexity: [{tokens: a.jsonl}], speed: true}\n"
    )
    loaded = load(text, overrides=["seed=3", "calibration.data.0.name='2024'"])
    written = loaded.to_yaml()
    again = load(written)
    assert again.recipe.model_copy(update={"passes": ()}) == loaded.recipe.model_copy(update={"passes": ()})
    assert [p.method.options for p in again.passes] == [p.method.options for p in loaded.passes]
    assert again.to_yaml() == written
    assert again.fingerprint == loaded.fingerprint
    assert "ratio: 1.0e-05" in written
    assert "rounds: 1" in written
    assert "tâches" in written


def test_fingerprint() -> None:
    plain = load(GOOD).fingerprint
    assert plain.startswith("sha256:")
    assert len(plain) == len("sha256:") + 16
    assert load(GOOD, output=Path("elsewhere")).fingerprint == plain
    assert load(GOOD, overrides=["seed=0", "passes.0.prune.rounds=1"]).fingerprint == plain
    for override in ("seed=1", "passes.0.prune.keep=4", "model=other", "evaluate={speed: true}"):
        assert load(GOOD, overrides=[override]).fingerprint != plain
