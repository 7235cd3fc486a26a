"""Settings of the text: sources, their shares, tokenizer, packing."""

from dataclasses import dataclass, field

from elastic.config.checks import check_names, one_of, require

KINDS_OF_SOURCES = ("stdlib", "files", "hub", "arithmetic")
"""Where documents come from."""

REASONING = ("keep", "strip", "last_turn")
"""What becomes of the reasoning in chat messages."""

PACKINGS = ("best_fit", "concat", "none")
"""How documents share a sequence."""


def stored_bytes(vocabulary: int) -> int:
    """Of one prepared token: a bit more than its id needs says whether it is a target."""
    return 2 if vocabulary <= 1 << 15 else 4


@dataclass(kw_only=True)
class SourceConfig:
    """Documents of one kind, and how much of a run's text they are."""

    kind: str = "files"
    """`stdlib` is the source code of this Python's own library; `files` are local JSON Lines,
    Parquet, Arrow or text files, compressed or not; `hub` is a data set by its hub id; `arithmetic`
    are generated problems with worked reasoning."""
    path: str | None = None
    """For `files` a glob, for `hub` the data set's id."""
    subset: str | None = None
    """For `hub`: the configuration of the data set."""
    split: str = "train"
    """For `hub`: the split."""
    files: str | None = None
    """For `hub`: a pattern of files of the data set, in the place of a split, for one whose columns
    only files can be read by."""
    revision: str | None = None
    """For `hub`: a branch, tag or commit; null is the default branch, by the commit that it has
    when it is prepared."""
    text: str = "text"
    """Column of the text; not read where `messages` is given."""
    messages: str | None = None
    """Column of chat messages, which the chat template turns into text."""
    tools: str | None = None
    """Column of the tools that messages may call."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Column -> values; a record is read if it has one of them there: as its value, in a list, or
    in text between commas."""
    loss_on: str = "all"
    """`all` tokens are targets, or those of the `assistant` alone."""
    reasoning: str = "keep"
    """Of an assistant's message with `reasoning_content`: `keep`, `strip`, or keep that of the
    `last_turn`."""
    weight: float | None = None
    """Share of the sequences, with those of the other sources; null is the number of its tokens."""
    target_tokens: int | None = None
    """About so many tokens are prepared, of parts in random order; null is all."""
    problems: int = 10_000
    """For `arithmetic`: so many different ones, or all that there are."""
    difficulties: list[int] = field(default_factory=lambda: [1, 2, 3])
    """For `arithmetic`: of 1 to 8."""

    def check(self, where: str) -> None:
        """Raise `ConfigError` for a value that cannot work; `where` is the source's key."""
        one_of(f"{where}.kind", self.kind, KINDS_OF_SOURCES)
        one_of(f"{where}.loss_on", self.loss_on, ("all", "assistant"))
        one_of(f"{where}.reasoning", self.reasoning, REASONING)
        require(
            (self.kind in ("files", "hub")) == (self.path is not None),
            f"{where}.path",
            self.path,
            "set for kind=files and kind=hub, and null for others",
        )
        if self.weight is not None:
            require(self.weight > 0, f"{where}.weight", self.weight, "positive, or null")
        if self.target_tokens is not None:
            require(
                self.target_tokens > 0,
                f"{where}.target_tokens",
                self.target_tokens,
                "positive, or null",
            )
        require(
            self.loss_on == "all" or self.chat,
            f"{where}.loss_on",
            self.loss_on,
            "all where there are no messages",
        )
        require(self.problems > 0, f"{where}.problems", self.problems, "positive")
        require(
            bool(self.difficulties) and all(1 <= each <= 8 for each in self.difficulties),
            f"{where}.difficulties",
            self.difficulties,
            "of 1 to 8, at least one",
        )

    @property
    def chat(self) -> bool:
        """Whether its documents are chat messages."""
        return self.messages is not None or self.kind == "arithmetic"


