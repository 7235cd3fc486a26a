"""Chats, chat templates, and tokenizers with the control tokens that these write."""

import json
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from elastic.data.tokenizer import train_tokenizer

_TOOLS = """{%- if tools %}{{ '<|im_start|>system\\n# Tools' }}
{%- for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"""
_CALLS = """{%- for c in m.tool_calls or [] %}{% set f = c.function %}
{{- '<tool_call>' + f.name + ' ' + f.arguments | tojson + '</tool_call>' }}{% endfor %}"""
_OTHERS = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_PROMPT = """{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"""


def template(thought: str, marks: bool = False, prompt: str = _PROMPT) -> str:
    """ChatML; `thought` writes the reasoning of message m, i being its number."""
    start, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    return (
        _TOOLS
        + "{%- for m in messages %}{% set i = loop.index0 %}{% if m.role == 'assistant' %}"
        + "{{ '<|im_start|>assistant\\n' }}"
        + start
        + thought
        + "{{ m.content }}"
        + _CALLS
        + "{{ '<|im_end|>\\n' }}"
        + end
        + "{%- else %}"
        + _OTHERS
        + "{% endif %}{% endfor %}"
        + prompt
    )


_LAST = """{%- set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set last.user = loop.index0 %}{% endif %}{% endfor %}"""
SHOWN = """{%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}
{%- else %}{{ '<think></think>' }}{% endif %}"""
TIGHT = SHOWN.replace("\\n</think>\\n", "</think>")
_NANO = SHOWN.replace("m.reasoning_content %}", "m.reasoning_content and i > last.user %}")

KEEPS = template(SHOWN)
MARKED = template(SHOWN, marks=True)
FORGETS = _LAST + template(_NANO)
FORGETS_MARKED = _LAST + template(_NANO, marks=True)
SILENT = template("", prompt="")
"""Shows reasoning that is in the content, as all is."""
LATER = _LAST + template(
    "{% if i > last.user %}{{ '<think>\\n' }}{{ m.reasoning_content or '' }}"
    "{{ '\\n</think>\\n\\n' }}{% endif %}",
    prompt="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)
"""An earlier answer is shown otherwise than a last one, without reasoning too."""
WORDS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""No control token at all, and a prompt that ends within a word."""

CONTROL = ["<|im_start|>", "<|im_end|>"]


def made(
    *special: str, words: tuple[str, ...] = (), split: bool = False
) -> PreTrainedTokenizerFast:
    texts = ["user: assistant: Hello there\nassistant: Hi! What is it?\n" * 20 + KEEPS]
    tokenizer = train_tokenizer(texts, 360)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in special], True)
    tokenizer.add_tokens(list(words))
    tokenizer.split_special_tokens = split
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


TWO = [
    {"role": "system", "content": "Be short."},
    user("Hello"),
    assistant("Hi!", "A greeting."),
    user("What is 2?"),
    assistant("Two.", "Easy."),
]

CALL = {"function": {"name": "look", "arguments": '{"at": "ö", "n": 1}'}}
TOOLED = [
    user("Look"),
    assistant(None, "I must look.", tool_calls=json.dumps([CALL])),
    {"role": "tool", "content": "Nothing", "tool_call_id": "1"},
    assistant("Nothing.", "Empty."),
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLED = '<tool_call>look {"at": "ö", "n": 1}</tool_call>'
