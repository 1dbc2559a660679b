"""Results beside each other: differences, intervals from the formula, what is noise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from exported import in_process
from llm_coreml.errors import ConfigError
from llm_coreml.eval.bootstrap import interval
from llm_coreml.eval.compared import FIGURES, compare, paired
from llm_coreml.eval.results_file import append_result, results_schema
from result_documents import document

MANY = tuple(2.0 + 0.5 * math.sin(at) for at in range(40))


def test_the_documents_of_tests_are_documents() -> None:
    import jsonschema

    jsonschema.validate(document(), results_schema())


def test_differences_are_those_of_the_figures() -> None:
    one, other = document(), document(nll=(2.1, 2.3, 2.5, 2.2), kl=(0.03,) * 4, size=900, speed=30)
    found = compare([one, other]).between(0, 1)
    # Each window costs 0.1 nats more, so that every draw gives the same ratio.
    assert found["perplexity"].value == pytest.approx(math.exp(0.1) - 1)
    assert found["perplexity"].interval == pytest.approx((math.expm1(0.1),) * 2)
    assert found["perplexity"].beyond_noise is True and found["perplexity"].better is False
    assert found["mean_kl"].value == pytest.approx(0.01)
    assert found["program_bytes"].value == pytest.approx(-0.1)
    assert found["program_bytes"].better is True and found["program_bytes"].beyond_noise is None
    assert found["tokens_per_second"].value == pytest.approx(0.5)
    assert found["tokens_per_second"].better is True


def test_an_interval_is_as_wide_as_the_windows_say() -> None:
    """The bootstrap's of a mean is near that of the normal distribution, for many windows."""
    noise = np.random.default_rng(1).normal(0.02, 0.05, len(MANY))
    other = document(nll=tuple(np.array(MANY) + noise))
    found = compare([document(nll=MANY), other]).between(0, 1)["perplexity"]
    assert found.interval is not None
    half = 1.96 * noise.std() / math.sqrt(len(MANY))
    expected = np.expm1([noise.mean() - half, noise.mean() + half])
    assert found.interval == pytest.approx(tuple(expected), abs=0.15 * half)
    # Unpaired, the texts' own spread of 0.35 nats would hide it.
    assert found.interval[1] - found.interval[0] < 0.05


def test_windows_are_drawn_as_for_the_interval_of_one_result() -> None:
    counts = [100 + 10 * at for at in range(len(MANY))]
    one = document(nll=(0.0,) * len(MANY), tokens=counts, kl=None, top1=None)
    other = document(nll=MANY, tokens=counts, kl=None, top1=None)
    found = compare([one, other]).between(0, 1)["perplexity"].interval
    alone = interval([cost * count for cost, count in zip(MANY, counts, strict=True)], counts)
    assert found == pytest.approx(tuple(np.expm1(alone)), rel=1e-6)


def test_long_windows_weigh_more() -> None:
    one = document(nll=(2.0, 3.0), tokens=(300, 100), kl=None, top1=None)
    other = document(nll=(2.0, 3.4), tokens=(300, 100), kl=None, top1=None)
    found = compare([one, other]).between(0, 1)["perplexity"]
    assert found.value == pytest.approx(math.expm1(0.1))
    # Both windows drawn from the first, or from the second.
    assert found.interval == pytest.approx((0.0, math.expm1(0.4)))
    assert found.beyond_noise is False


def test_what_cannot_be_told_apart_is_noise() -> None:
    noise = np.random.default_rng(2).normal(0.0, 0.1, len(MANY))
    other = document(nll=tuple(np.array(MANY) + noise - noise.mean() + 0.001))
    found = compare([document(nll=MANY), other]).between(0, 1)["perplexity"]
    assert found.value > 0 and found.beyond_noise is False


def test_results_of_other_texts_have_no_difference_in_quality() -> None:
    one, other = document(), document(text="another text")
    found = compare([one, other, document(nll=(2.0,) * 3, kl=None, top1=None)])
    assert not paired(one, other)
    assert set(found.between(0, 1)) == {"program_bytes", "tokens_per_second"}
    assert len(found.notes) == 3 and "different texts or windows" in found.notes[0]


def test_figures_that_were_not_measured_are_left_out() -> None:
    bare = document(kl=None, top1=None, speed=None, mean_only=True)
    found = compare([document(), bare])
    assert found.figures["mean_kl"] == (pytest.approx(0.02), None)
    assert set(found.between(0, 1)) == {"perplexity", "program_bytes"}
    assert found.between(0, 1)["perplexity"].interval is None


def test_every_two_are_compared_and_too_many_are_refused() -> None:
    found = compare([document(str(at)) for at in range(4)])
    assert {(each.first, each.second) for each in found.differences} == {
        (first, second) for second in range(4) for first in range(second)
    }
    assert len(found.differences) == 6 * len(FIGURES)
    for count in (0, 1, 33):
        with pytest.raises(ConfigError, match="takes 2 to 32"):
            compare([document()] * count)


def test_the_command_shows_a_table_and_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = []
    for name, shift in (("one", 0.0), ("two", 0.1), ("three", 0.0001)):
        spread = [0.01 * (-1) ** at for at in range(len(MANY))] if name == "three" else 0.0
        nll = tuple(np.array(MANY) + shift + spread)
        append_result(tmp_path / name, document(name, nll=nll))
        places.append(tmp_path / name)
    # Of several results in a place the latest counts.
    append_result(places[0], document("earlier", created="2020-01-01T00:00:00Z"))
    shown = in_process(capfd, monkeypatch, "compare", *places)
    assert shown.code == 0, shown.err
    assert "+10.52%*" in shown.out and "within noise in perplexity: 1 and 3" in shown.out
    assert "earlier" not in shown.out
    told = in_process(capfd, monkeypatch, "compare", *places, "--format", "json")
    assert json.loads(told.out)["names"][1].startswith("two (int4 group 32, gpu)")
    alone = in_process(capfd, monkeypatch, "compare", places[0])
    assert alone.code == 0 and "earlier" in alone.out
    for words in ((places[1],), (tmp_path / "gone", places[0]), (tmp_path, places[0])):
        refused = in_process(capfd, monkeypatch, "compare", *words)
        assert refused.code == 2 and refused.err.startswith("Error: "), refused.err