@dataclass(kw_only=True)
class DataConfig:
    """Text, tokenizer and packing."""

    sources: dict[str, SourceConfig]
    """Where the text comes from, by names of yours."""
    path: str | None = None
    """Short for the path of the one source of data=files and data=hub."""
    validation_every: int | None = None
    """Every n-th document of a source is held out: in turns for validation, by which is chosen, and
    for the report, on which `elastic evaluate` measures. null holds out 1 in 1,000, or more of a
    small source."""
    validation_sequences: int = 32
    """Fixed validation sequences per budget during training."""
    tokenizer: str = "train"
    """`train` builds a byte-level BPE on the text; `parent` takes the parent's; else a path or hub
    id."""
    tokenizer_vocab: int = 1024
    """Vocabulary of a tokenizer that is trained here."""
    chat_template: str | None = None
    """File of the template for chat messages; null is the tokenizer's own."""
    packing: str = "best_fit"
    """`best_fit` puts documents and pieces of long ones into sequences where they leave least room;
    `concat` cuts all text, one document after the other, at every sequence length; `none` gives
    each its own sequence. Documents never see one another."""
    on_error: str = "stop"
    """What a record does that cannot be read: `stop`, or `skip` it and count."""
    max_skip_fraction: float = 0.01
    """With `skip`: the largest share of a source's records that may be lost."""
    max_characters: int = 10_000_000
    """Records that are longer count as one that cannot be read."""
    workers: int | None = None
    """Processes that prepare text; null is one per core."""
    loader_workers: int = 0
    """Processes per training process that load batches; 0 loads between steps."""
    prepare_inline_tokens: int = 1_000_000_000
    """Above about so many tokens `elastic train` does not prepare them itself, but says how."""
    prepared: str | None = None
    """Directory of prepared text that several runs share; null is `data` in the run's own."""

    def __post_init__(self) -> None:
        check_names("data.sources", self.sources)
        require(bool(self.sources), "data.sources", {}, "at least one source")
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        unweighted = [name for name, source in self.sources.items() if source.weight is None]
        require(
            len(unweighted) in (0, len(self.sources)),
            f"data.sources.{unweighted[0]}.weight" if unweighted else "data.sources",
            None,
            "positive, as others have a weight; null for all counts each by its tokens",
        )
        if self.path is not None:
            require(
                self.path in [source.path for source in self.sources.values()],
                "data.path",
                self.path,
                "null here: no source has it; data=files takes local files, data=hub a data set",
            )
        if self.validation_every is not None:
            require(
                self.validation_every >= 2,
                "data.validation_every",
                self.validation_every,
                "at least 2, or null",
            )
        for name in ("validation_sequences", "max_characters", "prepare_inline_tokens"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "positive")
        if self.workers is not None:
            require(self.workers > 0, "data.workers", self.workers, "positive, or null")
        require(self.loader_workers >= 0, "data.loader_workers", self.loader_workers, "at least 0")
        require(
            self.tokenizer_vocab >= 260,
            "data.tokenizer_vocab",
            self.tokenizer_vocab,
            "at least 260: 256 bytes and the special tokens",
        )
        one_of("data.packing", self.packing, PACKINGS)
        one_of("data.on_error", self.on_error, ("stop", "skip"))
        share = self.max_skip_fraction
        require(0 <= share < 1, "data.max_skip_fraction", share, "in [0, 1)")
        require(
            self.chat_template is not None or self.tokenizer != "train" or not self.chat,
            "data.chat_template",
            None,
            "a file, for sources of messages with data.tokenizer=train, which has no template",
        )

    @property
    def chat(self) -> bool:
        """Whether any source has chat messages."""
        return any(source.chat for source in self.sources.values())

    def held_out_every(self, records: int) -> int:
        """Every so many records of a source that has that many one is held out."""
        chosen = min(1000, max(records // 60, min(5, records // 2)))
        return self.validation_every or chosen

    def shares(self, tokens: dict[str, int], stage: dict[str, float] | None) -> dict[str, float]:
        """Share of each source in a stage's sequences, which sum to 1.

        Args:
            tokens: of every source, what those without a weight count.
            stage: `weights` of the stage.
        """
        if stage is not None:
            found = {name: stage.get(name, 0.0) for name in self.sources}
        else:
            found = {}
            for name, source in self.sources.items():
                found[name] = float(tokens[name]) if source.weight is None else source.weight
        total = sum(found.values())
        return {name: value / total for name, value in found.items()}
