"""A tokenizer that knows turns, with the template of this package."""

from transformers import PreTrainedTokenizerFast

from elastic.cli.command import CONF
from elastic.config.tasks import DIFFICULTIES, FAMILIES
from elastic.data.arithmetic import problems
from elastic.data.tokenizer import train_tokenizer

CHATML = (CONF / "chat" / "chatml.jinja").read_text()

TURNS = ["<|im_start|>", "<|im_end|>"]


def chat_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Of a few problems; marks of turns are tokens of their own."""
    drawn = problems(0, FAMILIES, DIFFICULTIES, 80, "train")
    tokenizer = train_tokenizer((f"{each.question}\n{each.trace}" for each in drawn), vocab_size)
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    tokenizer.chat_template = CHATML
    return tokenizer
