"""A template is tried before it is used; where it is not the teacher's, that is said."""

import pytest
from helpers.chats import (
    CONTROL,
    FORGETS,
    KEEPS,
    MARKED,
    SHOWN,
    SILENT,
    TIGHT,
    WORDS,
    made,
    template,
)
from transformers import PreTrainedTokenizerFast

from elastic.config import ConfigError
from elastic.data.chat import ChatEncoder
from elastic.data.template import check_template, disagreement


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return made(*CONTROL, split=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}", "end of template|Unexpected end"),
        ("{{ raise_exception('never\nagain') }}", "never again"),
        ("{{ messages[0].content }}", "a message is shown 0 times"),
        (KEEPS + KEEPS, "a message is shown 2 times"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "marks",
        ),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_line(
    plain: PreTrainedTokenizerFast, source: str, said: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data\.template: cannot be used \(.*({said})"
    ) as error:
        check_template(plain, source, "data.template")
    assert "\n" not in str(error.value) and "must be" in str(error.value)
    with pytest.raises(ConfigError, match="^chat template: "):
        ChatEncoder(plain, source)


def test_what_a_template_does_is_found_out(plain: PreTrainedTokenizerFast) -> None:
    expected = {
        KEEPS: ("field", False, "<|im_end|>"),
        FORGETS: ("field", True, "<|im_end|>"),
        SILENT: ("inline", False, "<|im_end|>"),
        WORDS: ("inline", False, None),
    }
    for source, (reasoning, forgets, end) in expected.items():
        nature = check_template(plain, source)
        assert (nature.reasoning, nature.forgets, nature.end) == (reasoning, forgets, end)


def test_templates_that_disagree_are_told_apart_to_the_line_end() -> None:
    assert disagreement(KEEPS, KEEPS) is None and disagreement(KEEPS, MARKED) is None
    said = disagreement(KEEPS, template(TIGHT))
    assert said is not None and said.startswith("reasoning is ") and "\n" not in said
    assert r"humps.\n</think>\nA humped" in said and "humps.</think>A humped" in said
    second = disagreement(KEEPS, FORGETS)
    assert second is not None and second.startswith("a second turn is")
    prompt = disagreement(KEEPS, template(SHOWN, prompt=""))
    assert prompt is not None and prompt.startswith("the start of an answer is")
    refusing = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + KEEPS
    assert disagreement(KEEPS, refusing) == (
        "a call of a tool is refused by the teacher's template (no tools)"
    )
    assert "refused by the data's template" in str(disagreement(refusing, KEEPS))
    assert disagreement(refusing, refusing) is None
